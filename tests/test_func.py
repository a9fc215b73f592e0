"""torch.func with layers and cells: all derivatives, and vmap over inputs and weights."""

import collections
import copy
import itertools

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    VIRTUAL,
    cell_pair,
    cell_state,
    device,
    flat,
    host_tensor,
    is_lstm,
    pair,
    ragged,
    random_state,
    slow_after,
)
from test_gradients import CHECKS, as_function
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import ops

pytestmark = [
    pytest.mark.once,
    # Some of torch's decompositions still use torch.jit.script.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

F64 = torch.float64
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
skip_on_virtual_gpu = pytest.mark.skipif(
    VIRTUAL, reason="the virtual GPU's matrix products do not take wrapper tensors without storage"
)


@skip_on_virtual_gpu
@pytest.mark.parametrize("packed", slow_after(1, [False, True]), ids=["padded", "packed"])
@pytest.mark.parametrize("options", CHECKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode(kind, options, packed):
    """Forward mode, and forward over reverse, against finite differences."""
    layer, _ = pair(kind, 2, 3, dtype=F64, **CHECKS[options])
    function, inputs = as_function(layer, packed)
    assert torch.autograd.gradcheck(
        function, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False,
        check_undefined_grad=False,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        function, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=False,
        check_undefined_grad=False,
    )  # fmt: skip


def of_input(layer, packed):
    """The layer as a function of data and states to a tuple of tensors, its data shape, states."""
    sequence = ragged([4, 3, 1], 5, F64)

    def function(data, *states):
        hx = states if is_lstm(layer) else states[0] if states else None
        x = sequence._replace(data=data) if packed else data
        return tuple(flat(layer(x, hx or None) if isinstance(hx, tuple) else layer(x, hx)))

    shape = sequence.data.shape if packed else (4, 3, 5)
    return function, shape, flat(random_state(layer, 3))


class Counting(TorchDispatchMode):
    """Counts the operator calls that reach the kernels, below all torch.func transforms."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def assert_equals_loop(batched, singles):
    """A batched call returns the stacked results of single calls."""
    for result, *single_results in zip(batched, *singles, strict=True):
        torch.testing.assert_close(result, torch.stack(single_results))


@PACKED
@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_inputs_is_one_operator_call(kind, packed):
    layer, _ = pair(kind, 5, 7, num_layers=2, bidirectional=True, dtype=F64)
    function, shape, states = of_input(layer, packed)
    x = torch.randn(6, *shape, dtype=F64)
    with Counting() as counting:
        found = vmap(function, in_dims=(0, *[None] * len(states)))(x, *states)
    assert counting.counts[ops.forward] == 1
    assert_equals_loop(found, [function(data, *states) for data in x])


@PACKED
@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_states_and_any_dim(kind, packed):
    layer, _ = pair(kind, 5, 7, dtype=F64)
    function, shape, states = of_input(layer, packed)
    x = torch.randn(*shape, 4, dtype=F64)
    many = [torch.randn(2, 4, *s.shape, dtype=F64)[1].transpose(0, 1) for s in states]
    dims = (len(shape), *[1] * len(states))
    # The same samples three ways: vmap, a loop, nested vmap.
    found = vmap(function, in_dims=dims)(x, *many)
    each = [function(x[..., v], *(s[:, v] for s in many)) for v in range(4)]
    assert_equals_loop(found, each)
    only_states = vmap(function, in_dims=(None, *dims[1:]))(x[..., 0], *many)
    assert_equals_loop(
        only_states, [function(x[..., 0], *(s[:, v] for s in many)) for v in range(4)]
    )
    nested = vmap(vmap(function, in_dims=dims), in_dims=(-1, *[None] * len(states)))(
        torch.stack([x, -x], -1), *many
    )
    assert_equals_loop([t[0] for t in nested], each)


@pytest.mark.parametrize("kind", LAYERS)
def test_per_sample_gradients(kind):
    layer, theirs = pair(kind, 5, 7, num_layers=2, dtype=F64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 4, 1, 5, dtype=F64)

    def loss(parameters, x):
        return sum(o.sin().sum() for o in flat(functional_call(layer, parameters, (x,))))

    with Counting() as counting:
        found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, x)
    assert counting.counts[ops.forward] == counting.counts[ops.backward] == 1
    for v in range(len(x)):
        data = x[v].clone().requires_grad_()
        inputs = dict(theirs.named_parameters()) | {"x": data}
        total = sum(o.sin().sum() for o in flat(theirs(data)))
        expected = torch.autograd.grad(total, list(inputs.values()))
        each = [*(g[v] for g in found[0].values()), found[1][v]]
        torch.testing.assert_close(each, list(expected))


def assert_bitwise_equal(found, expected):
    """Bitwise equal; on a GPU only close, as cuBLAS's choice of kernel depends on alignment."""
    exact = {} if device() == "cuda" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, expected, **exact)


def ensemble(layers):
    """The layers' stacked parameters, and a function that calls one model with given parameters."""
    states, _ = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def call(parameters, x, *hx):
        hx = hx if len(hx) == 2 else hx[0] if hx else None
        return tuple(flat(functional_call(skeleton, parameters, (x, hx))))

    return states, call


def loss_of(call):
    return lambda *args: sum(o.sin().sum() for o in call(*args))


@PACKED
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "own inputs"])
@pytest.mark.parametrize("kind", LAYERS)
def test_ensemble(kind, shared, packed):
    """One operator call; each model's results and gradients are bitwise those of its own call."""
    options = {"num_layers": 2, "bidirectional": True}
    layers = [pair(kind, 5, 17, **options)[0] for _ in range(5)]
    states, call = ensemble(layers)
    sequence = ragged([4, 3, 1], 5)
    x = torch.randn(5, *(sequence.data.shape if packed else (4, 3, 5)))
    hx = [torch.stack(s) for s in zip(*(flat(random_state(m, 3)) for m in layers), strict=True)]
    inputs = x[0] if shared else x
    dims = (0, None if shared else 0, *[0] * len(hx))

    def of_data(call):
        return lambda p, x, *hx: call(p, sequence._replace(data=x) if packed else x, *hx)

    call = of_data(call)
    own = [
        (dict(m.named_parameters()), inputs if shared else x[e], *(s[e] for s in hx))
        for e, m in enumerate(layers)
    ]
    with torch.no_grad(), Counting() as counting:
        found = vmap(call, dims)(states, inputs, *hx)
    assert counting.counts[ops.forward] == 1
    with torch.no_grad():
        each = [call(*args) for args in own]
        assert_bitwise_equal(list(found), [torch.stack(t) for t in zip(*each, strict=True)])

    # Gradients by torch.func.grad inside the vmap, then by autograd around it.
    detached = {name: p.detach() for name, p in states.items()}
    with Counting() as counting:
        of_weights, *of_states = vmap(grad(loss_of(call), (0, *range(2, 2 + len(hx)))), dims)(
            detached, inputs, *hx
        )
    assert counting.counts[ops.forward] == counting.counts[ops.backward] == 1
    leaves = [s.clone().requires_grad_() for s in hx]
    loss_of(vmap(call, dims))(states, inputs, *leaves).backward()
    for e, (parameters, data, *state) in enumerate(own):
        state = [s.clone().requires_grad_() for s in state]
        loss_of(call)(parameters, data, *state).backward()
        expected = [*(p.grad for p in parameters.values()), *(s.grad for s in state)]
        for stacked in [
            [*of_weights.values(), *of_states],
            [*(p.grad for p in states.values()), *(s.grad for s in leaves)],
        ]:
            assert_bitwise_equal([t[e] for t in stacked], expected)


