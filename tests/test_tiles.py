"""Every remainder of the CPU kernels' blocking.

Rows of a register tile, units of a vector and of a packed panel, depth of a k block. test_isa.py
runs these tests under each instruction set.
"""

import copy

import pytest
import torch
from helpers import FULL, LOW, assert_pool_no_worse, pair

import fastrnn

pytestmark = pytest.mark.cpu("about the CPU kernels' tiles")

#: A register tile has at most 9 rows (AMX: see below). 19 rows are tiles of 9, 9, 1 or of 7, 6, 6.
MOST_ROWS = 19
#: A vector holds 2 to 16 units, a panel up to 4 vectors. An RNN's 65 units are one panel and one
#: unit; 128 are two full panels, which a product of few rows takes together.
UNITS = [*range(1, 19), 31, 32, 33, 47, 48, 49, 63, 64, 65, 128, 129]
KINDS = ["lstm", "lstm_proj", "gru", "rnn_tanh"]


def tolerance(dtype):
    # h, at most 1, is rounded once a step, with a relative error of 2^-9 or 2^-12. Three steps add
    # a few roundings. The bugs to detect, wrong or missing values, give far larger errors.
    return {
        torch.bfloat16: {"rtol": 0, "atol": 0.03},
        torch.float16: {"rtol": 0, "atol": 0.004},
    }.get(dtype, {})


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_units(kind, dtype):
    for H in UNITS:
        layer, _ = pair(kind, 1 + H % 5, max(H, 2), dtype=dtype)
        exact = copy.deepcopy(layer).double()
        for T in [1, 3]:
            x = torch.randn(T, MOST_ROWS, layer.input_size, dtype=dtype)
            with torch.no_grad():
                expected, _ = exact(x.double())
                for B in range(1, MOST_ROWS + 1):
                    output, _ = layer(x[:, :B])
                    torch.testing.assert_close(
                        output, expected[:, :B].to(dtype), **tolerance(dtype)
                    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_16_bit_weights(dtype):
    """Up to 8 rows read 16-bit weights, 9 rows read widened ones: bitwise equal results."""
    layer = fastrnn.RNN(5, 721).to(dtype)  # more than 500,000 values
    x = torch.randn(3, 9, 5, dtype=dtype)
    with torch.no_grad():
        wide, _ = layer(x)
        for B in [4, 7, 8]:
            assert torch.equal(layer(x[:, :B])[0], wide[:, :B])


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_many_rows(kind, dtype):
    """Unpacked weights: from 28 rows on each lane is a row, in blocks of 96 rows and a remainder.

    A single row gives bitwise equal results.
    """
    few = [(401, 33, 20), (1700, 16, 18)]
    for I, H, B in [*few, (401, 33, 28), (1001, 17, 33), (15, 16, 42), (1, 5, 96), (33, 17, 260)]:
        layer, _ = pair(kind, I, H, dtype=dtype)
        exact = copy.deepcopy(layer).double()
        x = torch.randn(1, B, I, dtype=dtype)
        with torch.no_grad():
            output, _ = layer(x)
            expected, _ = exact(x.double())
            torch.testing.assert_close(output, expected.to(dtype), **tolerance(dtype))
            for b in [0, 15, B - 1]:
                alone, _ = layer(x[:, b : b + 1])
                assert torch.equal(alone, output[:, b : b + 1])


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_units_of_gradients(kind, dtype):
    for H in [2, 7, 15, 17, 33, 65, 128, 129]:
        layer, _ = pair(kind, H, H, dtype=dtype)
        exact = copy.deepcopy(layer).double()
        for T, B in [(1, 1), (3, 1), (3, 2), (3, 3), (2, 5), (3, 8), (3, 9), (2, 10), (3, 19)]:
            found = []
            x = torch.randn(T, B, H, dtype=dtype)
            g = torch.randn(T, B, layer.proj_size or H, dtype=dtype)
            for module, kind_of in [(layer, dtype), (exact, torch.float64)]:
                leaf = x.to(kind_of).requires_grad_()
                output, _ = module(leaf)
                parameters = [leaf, *module.parameters()]
                found.append(torch.autograd.grad(output, parameters, g.to(kind_of)))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs.to(dtype))


def check(kind, I, H, T, B):
    """Output and every gradient against float64."""
    layer, _ = pair(kind, I, H)
    exact = copy.deepcopy(layer).double()
    found = []
    x = torch.randn(T, B, I)
    for module, dtype in [(layer, torch.float32), (exact, torch.float64)]:
        leaf = x.to(dtype).requires_grad_()
        output, _ = module(leaf)
        grads = torch.autograd.grad(output.mean(), [leaf, *module.parameters()])
        found.append([output.detach(), *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("depth", [127, 129, 255, 256, 257, 384, 385, 513])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_depth(kind, depth):
    """k blocks are 128 or 256 long; weight gradients sum over blocks of 384 rows."""
    for I, H, T, B in [(depth, 17, 2, 3), (5, depth, 2, 3), (5, 17, depth, 1), (5, 17, 1, depth)]:
        check(kind, I, H, T, B)


@pytest.mark.parametrize(
    "size",
    [
        *[(3, 16, 31, 32), (3, 17, 32, 33), (2, 31, 33, 17), (2, 32, 17, 48), (3, 33, 1, 64)],
        *[(2, 49, 530, 20), (2, 16, 520, 20), (2, 65, 20, 545), (400, 1, 33, 33), (1, 33, 40, 70)],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_tiles(kind, size):
    """AMX tiles: up to 32 rows as two tiles of 16, 32 products an instruction, k blocks of 512.

    Weight gradients sum over blocks of up to 384 rows.
    """
    T, B, I, H = size
    ours, theirs = pair(kind, I, H, dtype=torch.bfloat16)
    x = torch.randn(T, B, I).bfloat16()
    g = torch.randn(T, B, theirs.proj_size or H).bfloat16()
    results = []
    for module, dtype in [
        (ours, x.dtype),
        (theirs, x.dtype),
        (copy.deepcopy(theirs).double(), None),
    ]:
        leaf = x.to(dtype or torch.float64).requires_grad_()
        output, _ = module(leaf)
        grads = torch.autograd.grad(output, [leaf, *module.parameters()], g.to(leaf.dtype))
        results.append([output.detach(), *grads])
    for values in zip(*results, strict=True):
        assert_pool_no_worse([values], 2)


@pytest.mark.parametrize("B", [9, 19, 70, 130])
@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
def test_row_blocks(kind, B):
    """Products of several tiles with a depth over 1024 are computed in blocks of up to 64 rows."""
    for I, H, T in [(1100, 17, 2), (5, 347, 2), (5, 1041, 1)]:
        check(kind, I, H, T, B)
