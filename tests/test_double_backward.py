"""Second derivatives, which have kernels on the CPU, and third ones, which have none.

test_gradients.py compares them with finite differences.
"""

import copy

import pytest
import torch
from helpers import (
    CELLS,
    FULL,
    LAYERS,
    LOW,
    affordable,
    assert_pool_no_worse,
    avoid_relu_kinks,
    cell_pair,
    cell_state,
    flat,
    leaves,
    mapped,
    pair,
    pair_and_leaves,
    ragged,
    random_state,
)
from torch.profiler import ProfilerActivity, profile

F64 = torch.float64
BOTH = [False, True]


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


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
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


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_third_gradients(kind, packed):
    ours, theirs = pair(kind, 5, 3, num_layers=2, dropout=0.5, dtype=torch.float64)
    args = arguments(theirs, packed, torch.float64)
    torch.testing.assert_close(*(penalty_gradients(layer, args, 3) for layer in [ours, theirs]))


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYERS)
def test_second_gradients_with_recompute(kind):
    """recompute=True saves only the layers' outputs, and double backward reads none of them."""
    ours, theirs = pair(kind, 5, 17, num_layers=2, dtype=torch.float64)
    ours.recompute = True
    args = arguments(theirs, False, torch.float64)
    torch.testing.assert_close(*(penalty_gradients(layer, args) for layer in [ours, theirs]))


#: What the first derivative is of.
OF = {
    "all": lambda name: True,
    "input": lambda name: name == "input",
    "states": lambda name: name in ("h", "c"),
    "weights": lambda name: name.startswith(("weight", "bias")),
    "weight_hh": lambda name: name.startswith("weight_hh"),
}


def second_gradients(module, args, of="all", loss="all"):
    """Gradients of all tensors, of the squares of the gradients of some."""
    x, state = args
    named = dict(zip(["input", "h", "c"], [*flat(x), *flat(state)], strict=False))
    named |= dict(module.named_parameters())
    torch.manual_seed(3)  # for dropout
    outputs = flat(module(x, state))
    if loss != "all":
        outputs = [outputs[["output", "h_n", "c_n"].index(loss)]]
    total = sum(((i + 1) * o.sin()).sum() for i, o in enumerate(outputs))
    some = [t for name, t in named.items() if OF[of](name)]
    first = torch.autograd.grad(total, some, create_graph=True, materialize_grads=True)
    penalty = sum(g.square().sum() for g in first)
    every = list(named.values())
    return list(torch.autograd.grad(penalty, every, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("kind", LAYERS)
def test_options(kind, of, bias, bidirectional, layers, packed, request):
    ours, theirs, args = pair_and_leaves(
        kind, bias, bidirectional, layers, packed, request.node.name
    )
    torch.testing.assert_close(*(second_gradients(layer, args, of) for layer in [ours, theirs]))


@pytest.mark.parametrize("loss", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("kind", LAYERS)
def test_loss_of_one_output(kind, loss):
    if loss == "c_n" and not kind.startswith("lstm"):
        pytest.skip("the layer has no c")
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    args = leaves((torch.randn(4, 3, 5, dtype=F64), random_state(theirs, 3)))
    found = [second_gradients(layer, args, loss=loss) for layer in [ours, theirs]]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", LAYERS)
def test_wide_and_long(kind):
    sizes = [(3, 2, 70, 300), (2, 130, 3, 40), (60, 1, 2, 20), (9, 90, 33, 65), (1, 1, 1, 1)]
    for T, B, I, H in affordable(sizes):
        ours, theirs = pair(kind, I, H + (kind == "lstm_proj"), bidirectional=True, dtype=F64)
        args = leaves((torch.randn(T, B, I, dtype=F64), random_state(theirs, B)))
        torch.testing.assert_close(*(second_gradients(layer, args) for layer in [ours, theirs]))


@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, of, bias):
    for H in [1, 16, 33]:
        ours, theirs = cell_pair(kind, 5, H, bias=bias, dtype=F64)
        for batch in [(), (1,), (40,)]:
            args = leaves((torch.randn(*batch, 5, dtype=F64), cell_state(theirs, *batch)))
            found = [second_gradients(cell, args, of) for cell in [ours, theirs]]
            torch.testing.assert_close(*found)


@pytest.mark.once
@pytest.mark.cpu("the kernels are the CPU's")
@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_compute_the_last_derivative_alone(kind):
    """A derivative that may be differentiated itself is of plain PyTorch."""
    layer, _ = pair(kind, 5, 17)
    weights = list(layer.parameters())
    for differentiable in BOTH:
        output, _ = layer(torch.randn(5, 3, 5))
        first = torch.autograd.grad(output.sin().sum(), weights, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            torch.autograd.grad(penalty, weights, create_graph=differentiable)
        calls = [event.name for event in profiled.events()].count("fastrnn::double_backward")
        assert calls == (0 if differentiable else 1)