@pytest.mark.cpu("about CPU threads")
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("hidden", [1, 64, 300])
def test_ensemble_on_threads(hidden, models):
    """Models run in parallel if their weights fit a core's cache, else sequentially."""
    layers = [fastrnn.LSTM(33, hidden) for _ in range(models)]
    states, call = ensemble(layers)
    x = torch.randn(20, 17, 33)
    found = vmap(grad(loss_of(call)), (0, None))({n: p.detach() for n, p in states.items()}, x)
    for e, layer in enumerate(layers):
        loss_of(lambda x, m=layer: flat(m(x)))(x).backward()
        each = {name: g[e] for name, g in found.items()}
        expected = {name: p.grad for name, p in layer.named_parameters()}
        assert_bitwise_equal(each, expected)


@skip_on_virtual_gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_nested_vmap_over_models_and_samples(kind):
    """vmap over models in models, and over samples; second derivatives and tangents."""
    layers = [pair(kind, 5, 3, num_layers=2, dtype=F64)[0] for _ in range(6)]
    states, call = ensemble(layers)
    x = torch.randn(4, 3, 2, 5, dtype=F64)
    states = {name: p.detach() for name, p in states.items()}
    nested = {name: p.unflatten(0, (3, 2)) for name, p in states.items()}
    found = vmap(vmap(call, (0, None)), (0, None))(nested, x[0])
    assert_equals_loop([t.flatten(0, 1) for t in found], [flat(m(x[0])) for m in layers])
    # Samples inside models, and models inside samples.
    gradients = grad(loss_of(call))
    found = vmap(vmap(gradients, (None, 0)), (0, None))(states, x)
    other = vmap(vmap(gradients, (0, None)), (None, 0))(states, x)
    for name in states:
        assert found[name].shape[:2] == (6, 4)
        torch.testing.assert_close(other[name].transpose(0, 1), found[name])
        for e, layer in enumerate(layers):
            for v in range(4):
                one = torch.autograd.grad(
                    loss_of(lambda x, m=layer: flat(m(x)))(x[v]),
                    dict(layer.named_parameters())[name],
                )[0]
                torch.testing.assert_close(found[name][e, v], one)

    def penalty(parameters, x):
        return sum(g.square().sum() for g in gradients(parameters, x).values())

    found = vmap(grad(penalty), (0, None))(states, x[0])
    for e in [0, 5]:
        one = grad(penalty)({name: p[e] for name, p in states.items()}, x[0])
        torch.testing.assert_close({name: g[e] for name, g in found.items()}, one)
    tangents = {name: torch.randn_like(p) for name, p in states.items()}
    _, found = jvp(lambda p: vmap(call, (0, None))(p, x[0]), (states,), (tangents,))
    each = [
        jvp(
            lambda p: call(p, x[0]),
            *(({n: t[e] for n, t in d.items()},) for d in [states, tangents]),
        )
        for e in range(6)
    ]
    assert_equals_loop(found, [tangent for _, tangent in each])


