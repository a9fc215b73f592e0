"""Gradients of fastrnn's layers and cells against torch's, and against finite differences."""

import copy

import pytest
import torch
from helpers import (
    CELLS,
    FULL,
    LAYERS,
    VIRTUAL,
    cell_pair,
    cell_state,
    flat,
    gradients,
    is_lstm,
    leaves,
    mapped,
    pair,
    ragged,
    random_state,
    some_sizes,
)
from torch.nn.utils.rnn import PackedSequence

F64 = torch.float64
BOTH = [False, True]


def losses(kind):
    """Which of output, h_n and c_n a loss uses."""
    return ["all", "output", "h_n", *(["c_n"] if kind.startswith("lstm") else [])]


KINDS_AND_LOSSES = [(kind, loss) for kind in LAYERS for loss in losses(kind)]


def outputs_of(result, loss):
    """The outputs that the loss uses."""
    tensors = flat(result)
    return tensors if loss == "all" else [tensors[["output", "h_n", "c_n"].index(loss)]]


def arguments(layer, packed, T, B, I):
    dtype = next(layer.parameters()).dtype
    if packed:
        lengths = [1 + (3 * b + T) % T for b in range(B)]
        x = ragged(lengths, I, dtype)
    else:
        x = torch.randn(*((B, T, I) if layer.batch_first else (T, B, I)), dtype=dtype)
    return leaves(x), leaves(random_state(layer, B))


