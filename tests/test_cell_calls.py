"""Gradients of cells."""

import pytest
import torch
from helpers import CELLS, avoid_relu_kinks, cell_pair, cell_state, flat

BATCHES = [None, 1, 3]


def cells(kind, **options):
    """Our cell and torch's with equal weights."""
    return cell_pair(kind, 3, 4, **options)


def arguments(cell, B):
    x, state = torch.randn(B or 1, 3), cell_state(cell, B or 1)
    if B is not None:
        return x, state
    return x[0], tuple(s[0] for s in state) if isinstance(state, tuple) else state[0]


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("kind", CELLS)
def test_an_input_of_two_steps(kind, B):
    """Its gradients are summed in place."""
    cell, _ = cell_pair(kind, 3, 4, dtype=torch.float64)
    avoid_relu_kinks(kind, cell)
    x, state = arguments(cell, B)
    given = [t.double().requires_grad_() for t in (x, *flat(state))]

    def two_steps(x, *state):
        hx = state if len(state) == 2 else state[0]
        return cell(x, cell(x, hx))

    assert torch.autograd.gradcheck(two_steps, given)
    assert torch.autograd.gradgradcheck(two_steps, given)


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_one_node(kind):
    """Between leaves and results there are no views, whose backward takes as long as a step's."""
    cell, _ = cells(kind)
    given = [t.requires_grad_() for t in flat(arguments(cell, 3))]
    hx = tuple(given[1:]) if len(given) == 3 else given[1]
    node = flat(cell(given[0], hx))[0].grad_fn
    assert node.name() == "FastrnnBackward"
    leaves = [n.variable for n, _ in node.next_functions if n is not None]
    assert all(a is b for a, b in zip(leaves, [*given, *cell.parameters()], strict=True))