def test_dropout_of_ensemble():
    """randomness="different" draws the models' masks in order; backward uses the same masks."""
    layers = [fastrnn.GRU(5, 17, num_layers=3, dropout=0.5) for _ in range(3)]
    states, call = ensemble(layers)
    x = torch.randn(4, 2, 5)
    detached = {name: p.detach() for name, p in states.items()}
    torch.manual_seed(1)
    found = vmap(grad(loss_of(call)), (0, None), randomness="different")(detached, x)
    torch.manual_seed(1)
    for e, layer in enumerate(layers):
        loss_of(lambda x, m=layer: flat(m(x)))(x).backward()
        each = {name: g[e] for name, g in found.items()}
        expected = {name: p.grad for name, p in layer.named_parameters()}
        assert_bitwise_equal(each, expected)
    torch.manual_seed(1)
    same = vmap(call, (0, None), randomness="same")(states, x)
    for e, layer in enumerate(layers):
        torch.manual_seed(1)
        assert_bitwise_equal([t[e] for t in same], flat(layer(x)))


@skip_on_virtual_gpu
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    cells = [cell_pair(kind, 5, 7, dtype=F64)[0] for _ in range(3)]
    x, hx = torch.randn(3, 2, 5, dtype=F64), cell_state(cells[0], 3, 2)
    hx = hx if isinstance(hx, tuple) else (hx,)

    def call(parameters, x, *hx):
        state = hx if len(hx) == 2 else hx[0]
        return tuple(flat(functional_call(cells[0], parameters, (x, state))))

    own = dict(cells[0].named_parameters())
    dims = (None, 0, *[0] * len(hx))
    with torch.no_grad():
        each = [call(own, x[v], *(s[v] for s in hx)) for v in range(3)]
        assert_equals_loop(vmap(call, dims)(own, x, *hx), each)
        states, _ = stack_module_state(cells)
        each = [
            call(dict(c.named_parameters()), x[v], *(s[v] for s in hx)) for v, c in enumerate(cells)
        ]
        assert_equals_loop(vmap(call)(states, x, *hx), each)
    primals, tangents = (x, *hx), [torch.randn_like(t) for t in (x, *hx)]

    def function(*args):
        return call(own, *args)

    batched = vmap(function)
    _, forward = jvp(batched, primals, tuple(tangents))
    outputs, pull = vjp(batched, *primals)
    cotangents = tuple(torch.randn_like(o) for o in outputs)
    # <J t, w> = <t, J^T w>
    left = sum((f * w).sum() for f, w in zip(forward, cotangents, strict=True))
    right = sum((t * g).sum() for t, g in zip(tangents, pull(cotangents), strict=True))
    torch.testing.assert_close(left, right)


