"""Every remainder that the kernels can meet.

Of rows in a tile, of units in a vector and in a panel, of the depth of a product in a sum.
test_isa.py runs this under each instruction set.
"""

import copy

import pytest
import torch
from helpers import FULL, LOW, assert_pool_no_worse, pair

import fastrnn

pytestmark = pytest.mark.cpu("the tiles of the CPU kernels")

#: A tile has at most 9 rows (AMX's: below); 19 are two tiles and one row, or three of 7, 6 and 6.
MOST_ROWS = 19
#: A vector holds 2 to 16 units, a panel up to 4 vectors: of an RNN's 65 units are a panel and one
#: more, and 128 two whole panels, which few rows are multiplied with at once.
UNITS = [*range(1, 19), 31, 32, 33, 47, 48, 49, 63, 64, 65, 128, 129]
KINDS = ["lstm", "lstm_proj", "gru", "rnn_tanh"]


def tolerance(dtype):
    # h is rounded once a step, to 2^-9 or 2^-12 of its size (at most 1), and three steps add up to
    # a few roundings. What is looked for here is a wrong or missing value, off by far more.
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
def test_large_weights_of_16_bits(dtype):
    """Up to 8 rows they stay so: the same bits as beside a ninth, for which they are widened."""
    layer = fastrnn.RNN(5, 721).to(dtype)  # more than 500,000 values
    x = torch.randn(3, 9, 5, dtype=dtype)
    with torch.no_grad():
        wide, _ = layer(x)
        for B in [4, 7, 8]:
            assert torch.equal(layer(x[:, :B])[0], wide[:, :B])


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_many_rows(kind, dtype):
    """Weights as they lie: from 28 rows on a lane is a row, 96 rows at a time, but for a few of the
    last. One row has the same bits."""
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
    """Sums are cut at 128 or 256 products, and at 384 rows of data."""
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
def test_tiles_of_bfloat16(kind, size):
    """AMX: up to 32 rows in two halves of 16, 32 products at a time, 512 in a part; gradients of
    weights are sums over up to 384 rows."""
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
    for of_one in zip(*results, strict=True):
        assert_pool_no_worse([of_one], 2)


@pytest.mark.parametrize("B", [9, 19, 70, 130])
@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
def test_parts(kind, B):
    """More than 1024 products of several tiles are made in parts, of 64 rows at most."""
    for I, H, T in [(1100, 17, 2), (5, 347, 2), (5, 1041, 1)]:
        check(kind, I, H, T, B)