def assert_same_gradients(ours, theirs, args, loss="all"):
    found = gradients(outputs_of(ours(*args), loss), [*flat(args), *ours.parameters()])
    expected = gradients(outputs_of(theirs(*args), loss), [*flat(args), *theirs.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    torch.testing.assert_close(found, expected)


# ---- against torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize(("kind", "loss"), KINDS_AND_LOSSES)
def test_options(kind, loss, bias, bidirectional, layers, packed, request):
    T, B, I, H = some_sizes(request.node.name)
    ours, theirs = pair(
        kind, I, H + (kind == "lstm_proj"), bias=bias, bidirectional=bidirectional,
        num_layers=layers, batch_first=H % 2 == 1, dtype=F64,
    )  # fmt: skip
    assert_same_gradients(ours, theirs, arguments(theirs, packed, T, B, I), loss)


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_sizes(kind, dtype):
    for H in [1, 2, 15, 16, 17, 33, 64, 65]:
        for I in [1, 5, 33]:
            ours, theirs = pair(kind, I, H + (kind == "lstm_proj"), dtype=dtype)
            for B in [1, 3, 8, 17]:
                for T in [1, 2, 7] if H < 20 else [3]:
                    assert_same_gradients(ours, theirs, arguments(theirs, False, T, B, I))


@pytest.mark.parametrize("kind", LAYERS)
def test_wide_and_long(kind):
    for T, B, I, H in [(3, 2, 70, 300), (2, 130, 3, 40), (60, 1, 2, 20)]:
        ours, theirs = pair(kind, I, H, bidirectional=True, dtype=F64)
        assert_same_gradients(ours, theirs, arguments(theirs, False, T, B, I))


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout(kind, bidirectional, p, packed):
    ours, theirs = pair(
        kind, 5, 17, num_layers=3, dropout=p, bidirectional=bidirectional, dtype=F64
    )
    args = arguments(theirs, packed, 6, 4, 5)
    results = []
    for layer in [ours, theirs]:
        torch.manual_seed(7)
        results.append(gradients(layer(*args), [*flat(args), *layer.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_and_without_states(kind):
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    for x in [torch.randn(4, 5, dtype=F64), torch.randn(4, 3, 5, dtype=F64)]:
        assert_same_gradients(ours, theirs, (leaves(x),))
    x, state = leaves(torch.randn(4, 5, dtype=F64)), leaves(random_state(theirs))
    assert_same_gradients(ours, theirs, (x, state))


@pytest.mark.parametrize("kind", LAYERS)
def test_strides(kind):
    """Strided inputs, states, weights and incoming gradients."""
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    results = []
    for layer in [ours, theirs]:
        layer = copy.deepcopy(layer)
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(p.detach().repeat_interleave(2, -1)[..., ::2]))
        torch.manual_seed(0)
        x = leaves(torch.randn(3, 4, 5, dtype=F64)).transpose(0, 1)
        state = mapped(random_state(theirs, 1), lambda t: t.requires_grad_().expand(-1, 3, -1))
        output, *states = flat(layer(x, state))
        # The gradient of sum() has stride 0, that of a slice is mostly zeros.
        loss = output.sum() + output[1:, :, ::3].pow(2).sum()
        loss = loss + sum((t.transpose(0, 2) * 0.5).sum() for t in states)
        inputs = [x, *flat(state), *layer.parameters()]
        results.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*results)


def test_shared_tensors():
    """One tensor as h0 and c0, weights shared by both directions: the gradients add up."""
    ours, theirs = pair("lstm", 5, 17, bidirectional=True, dtype=F64)
    for layer in [ours, theirs]:
        for name in ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]:
            setattr(layer, f"{name}_l0_reverse", getattr(layer, f"{name}_l0"))
    assert len(list(ours.parameters())) == 4
    h = leaves(torch.randn(2, 3, 17, dtype=F64))
    assert_same_gradients(ours, theirs, (leaves(torch.randn(4, 3, 5, dtype=F64)), (h, h)))


@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias):
    for dtype in FULL:
        for H in [1, 16, 17, 33]:
            ours, theirs = cell_pair(kind, 5, H, bias=bias, dtype=dtype)
            for batch in [(), (1,), (3,), (17,)]:
                x = leaves(torch.randn(*batch, 5, dtype=dtype))
                state = leaves(cell_state(theirs, *batch))
                assert_same_gradients(ours, theirs, (x, state))
                assert_same_gradients(ours, theirs, (x,))
                if is_lstm(theirs):
                    for i in range(2):  # a loss of h alone, of c alone
                        inputs = [x, *flat(state)]
                        found = gradients(ours(x, state)[i], [*inputs, *ours.parameters()])
                        expected = gradients(theirs(x, state)[i], [*inputs, *theirs.parameters()])
                        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", CELLS)
def test_loop_over_cell(kind):
    """Backpropagation through time over a cell's steps, with one detached state."""
    ours, theirs = cell_pair(kind, 5, 17, dtype=F64)
    x = leaves(torch.randn(6, 3, 5, dtype=F64))
    results = []
    for cell in [ours, theirs]:
        state, outputs = None, []
        for t in range(6):
            state = cell(x[t], state)
            outputs.append(flat(state)[0])
            if t == 2:
                state = mapped(state, torch.Tensor.detach)
        results.append(gradients(outputs, [x, *cell.parameters()]))
    torch.testing.assert_close(*results)


# ---- subsets of requires_grad, grad modes --------------------------------------------------------
# These test autograd around the kernels, so one instruction set is enough.

#: subset -> whether a tensor of this name requires grad
REQUIRES_GRAD = {
    "nothing": lambda name: False,
    "input": lambda name: name == "input",
    "states": lambda name: name in ("h0", "c0"),
    "c0": lambda name: name == "c0",
    "weight_hh": lambda name: name.startswith("weight_hh"),
    "weight_ih": lambda name: name.startswith("weight_ih"),
    "biases": lambda name: name.startswith("bias"),
    "one_bias": lambda name: name == "bias_ih_l0",
    "last_layer": lambda name: "_l1" in name,
    "first_layer": lambda name: "_l0" in name,
    "all_but_input": lambda name: name != "input",
    "all_but_weights": lambda name: "_l" not in name,
}


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("kind", "subset"),
    [(k, s) for k in LAYERS for s in REQUIRES_GRAD if s != "c0" or k.startswith("lstm")],
)
def test_some_require_grad(kind, subset, packed):
    requires_grad = REQUIRES_GRAD[subset]
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    x, state = arguments(theirs, packed, 4, 3, 5)
    inputs = dict(zip(["input", "h0", "c0"], [*flat(x), *flat(state)], strict=False))
    results = []
    for layer in [ours, theirs]:
        named = {**inputs, **dict(layer.named_parameters())}
        for name, t in named.items():
            t.grad = None
            t.requires_grad_(requires_grad(name))
        outputs = flat(layer(x, state))
        assert [o.requires_grad for o in outputs] == [any(map(requires_grad, named))] * len(outputs)
        if any(map(requires_grad, named)):
            sum(
                ((i + 1) * o.sin().sum() for i, o in enumerate(outputs)), torch.zeros(())
            ).backward()
        results.append([t.grad for t in named.values()])
        assert [g is not None for g in results[-1]] == [requires_grad(name) for name in named]
    for a, b in zip(*results, strict=True):
        assert a is None or torch.equal(torch.isfinite(a), torch.isfinite(b))
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYERS)
def test_backward_in_eval_mode(kind):
    ours, theirs = pair(kind, 5, 17, num_layers=2, dropout=0.5, dtype=F64)
    assert_same_gradients(ours.eval(), theirs.eval(), arguments(theirs, False, 4, 3, 5))


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYERS)
def test_retain_graph(kind):
    """Three backward passes of a retained graph give equal gradients; a freed graph raises."""
    ours, _ = pair(kind, 5, 17, num_layers=2, dropout=0.5, bidirectional=True, dtype=F64)
    x, state = arguments(ours, False, 4, 3, 5)
    inputs = [x, *flat(state), *ours.parameters()]
    loss = sum(o.sin().sum() for o in flat(ours(x, state)))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    loss.backward()
    for t, a, b in zip(inputs, first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, t.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYERS)
