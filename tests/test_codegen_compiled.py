"""Generated cells, compiled and compared with autograd."""

import ctypes
import inspect
import subprocess
from pathlib import Path

import pytest
import torch
from codegen_cells import (
    CELLS,
    cells,
    generated,
    gru,
)

import build
import toolchain
from fastrnn.codegen import Gates, generate

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]

ROOT = Path(__file__).parent.parent
SOURCE = """
#include "cells/dependence.h"
#include "cpu/dual.h"
using namespace fastrnn;
using namespace FASTRNN_ISA;

template <class V, class Cell>
void step(V* x, V* r, V h_prev, V c_prev, V dh, V dc, V* out) {
    V saved[Cell::saved + 1], dgates[Cell::grads], h{}, c{}, dh_prev{}, dc_prev{};
    Cell::forward(x, r, h_prev, c_prev, h, c, saved);
    Cell::backward(saved, Cell::needs_h_prev ? h_prev : V{}, c_prev, Cell::needs_h ? h : V{}, c,
                   dh, dc, dgates, dh_prev, dc_prev);
    if constexpr (allows_projection<Cell>) h = Cell::output(saved, c);
    *out++ = h, *out++ = c;
    for (int g = 0; g < Cell::gates; ++g) *out++ = dgates[Cell::x_grad[g]];
    for (int g = 0; g < Cell::gates; ++g) *out++ = dgates[Cell::grads - Cell::gates + g];
    *out++ = dh_prev, *out++ = dc_prev;
}

// values, tangents: [2 G + 4, n], and of the results.
template <class T, class Cell>
void run(const T* values, const T* tangents, T* results, T* result_tangents, int n) {
    static_assert(Declared<Cell>::ok);
    constexpr int G = Cell::gates, in = 2 * G + 4;
    for (int unit = 0; unit < n; unit += lanes<T>) {
        Dual<T> v[in], found[in];
        for (int i = 0; i < in; ++i)
            v[i] = {load<T>(values + i * n + unit, lanes<T>),
                    load<T>(tangents + i * n + unit, lanes<T>)};
        step<Dual<T>, Cell>(v, v + G, v[2 * G], v[2 * G + 1], v[2 * G + 2], v[2 * G + 3], found);
        for (int i = 0; i < in; ++i)
            store<T>(result_tangents + i * n + unit, found[i].tangent, lanes<T>);
        Vec<T> w[in], results_of[in];
        for (int i = 0; i < in; ++i) w[i] = v[i].value;
        step<Vec<T>, Cell>(w, w + G, w[2 * G], w[2 * G + 1], w[2 * G + 2], w[2 * G + 3],
                           results_of);
        for (int i = 0; i < in; ++i) store<T>(results + i * n + unit, results_of[i], lanes<T>);
    }
}

#define CELL(T, name, Cell)                                                                      \\
    extern "C" void name##_##T(const T* v, const T* t, T* results, T* result_tangents, int n) { \\
        run<T, Cell>(v, t, results, result_tangents, n);                                        \\
    }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    lines = []
    # These names are also ones of the headers.
    others = [generate(gru, gates=tuple("rzn"), name=name) for name in ("math", "f", "v")]
    for cell in [*map(generated, CELLS), *others]:
        (folder / f"cell_{cell.name}.h").write_text(cell.header)
        lines.insert(0, f'#include "cell_{cell.name}.h"')
        lines += [f"CELL({T}, {cell.name}, ::{cell.struct})" for T in ("float", "double")]
    (folder / "cells.cpp").write_text("\n".join([SOURCE, *lines]))
    flags = [*build.CXX_FLAGS, *toolchain.CPU_MACROS, "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += ["-fvisibility=default", f"-I{ROOT / 'csrc'}", "-DFASTRNN_ISA=generic", "-shared"]
    # Of headers that are not generated.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-parameter"]
    command = [*toolchain.cxx(), *flags, "cells.cpp", "-o", "cells.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "cells.so"))


def by_autograd(function, values):
    """The results of the compiled step, [2 G + 4, n], in its order."""
    G = len(CELLS[function])
    has_c = len(inspect.signature(function).parameters) == 4

    def new_states(leaves):
        gates = [Gates(CELLS[function], leaves[i : i + G].unbind()) for i in (0, G)]
        new = function(*gates, *leaves[2 * G : 2 * G + 1 + has_c])
        return torch.stack(new) if has_c else torch.stack([new, torch.zeros_like(new)])

    states, backward = torch.func.vjp(new_states, values[: 2 * G + 2])
    (gradients,) = backward(values[2 * G + 2 :])
    return torch.cat([states, gradients])


@pytest.mark.parametrize(("kind", "dtype"), [("float", torch.float32), ("double", torch.float64)])
@cells
def test_compiled(library, function, kind, dtype):
    G, n = len(CELLS[function]), 64
    generator = torch.Generator().manual_seed(0)
    values, tangents = torch.randn(2, 2 * G + 4, n, generator=generator, dtype=dtype)
    values[:, -1] = 0
    results, result_tangents = torch.empty_like(values), torch.empty_like(values)
    run = getattr(library, f"{function.__name__}_{kind}")
    arrays = [values, tangents, results, result_tangents]
    run(*(ctypes.c_void_p(t.data_ptr()) for t in arrays), ctypes.c_int(n))
    expected, expected_tangents = torch.func.jvp(
        lambda v: by_autograd(function, v), (values.double(),), (tangents.double(),)
    )
    close = {"rtol": 1e-12, "atol": 1e-12} if kind == "double" else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(results, expected.to(dtype), **close)
    # At the kinks of the last unit a second derivative is not defined.
    tangents_of = [t[:, :-1].to(dtype) for t in (result_tangents, expected_tangents)]
    torch.testing.assert_close(*tangents_of, **close)