@skip_on_virtual_gpu
@PACKED
@pytest.mark.parametrize("kind", LAYERS)
def test_jacobians_and_hessians(kind, packed):
    layer, theirs = pair(kind, 5, 2, dtype=F64)
    (ours, shape, _), (torchs, *_) = of_input(layer, packed), of_input(theirs, packed)
    x = torch.randn(shape, dtype=F64)
    expected = torch.autograd.functional.jacobian(torchs, x)
    torch.testing.assert_close(jacrev(ours)(x), expected)
    torch.testing.assert_close(jacfwd(ours)(x), expected)

    def total(function):
        return lambda x: sum(o.sin().sum() for o in function(x))

    expected = torch.autograd.functional.hessian(total(torchs), x)
    for outer, inner in itertools.product([jacfwd, jacrev], repeat=2):
        torch.testing.assert_close(outer(inner(total(ours)))(x), expected)


@skip_on_virtual_gpu
def test_hessian_of_weights():
    layer, theirs = pair("gru", 2, 2, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64)

    def loss(module):
        return lambda w: functional_call(module, {"weight_hh_l0": w}, (x,))[0].sin().sum()

    w = layer.weight_hh_l0.detach()
    expected = torch.autograd.functional.hessian(loss(theirs), w)
    torch.testing.assert_close(hessian(loss(layer))(w), expected)


# ---- torch._vmap_internals, the legacy vmap ------------------------------------------------------


@PACKED
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"dropout": 0.5}])
@pytest.mark.parametrize("kind", LAYERS)
def test_batched_grads(kind, options, packed):
    """torch.autograd.grad(is_grads_batched=True), for subsets of the outputs and of the inputs."""
    layer, _ = pair(kind, 5, 7, num_layers=2, bidirectional=True, dtype=F64)
    layer.dropout, layer.recompute = options.get("dropout", 0.0), "recompute" in options
    function, shape, states = of_input(layer, packed)
    arguments = [t.requires_grad_() for t in [torch.randn(shape, dtype=F64), *states]]
    outputs = function(*arguments)
    for some in [outputs, outputs[:1], outputs[1:]]:
        many = [torch.randn(6, *o.shape, dtype=F64) for o in some]
        for inputs in [arguments, [*arguments, *layer.parameters()]]:
            keep = {"retain_graph": True}
            with Counting() as counting:
                found = torch.autograd.grad(some, inputs, many, is_grads_batched=True, **keep)
            assert counting.counts[ops.backward] == 1
            each = [
                torch.autograd.grad(some, inputs, list(g), **keep) for g in zip(*many, strict=True)
            ]
            assert_equals_loop(found, each)