def test_grad_accumulates(kind):
    ours, theirs = pair(kind, 5, 17, dtype=F64)
    for layer in [ours, theirs]:
        torch.manual_seed(1)
        for _ in range(3):
            flat(layer(torch.randn(4, 3, 5, dtype=F64)))[0].sum().backward()
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()]
    )


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_grad_and_inference_mode(kind, packed):
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    args = arguments(theirs, packed, 4, 3, 5)
    expected = flat(theirs(*args))
    with torch.no_grad():
        results = flat(ours(*args))
    assert not any(t.requires_grad for t in results)
    torch.testing.assert_close(results, expected)
    with torch.inference_mode():
        results = flat(ours(*args))
        # Weights and states created here are inference tensors, too.
        inside = flat(copy.deepcopy(ours)(*mapped(args, torch.clone)))
    assert all(t.is_inference() and not t.requires_grad for t in results)
    torch.testing.assert_close([*results, *inside], [*expected, *expected])


@pytest.mark.once
@pytest.mark.parametrize("kind", CELLS)
def test_no_grad_and_inference_mode_of_cells(kind):
    ours, theirs = cell_pair(kind, 5, 17, dtype=F64)
    x, state = torch.randn(3, 5, dtype=F64), cell_state(theirs, 3)
    with torch.no_grad():
        results = flat(ours(x, state))
    with torch.inference_mode():
        results += flat(ours(x, state))
    assert not any(t.requires_grad for t in results)
    torch.testing.assert_close(results, flat(theirs(x, state)) * 2)


# ---- changes between forward and backward --------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            (k, n)
            for k in LAYERS
            for n in ["weight_hh_l0", "weight_hh_l1", "weight_ih_l1", "input"]
        ),
        ("lstm_proj", "weight_hr_l0"),
    ],
)
def test_changed_before_backward(kind, name):
    """A saved tensor changed in place before backward raises, as with torch's layers."""
    for layer in pair(kind, 5, 17, num_layers=2, dtype=F64):
        x = leaves(torch.randn(4, 3, 5, dtype=F64))
        loss = sum(o.sum() for o in flat(layer(x)))
        with torch.no_grad():
            (x if name == "input" else getattr(layer, name)).mul_(1.5)
        with pytest.raises(RuntimeError, match=r"modified (by an )?in-?place"):
            loss.backward()


@pytest.mark.once
@pytest.mark.parametrize("name", ["weight_hh", "input", "h0"])
@pytest.mark.parametrize("kind", CELLS)
def test_changed_before_backward_of_cells(kind, name):
    for cell in cell_pair(kind, 5, 17, dtype=F64):
        x, state = leaves(torch.randn(3, 5, dtype=F64)), leaves(cell_state(cell, 3))
        loss = sum(o.sum() for o in flat(cell(x, state)))
        changed = {"input": x, "h0": flat(state)[0], "weight_hh": cell.weight_hh}[name]
        with torch.no_grad():
            changed.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"modified (by an )?in-?place"):
            loss.backward()


