"""Second and third derivatives in every dtype. test_gradients.py also checks float64."""

import copy

import pytest
import torch
from helpers import (
    FULL,
    LAYERS,
    LOW,
    assert_pool_no_worse,
    avoid_relu_kinks,
    flat,
    leaves,
    mapped,
    pair,
    ragged,
    random_state,
)

pytestmark = pytest.mark.once


def penalty_gradients(layer, args, order=2):
    """Gradients of a loss or, for each order above 1, of the sum of the previous ones' squares."""
    args = leaves(args)
    torch.manual_seed(3)  # for dropout
    inputs = [*flat(args), *layer.parameters()]
    loss = sum(o.sin().mean() for o in flat(layer(*args)))
    for n in range(order):
        found = torch.autograd.grad(loss, inputs, create_graph=n + 1 < order)
        loss = sum(g.square().sum() for g in found)
    return list(found)


def arguments(layer, packed, dtype):
    x = ragged([4, 2, 5], 5, dtype) if packed else torch.randn(5, 3, 5, dtype=dtype)
    return x, random_state(layer, 3)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_error_of_second_gradients(kind, dtype, packed):
    pool = []
    for options in [{}, {"num_layers": 2, "bidirectional": True}]:
        ours, theirs = pair(kind, 5, 17, dtype=dtype, **options)
        if dtype in LOW:
            avoid_relu_kinks(kind, ours, theirs)
        args = arguments(theirs, packed, dtype)
        exact = penalty_gradients(copy.deepcopy(theirs).double(), mapped(args, torch.Tensor.double))
        found = [penalty_gradients(layer, args) for layer in [ours, theirs]]
        assert all(g.dtype == dtype for g in found[0])
        pool += list(zip(*found, exact, strict=True))
    if dtype in LOW:
        assert_pool_no_worse(pool, times=1)  # fastrnn computes in float32
    else:
        torch.testing.assert_close([ours for ours, *_ in pool], [theirs for _, theirs, _ in pool])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_third_gradients(kind, packed):
    ours, theirs = pair(kind, 5, 3, num_layers=2, dropout=0.5, dtype=torch.float64)
    args = arguments(theirs, packed, torch.float64)
    torch.testing.assert_close(*(penalty_gradients(layer, args, 3) for layer in [ours, theirs]))


@pytest.mark.parametrize("kind", LAYERS)
def test_second_gradients_with_recompute(kind):
    """recompute=True saves only the layers' outputs, which is all that double backward needs."""
    ours, theirs = pair(kind, 5, 17, num_layers=2, dtype=torch.float64)
    ours.recompute = True
    args = arguments(theirs, False, torch.float64)
    torch.testing.assert_close(*(penalty_gradients(layer, args) for layer in [ours, theirs]))
