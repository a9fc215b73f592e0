"""torch.jit.trace: a traced layer or cell takes any T and B, like torch's."""

import copy

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    cell_pair,
    cell_state,
    flat,
    gradients,
    leaves,
    pair,
    random_state,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import fastrnn
from fastrnn import functional

# Runs before any kernel, so one instruction set is enough.
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # torch's own layers and pack_padded_sequence compare sizes in Python.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

BOTH = [False, True]
I, H = 3, 4

OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "deep": {"num_layers": 2, "bidirectional": True, "bias": False},
}


def assert_traced(ours, theirs, before, *after):
    """Both, traced with `before`, return torch's results and gradients for other arguments."""
    traced = [torch.jit.trace(m, before) for m in [ours, theirs]]
    for args in after:
        args = leaves(args)
        expected = flat(theirs(*args))
        inputs = [*flat(args), *theirs.parameters()]
        expected_grads = gradients(expected, inputs)
        for module, call in zip([ours, theirs], traced, strict=True):
            results = flat(call(*args))
            assert_close(results, expected)
            found = gradients(results, [*flat(args), *module.parameters()])
            assert_close(found, expected_grads)


@pytest.mark.parametrize("how", ["built", "accelerated"])
@pytest.mark.parametrize("state", BOTH, ids=["zeros", "state"])
@pytest.mark.parametrize("batched", BOTH, ids=["unbatched", "batched"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, options, batched, state, how):
    options = OPTIONS[options]
    ours, theirs = pair(kind, I, H, **options)
    if how == "accelerated":
        ours = fastrnn.accelerate(copy.deepcopy(theirs))

    def args(T, B):
        shape = (B, T) if options.get("batch_first") else (T, B)
        x = torch.randn(*(shape if batched else (T,)), I)
        return (x, random_state(theirs, *([B] if batched else []))) if state else (x,)

    assert_traced(ours, theirs, args(5, 2), args(7, 6), args(1, 1), args(2, 9))


@pytest.mark.parametrize("how", ["built", "accelerated"])
@pytest.mark.parametrize("state", BOTH, ids=["zeros", "state"])
@pytest.mark.parametrize("batched", BOTH, ids=["unbatched", "batched"])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, batched, state, how):
    ours, theirs = cell_pair(kind, I, H, bias=bias)
    if how == "accelerated":
        ours = fastrnn.accelerate(copy.deepcopy(theirs))

    def args(B):
        shape = (B,) if batched else ()
        x = torch.randn(*shape, I)
        return (x, cell_state(theirs, *shape)) if state else (x,)

    assert_traced(ours, theirs, args(2), args(5), args(1))


class Steps(nn.Module):
    """A loop over a cell's steps, which tracing unrolls."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for x_t in x.unbind():
            state = self.cell(x_t, state)
        return state


@pytest.mark.parametrize("kind", CELLS)
def test_steps_of_a_cell(kind):
    ours, theirs = (Steps(cell) for cell in cell_pair(kind, I, H))
    assert_traced(ours, theirs, (torch.randn(3, 2, I),), (torch.randn(3, 5, I),))


def on_the_cpu(sizes):
    """Lengths or batch sizes as torch requires them, whatever the default device."""
    return torch.tensor(sizes, device="cpu")


class Packing(nn.Module):
    """Packs a layer's input: 2-D `x` with batch sizes, 3-D `x` with sequence lengths."""

    def __init__(self, layer, sort):
        super().__init__()
        self.layer, self.sort = layer, sort

    def forward(self, x, lengths):
        if x.dim() == 2:
            output, state = self.layer(PackedSequence(x, lengths))
            return output.data, state
        packed = pack_padded_sequence(x, lengths, enforce_sorted=not self.sort)
        output, state = self.layer(packed)
        return pad_packed_sequence(output)[0], state


@pytest.mark.parametrize("recompute", BOTH, ids=["keeping", "recompute"])
@pytest.mark.parametrize("sort", BOTH, ids=["sorted", "unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_by_lengths(kind, sort, recompute):
    ours, theirs = pair(kind, I, H, num_layers=2, bidirectional=True)
    ours.recompute = recompute
    first = torch.randn(4, 3, I), on_the_cpu([2, 4, 1] if sort else [4, 2, 1])
    other = torch.randn(6, 5, I), on_the_cpu([1, 6, 3, 3, 2] if sort else [6, 3, 3, 2, 1])
    traced = [torch.jit.trace(Packing(m, sort), first) for m in [ours, theirs]]
    expected = flat(Packing(theirs, sort)(*other))
    for call in traced:
        assert_close(flat(call(*other)), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_by_batch_sizes(kind):
    ours, theirs = (Packing(m, False) for m in pair(kind, I, H, bidirectional=True))
    first = torch.randn(7, I), on_the_cpu([3, 2, 1, 1])
    other = torch.randn(12, I), on_the_cpu([5, 4, 2, 1])
    expected = flat(theirs(*other))
    for module in [ours, theirs]:
        assert_close(flat(torch.jit.trace(module, first)(*other)), expected)


@pytest.mark.parametrize("kind", CELLS)
def test_function_of_a_cell(kind):
    _, cell = cell_pair(kind, I, H)
    weights = [p.detach() for p in cell.parameters()]

    def args(B):
        return torch.randn(B, I), *flat(cell_state(cell, B))

    first, other = args(2), args(5)
    for function in [getattr(library, f"{kind}_cell") for library in [functional, torch]]:

        def call(x, *state, function=function):
            return function(x, state if len(state) > 1 else state[0], *weights)

        found = torch.jit.trace(call, first)(*other)
        assert_close(flat(found), flat(cell(other[0], other[1:] if other[2:] else other[1])))