@pytest.mark.once
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("kind", "which"), [kl for kl in KINDS_AND_LOSSES if kl[1] != "all"])
def test_output_changed_before_backward(kind, which, layers):
    """The user may change outputs in place, as nn.ReLU(inplace=True) after the layer does.

    torch's float64 layers allow it; its float32 LSTM, which saves its output, raises.
    """
    ours, theirs = pair(kind, 5, 17, num_layers=layers, dtype=F64)
    args = arguments(theirs, False, 4, 3, 5)
    results = []
    for layer in [theirs, ours]:
        outputs = flat(layer(*args))
        for tensor in outputs_of(outputs, which):
            tensor.mul_(0.5).relu_()
        results.append(gradients(outputs, [*flat(args), *layer.parameters()]))
    torch.testing.assert_close(*results)


# ---- against finite differences ------------------------------------------------------------------

CHECKS = {
    "plain": {},
    "nobias": {"bias": False},
    "two_layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "both": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "bidirectional": True, "dropout": 0.4},
}


def as_function(layer, packed, T=3, B=2):
    """The layer as a function of its inputs, states and weights, and those tensors."""
    x, state = arguments(layer, packed, T, B, layer.input_size)
    tensors = [*flat(x), *flat(state)]
    names = [name for name, _ in layer.named_parameters()]

    def function(*args):
        data, states, weights = args[0], args[1 : len(tensors)], args[len(tensors) :]
        hx = tuple(states) if is_lstm(layer) else states[0]
        argument = x._replace(data=data) if isinstance(x, PackedSequence) else data
        torch.manual_seed(3)  # the same dropout masks in every evaluation
        result = torch.func.functional_call(
            layer, dict(zip(names, weights, strict=True)), (argument, hx)
        )
        return tuple(flat(result))

    return function, [*tensors, *layer.parameters()]


@pytest.mark.once  # the comparison with torch, run under each instruction set, is stricter
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("options", CHECKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck(kind, options, packed):
    ours, _ = pair(kind, 2, 3, dtype=F64, **CHECKS[options])
    # The full Jacobian where that is quick, else random directions (fast_mode).
    fast = ours.num_layers > 1
    assert torch.autograd.gradcheck(*as_function(ours, packed), fast_mode=fast)


# On a GPU the second derivative is computed by reference.py, with hundreds of torch operators. The
# virtual GPU is slow at those.
@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("options", ["nobias", "dropout"] if VIRTUAL else CHECKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradgradcheck(kind, options, packed):
    ours, _ = pair(kind, 2, 3, dtype=F64, **CHECKS[options])
    assert torch.autograd.gradgradcheck(*as_function(ours, packed), fast_mode=True)


@pytest.mark.once
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_gradcheck_of_cells(kind, bias):
    ours, _ = cell_pair(kind, 2, 3, bias=bias, dtype=F64)
    x, state = leaves(torch.randn(2, 2, dtype=F64)), leaves(cell_state(ours, 2))
    names = [name for name, _ in ours.named_parameters()]

    def function(data, *rest):
        n = len(flat(state))
        hx = tuple(rest[:n]) if n == 2 else rest[0]
        weights = dict(zip(names, rest[n:], strict=True))
        return tuple(flat(torch.func.functional_call(ours, weights, (data, hx))))

    inputs = [x, *flat(state), *ours.parameters()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_second_gradients_are_torchs(kind, packed):
    """A gradient penalty: the loss contains the squared norm of the gradient."""
    ours, theirs = pair(kind, 5, 6, num_layers=2, bidirectional=True, dtype=F64)
    x, state = arguments(theirs, packed, 4, 3, 5)
    results = []
    for layer in [ours, theirs]:
        inputs = [*flat(x), *flat(state), *layer.parameters()]
        loss = sum(o.sin().sum() for o in flat(layer(x, state)))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in first)
        results.append(torch.autograd.grad(loss + penalty, inputs))
    torch.testing.assert_close(*results)
