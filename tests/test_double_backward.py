"""Gradients of gradients in every dtype, and of those again. In float64: test_gradients.py, too."""

import copy

import pytest
import torch
from helpers import (
    FULL,
    LAYERS,
    LOW,
    assert_pool_no_worse,
    avoid_corners,
    flat,
    leaves,
    mapped,
    pair,
    ragged,
    random_state,
)

pytestmark = pytest.mark.once


def penalty_gradients(layer, args, order=2):
    """Gradients of the squares of the gradients, in their turn, of a loss of all the results."""
    args = leaves(args)
    torch.manual_seed(3)  # of dropout
    wanted = [*flat(args), *layer.parameters()]
    loss = sum(o.sin().mean() for o in flat(layer(*args)))
    for n in range(order):
        found = torch.autograd.grad(loss, wanted, create_graph=n + 1 < order)
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
            avoid_corners(kind, ours, theirs)
        args = arguments(theirs, packed, dtype)
        exact = penalty_gradients(copy.deepcopy(theirs).double(), mapped(args, torch.Tensor.double))
        found = [penalty_gradients(layer, args) for layer in [ours, theirs]]
        assert all(g.dtype == dtype for g in found[0])
        pool += list(zip(*found, exact, strict=True))
    if dtype in LOW:
        assert_pool_no_worse(pool, times=1)  # it computes in float32
    else:
        torch.testing.assert_close([ours for ours, *_ in pool], [theirs for _, theirs, _ in pool])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_third_gradients(kind, packed):
    ours, theirs = pair(kind, 5, 3, num_layers=2, dropout=0.5, dtype=torch.float64)
    args = arguments(theirs, packed, torch.float64)
    torch.testing.assert_close(*(penalty_gradients(layer, args, 3) for layer in [ours, theirs]))


@pytest.mark.parametrize("kind", LAYERS)
def test_second_gradients_of_what_was_computed_again(kind):
    """With recompute=True nothing but the outputs is kept; the second derivative needs no more."""
    ours, theirs = pair(kind, 5, 17, num_layers=2, dtype=torch.float64)
    ours.recompute = True
    args = arguments(theirs, False, torch.float64)
    torch.testing.assert_close(*(penalty_gradients(layer, args) for layer in [ours, theirs]))
