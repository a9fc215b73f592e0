"""The layers and cells used by test_training_tools and test_true_parameters."""

import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, pair, random_state

CASES = [*LAYERS, *(f"{kind}_cell" for kind in CELLS)]
I, H = 5, 17


def module_pair(case, dtype=torch.float64, **options):
    """fastrnn's module, torch's with equal weights, and arguments: an input and states."""
    if case in LAYERS:
        ours, theirs = pair(case, I, H, dtype=dtype, **options)
        return ours, theirs, (torch.randn(4, 3, I, dtype=dtype), random_state(theirs, 3))
    ours, theirs = cell_pair(case.removesuffix("_cell"), I, H, dtype=dtype)
    return ours, theirs, (torch.randn(3, I, dtype=dtype), cell_state(theirs, 3))


def mean_squares(result):
    """A loss: the mean squares of all results, added up."""
    return sum(t.square().mean() for t in flat(result))
