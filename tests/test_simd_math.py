"""The functions of csrc/cpu/simd_math.h and dual.h against torch, for each instruction set."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import build
import toolchain

pytestmark = [pytest.mark.once, pytest.mark.cpu("about CPU instruction sets")]

CSRC = Path(__file__).parent.parent / "csrc"
SETS = list(toolchain.ISA_FLAGS)  # from the narrowest to the widest
FUNCTIONS = ["sigmoid", "tanh", "exp", "log", "log1p", "sqrt", "erf", "abs"]
DTYPES = {"float": torch.float32, "double": torch.float64}
#: function -> the most units in the last place that it may be off by, in float and in double. In
#: double these include those of torch, which is the reference. sigmoid is off by 5 near -88.
MOST = {"sigmoid": (5.5, 3), "tanh": (2.5, 2), "log1p": (2.5, 2)}
OTHERS = (1.1, 1)
SOURCE = """
#include "cpu/dual.h"
using namespace fastrnn;
using namespace FASTRNN_ISA;
#define FUNCTION(T, name)                                                      \\
    extern "C" void name##_##T(const T* x, T* y, T* tangent, int n) {          \\
        for (int i = 0; i < n; i += lanes<T>) {                                \\
            const Dual<T> dual{load<T>(x + i, lanes<T>), broadcast(T(1))};     \\
            store<T>(y + i, Math<Vec<T>>::name(dual.value), lanes<T>);         \\
            store<T>(tangent + i, Math<Dual<T>>::name(dual).tangent, lanes<T>); \\
        }                                                                      \\
    }
"""


@pytest.fixture(scope="module", params=SETS)
def library(request, tmp_path_factory):
    if SETS.index(request.param) > max(SETS.index(s) for s in toolchain.isas(None) if s in SETS):
        pytest.skip("this CPU does not have it")
    folder = tmp_path_factory.mktemp(request.param)
    calls = [f"FUNCTION({T}, {name})" for T in DTYPES for name in FUNCTIONS]
    (folder / "math.cpp").write_text(SOURCE + "\n".join(calls))
    flags = [*build.CXX_FLAGS, *toolchain.CPU_MACROS, *toolchain.ISA_FLAGS[request.param]]
    flags += ["-fvisibility=default", f"-I{CSRC}", f"-DFASTRNN_ISA={request.param}", "-shared"]
    command = [*toolchain.cxx(), *flags, "math.cpp", "-o", "math.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "math.so"))


def computed(library, name, x):
    """The function's values, and its derivatives."""
    assert len(x) % 16 == 0
    y, tangent = torch.empty_like(x), torch.empty_like(x)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y, tangent)]
    kind = "float" if x.dtype == torch.float32 else "double"
    getattr(library, f"{name}_{kind}")(*pointers, ctypes.c_int(len(x)))
    return y, tangent


def over_a_wide_range(dtype):
    """Numbers of every magnitude and sign, near 0 and 1, and in the range of exp."""
    generator = torch.Generator().manual_seed(0)
    n = 1 << 16
    uniform = torch.rand(4, n, generator=generator, dtype=torch.float64)
    exponents = torch.finfo(dtype)
    low, high = torch.tensor([exponents.tiny, exponents.max], dtype=torch.float64).log2()
    any_size = (low + (high - low) * uniform[0] * 0.9999).exp2()
    parts = [any_size, -any_size, 0.5 + uniform[1], uniform[2] - 0.5, 800 * (uniform[3] - 0.5)]
    return torch.cat(parts).to(dtype)


def units(found, expected):
    """How far `found` is off, in units in the last place; where both are numbers and normal."""
    finfo = torch.finfo(found.dtype)
    expected = expected.double()
    normal = expected.isfinite() & (expected.abs() >= finfo.tiny) & (expected.abs() <= finfo.max)
    step = (expected.abs().log2().floor()).exp2() * finfo.eps
    return ((found.double() - expected).abs() / step)[normal]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(library, name, dtype):
    x = over_a_wide_range(dtype)
    found, _ = computed(library, name, x)
    expected = getattr(torch, name)(x.double())
    in_float, in_double = MOST.get(name, OTHERS)
    most = in_float if dtype == torch.float32 else in_double
    off = units(found, expected)
    assert len(off) > 1000
    assert off.max() <= most
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(library, name, dtype):
    inf, finfo = float("inf"), torch.finfo(dtype)
    special = [0.0, -0.0, 1, -1, inf, -inf, float("nan"), finfo.max, -finfo.max, finfo.tiny]
    x = torch.tensor([*special, -2, 89, 710, -104, -746, 2], dtype=dtype)
    found, _ = computed(library, name, x)
    expected = getattr(torch, name)(x)
    if name == "log1p":  # torch 2.6 has infinity for the largest number
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(np.log1p(x.numpy()))
    torch.testing.assert_close(found, expected, equal_nan=True, atol=finfo.tiny, rtol=4 * finfo.eps)
    if name not in ("exp", "sigmoid"):  # -0.0
        zeros = expected == 0
        assert torch.equal(found[zeros].signbit(), expected[zeros].signbit())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subnormal_numbers_count_as_zeros(library, name):
    x = torch.full([16], 1e-310, dtype=torch.float64)
    found, _ = computed(library, name, x)
    if name == "log":
        assert (found == float("-inf")).all()
    else:
        torch.testing.assert_close(found, getattr(torch, name)(x), atol=1e-155, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(library, name, dtype):
    x = 4 * torch.randn(4096, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[:2] = torch.tensor([0.0, -0.0])
    _, found = computed(library, name, x)
    at = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(getattr(torch, name)(at).sum(), at)
    domain = expected.isfinite() & (x.double() > {"log": 0, "log1p": -1, "sqrt": 0}.get(name, -99))
    close = {"atol": 10 * torch.finfo(dtype).eps, "rtol": 100 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found[domain], expected[domain].to(dtype), **close)
