"""A cell that does not declare what it computes does not compile (csrc/cells/dependence.h)."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.cpu("about the compiler")]

ROOT = Path(__file__).parent.parent
MGU = (ROOT / "tests/additions/mgu.h").read_text()
# h_t = h_{t-1} / 2 + tanh(x + r): backward reads h_t and not h_{t-1}, forward reads h_{t-1}.
LEAKY = """
struct Leaky {
    static constexpr int gates = 1, saved = 1, grads = 1;
    static constexpr bool has_c = false;
    static constexpr int x_grad[gates] = {0};
    static constexpr bool needs_h = false;
    static constexpr bool needs_h_prev = false;
    static constexpr bool passes_h = true;

    template <class V>
    static FASTRNN_FN void forward(const V* x, const V* r, V h_prev, V, V& h, V&, V* saved) {
        saved[0] = Math<V>::tanh(x[0] + r[0]);
        h = h_prev / 2 + saved[0];
    }

    template <class V>
    static FASTRNN_FN void backward(const V* saved, V, V, V h, V, V dh, V, V* dgates, V& dh_prev,
                                    V&) {
        dgates[0] = dh * (1 - saved[0] * saved[0]);
        dh_prev = dh / 2;
    }
};
"""


def compiled(source: str, cell: str, check: str) -> str:
    """What the compiler says of the cell, or "" if it compiles."""
    source = re.sub(r'#include "cell.h"', "", source)
    if "namespace fastrnn" not in source:
        source = f"namespace fastrnn {{ {source} }}"
    text = f'#include "cells/dependence.h"\n{source}\nstatic_assert({check.format(cell)});'
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", "-x", "c++", "-Icsrc"]
    done = subprocess.run(
        [*command, "-"], input=text, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize(("source", "cell"), [(MGU, "Mgu"), (LEAKY, "Leaky")])
def test_right_declarations(source, cell):
    assert compiled(source, cell, "fastrnn::Declared<fastrnn::{}>::ok") == ""
    assert compiled(source, cell, "fastrnn::forward_reads_h_prev<fastrnn::{}>") == ""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("passes_h = true", "passes_h = false", "passes_h must be true"),
        ("needs_h_prev = true", "needs_h_prev = false", "needs_h_prev must be true"),
        ("dgates[0] = dx_n;", "dgates[0] = dx_n * h;", "needs_h must be true"),
        ("dh_prev = dh * (1 - f);", "dh_prev = V{};", "passes_h must be false"),
        ("dh_prev = dh * (1 - f);", "", "backward must compute dh_prev"),
    ],
)
def test_wrong_declarations(right, wrong, message):
    source = MGU.replace("V h_prev, V, V, V, V dh", "V h_prev, V, V h, V, V dh")
    assert right in source
    found = compiled(source.replace(right, wrong), "Mgu", "fastrnn::Declared<fastrnn::{}>::ok")
    assert message in found