@skip_on_virtual_gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_vectorized_derivatives(kind):
    """torch.autograd.functional with vectorize=True, against torch's layer without it."""
    layer, theirs = pair(kind, 5, 2, dtype=F64)
    (ours, shape, _), (torchs, *_) = of_input(layer, False), of_input(theirs, False)
    x = torch.randn(shape, dtype=F64)
    functional = torch.autograd.functional
    for strategy in ["reverse-mode", "forward-mode"]:
        found = functional.jacobian(ours, x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(found, functional.jacobian(torchs, x))

        def total(function):
            return lambda x: sum(o.sin().sum() for o in function(x))

        found = functional.hessian(total(ours), x, vectorize=True, outer_jacobian_strategy=strategy)
        torch.testing.assert_close(found, functional.hessian(total(torchs), x))


def test_nested_legacy_vmap():
    layer, _ = pair("gru", 5, 7, dtype=F64)
    x = torch.randn(4, 3, 5, dtype=F64, requires_grad=True)
    output, _ = layer(x)
    v = torch.randn(2, 6, *output.shape, dtype=F64)
    inputs = [x, *layer.parameters()]

    def pulled(v):
        return torch.autograd.grad(output, inputs, v, retain_graph=True)

    for grads in [v, v.transpose(0, 1)]:
        found = torch._vmap_internals._vmap(torch._vmap_internals._vmap(pulled))(grads)
        each = [pulled(g) for g in grads.flatten(0, 1)]
        assert_equals_loop([t.flatten(0, 1) for t in found], each)


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_under_vmap():
    layer = fastrnn.GRU(5, 17, num_layers=2, dropout=0.5)
    x = torch.randn(4, 3, 5).expand(3, 4, 3, 5)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(layer)(x)
    different, _ = vmap(layer, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    torch.manual_seed(1)
    same, _ = vmap(layer, randomness="same")(x)
    torch.manual_seed(1)
    expected, _ = layer(x[0])
    for one in same:
        assert_bitwise_equal(one, expected)
    after = torch.rand(1)
    torch.manual_seed(1)
    layer(x[0])
    assert torch.equal(after, torch.rand(1))
    assert vmap(layer.eval())(x)[0].shape == (3, 4, 3, 17)


def test_gradients_of_dropout_under_vmap():
    """Backward uses the dropout masks that forward drew for each sample."""
    layer = fastrnn.RNN(5, 17, num_layers=2, dropout=0.5, nonlinearity="relu", dtype=F64)
    x = torch.randn(6, 4, 1, 5, dtype=F64)

    def results(x):
        output, pull = vjp(lambda x: layer(x)[0], x)
        return output, pull(output)[0]

    output, back = vmap(results, randomness="different")(x)
    # Without biases a ReLU network is piecewise linear: J x = y, so x . (J^T y) = y . y.
    for name, p in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(p)
    output, back = vmap(results, randomness="different")(x)
    torch.testing.assert_close((x * back).sum((1, 2, 3)), output.square().sum((1, 2, 3)))


def test_vmap_over_batch_sizes_raises():
    layer = fastrnn.GRU(5, 17)
    data, sizes = torch.randn(2, 3, 5), host_tensor([[2, 1], [2, 1]])

    def call(data, sizes):
        return layer(PackedSequence(data, sizes))[0].data

    with pytest.raises(RuntimeError, match="vmap"):
        vmap(call)(data, sizes)


def test_tensor_that_escaped_its_vmap():
    """The same error as from torch's own operators."""
    escaped = []
    vmap(lambda x: escaped.append(x) or x)(torch.randn(2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="escaped from inside a function being vmapped"):
        escaped[0].cos()
    weights = list(fastrnn.LSTM(5, 6).parameters())
    state = torch.zeros(1, 4, 6)
    with pytest.raises(RuntimeError, match="escaped from inside a function being vmapped"):
        ops.forward(
            "lstm",
            escaped[0],
            state,
            state,
            weights,
            None,
            True,
            1,
            False,
            0.0,
            False,
            False,
            False,
        )
