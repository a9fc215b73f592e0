"""Tangents by torch.autograd.forward_ad, which have kernels on the CPU, and their gradients.

test_func.py checks tangents on every device with finite differences.
"""

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    cell_pair,
    cell_state,
    flat,
    leaves,
    pair,
    pair_and_leaves,
    ragged,
    random_state,
)
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.cpu("torch's layers have no forward mode on CUDA")

F64 = torch.float64
BOTH = [False, True]

#: Which tensors have a tangent.
MOVED = {
    "all": lambda name: True,
    "input": lambda name: name == "input",
    "states": lambda name: name in ("h", "c"),
    "weight_hh": lambda name: name.startswith("weight_hh"),
}


def tangents(module, args, moved, differentiable=True):
    """Tangents of the results, and the gradients of these of every tensor and direction."""
    x, state = args
    named = dict(zip(["input", "h", "c"], [*flat(x), *flat(state)], strict=False))
    named |= dict(module.named_parameters())
    torch.manual_seed(1)
    directions = {
        name: torch.randn_like(t).requires_grad_()
        for name, t in named.items()
        if MOVED[moved](name)
    }
    with forward_ad.dual_level(), torch.set_grad_enabled(differentiable):
        dual = {
            name: forward_ad.make_dual(t, directions[name]) if name in directions else t
            for name, t in named.items()
        }
        data = dual.pop("input")
        hx = tuple(dual.pop(name) for name in ("h", "c") if name in dual)
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        torch.manual_seed(3)  # for dropout
        results = flat(functional_call(module, dual, (given, hx if len(hx) > 1 else hx[0])))
        found = [forward_ad.unpack_dual(t).tangent for t in results]
    if not differentiable:
        return found
    loss = sum(((i + 1) * t.sin()).sum() for i, t in enumerate(found))
    inputs = [*named.values(), *directions.values()]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*found, *gradients]


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, moved, bias, bidirectional, layers, packed, request):
    ours, theirs, args = pair_and_leaves(
        kind, bias, bidirectional, layers, packed, request.node.name
    )
    found = [tangents(layer, args, moved, differentiable=False) for layer in [ours, theirs]]
    torch.testing.assert_close(*found)


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_tangents(kind, moved, packed):
    ours, theirs = pair(kind, 5, 7, num_layers=2, bidirectional=True, dropout=0.4, dtype=F64)
    x = ragged([4, 1, 3], 5, F64) if packed else torch.randn(4, 3, 5, dtype=F64)
    args = leaves((x, random_state(theirs, 3)))
    torch.testing.assert_close(*(tangents(layer, args, moved) for layer in [ours, theirs]))


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, moved):
    for H in [1, 16, 33]:
        ours, theirs = cell_pair(kind, 5, H, dtype=F64)
        for batch in [(), (1,), (40,)]:
            args = leaves((torch.randn(*batch, 5, dtype=F64), cell_state(theirs, *batch)))
            torch.testing.assert_close(*(tangents(cell, args, moved) for cell in [ours, theirs]))


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_compute_tangents(kind, dtype):
    layer, _ = pair(kind, 5, 17, dtype=dtype)
    args = leaves((torch.randn(4, 3, 5, dtype=dtype), random_state(layer, 3)))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        found = tangents(layer, args, "input", differentiable=False)
    assert [event.name for event in profiled.events()].count("fastrnn::tangents") == 1
    assert all(t.dtype == dtype for t in found)
