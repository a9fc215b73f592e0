"""The operators in torch.library: schemas, fake kernels, opcheck, tracing."""

import itertools

import pytest
import torch
from helpers import LAYERS, host_tensor, pair
from helpers import OPERATOR_CELLS as CELLS

import fastrnn
from fastrnn import ops

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sample(
    cell, *, packed=False, L=1, D=1, P=0, bias=True, dropout=0.0, states=False, train=False,
    dtype=None,
):  # fmt: skip
    """Arguments of the operator `forward`, without the last one, `keep`."""
    T, B, I, H = 4, 3, 5, 17
    G, R = CELLS[cell]["gates"], P or H
    sizes = host_tensor([3, 3, 2, 1]) if packed else None
    weights = []
    for layer in range(L):
        for _ in range(D):
            shapes = [(G * H, I if layer == 0 else D * R), (G * H, R)]
            shapes += [(G * H,)] * (2 * bias) + [(P, H)] * (P > 0)
            weights += [torch.rand(s) - 0.5 for s in shapes]
    x = torch.randn((9, I) if packed else (T, B, I))
    h0 = torch.randn(L * D, B, R)
    c0 = torch.randn(L * D, B, H) if CELLS[cell]["states"] == 2 else None
    x, h0, *weights = (t.to(dtype or torch.float32) for t in (x, h0, *weights))
    c0 = c0 if c0 is None else c0.to(x.dtype)
    return cell, x, h0, c0, weights, sizes, bias, L, D == 2, dropout, states, train


def stack_models(arguments, models=2):
    """The same arguments stacked for several models, as under vmap."""
    stacked = [
        [torch.stack([t] * models) for t in a] if isinstance(a, list)
        else torch.stack([a] * models) if isinstance(a, torch.Tensor) and a.dtype != torch.int64
        else a
        for a in arguments
    ]  # fmt: skip
    return tuple(stacked)


def samples():
    for cell, packed in itertools.product(CELLS, [False, True]):
        yield sample(cell, packed=packed)
        yield sample(cell, packed=packed, L=2, D=2, dropout=0.5, train=True)
        yield sample(cell, packed=packed, bias=False, dtype=torch.bfloat16)
        yield sample(cell, packed=packed, dtype=torch.float64)
        if CELLS[cell]["allows_projection"]:
            yield sample(cell, packed=packed, L=2, D=2, P=3)
            yield sample(cell, packed=packed, L=2, D=2, P=3, states=True)
        yield stack_models(sample(cell, packed=packed, L=2, D=2, dropout=0.5, train=True))
        yield stack_models(sample(cell, packed=packed, bias=False, dtype=torch.bfloat16))


def backward_arguments(arguments, wanted=True):
    cell, x, h0, c0, weights, sizes, bias, L, bidirectional, dropout, states, _ = arguments
    output, h_n, c_n, *kept = ops.forward(*arguments, True)
    grads = [torch.randn_like(output), torch.randn_like(h_n)]
    grads.append(None if c0 is None else torch.randn_like(c_n))
    flags = [wanted] * (3 + len(weights))
    network = (bias, L, bidirectional, dropout, states)
    return cell, *grads, x, h0, c0, weights, sizes, *network, *kept, flags


UTILITIES = [
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
]


@pytest.mark.once
@pytest.mark.parametrize(
    ("cell", "packed"),
    [
        pytest.param(c, packed, marks=[] if c == "lstm" and not packed else pytest.mark.slow)
        for c, packed in itertools.product(CELLS, [False, True])
    ],
)
def test_opcheck(cell, packed):
    """All of opcheck's tests on all samples; with dropout each run starts from the same seed."""
    for arguments in samples():
        if arguments[0] == cell and (arguments[5] is not None) == packed:
            for keep in [False, True]:
                torch.library.opcheck(ops.forward, (*arguments, keep), test_utils=UTILITIES)
            backward = backward_arguments(arguments)
            torch.library.opcheck(ops.backward, backward, test_utils=UTILITIES)


def properties(tensors):
    flat = [t for item in tensors for t in (item if isinstance(item, list) else [item])]
    return [(t.shape, t.dtype, t.stride()) for t in flat]


def to_meta(arguments):
    def move(a):
        if isinstance(a, list):
            return [move(b) for b in a]
        # batch_sizes stay on the CPU, as in a PackedSequence.
        return a.to("meta") if isinstance(a, torch.Tensor) and a.dtype != torch.int64 else a

    return [move(a) for a in arguments]


@pytest.mark.once
@pytest.mark.parametrize("wanted", [True, False])
def test_fake_kernels_return_shapes_dtypes_and_strides(wanted):
    for arguments in samples():
        for keep in [False, True]:
            real = ops.forward(*arguments, keep)
            assert properties(real) == properties(ops.forward(*to_meta(arguments), keep))
        arguments = backward_arguments(arguments, wanted)
        meta = to_meta(arguments)
        assert properties(ops.backward(*arguments)) == properties(ops.backward(*meta))


@pytest.mark.once
@pytest.mark.parametrize("i", [1, 2, 3, 14, 15, 16, 17])
def test_backward_checks_the_number_of_models(i):
    args = stack_models(sample("lstm", L=2, dropout=0.5, train=True), 3)
    arguments = list(backward_arguments(args))
    arguments[i] = arguments[i][1:]
    with pytest.raises(RuntimeError, match="of 3 models"):
        ops.backward(*arguments)


#: what is wrong -> a function from the named arguments to the ones to replace
WRONG = {
    "cell": lambda a: {"cell": "mgu"},
    "one state": lambda a: {"c0": None},
    "dtype of the input": lambda a: {"input": a["input"].double()},
    "dtype of a state": lambda a: {"c0": a["c0"].half()},
    "dtype of a weight": lambda a: {"weights": [*a["weights"][:-1], a["weights"][-1].half()]},
    "dtype of all": lambda a: {
        name: [t.int() for t in a[name]] if name == "weights" else a[name].int()
        for name in ["input", "h0", "c0", "weights"]
    },
    "dimensions of the input": lambda a: {"input": a["input"][0]},
    "dimensions of h0": lambda a: {"h0": a["h0"][0]},
    "dimensions of c0": lambda a: {"c0": a["c0"][0]},
    "width of the input": lambda a: {"input": a["input"][..., :-1]},
    "no steps": lambda a: {"input": a["input"][:0]},
    "batch of the states": lambda a: {"h0": a["h0"][:, 1:], "c0": a["c0"][:, 1:]},
    "batch of c0": lambda a: {"c0": a["c0"][:, 1:]},
    "width of h0": lambda a: {"h0": a["h0"][..., 1:]},
    "states of a layer": lambda a: {"h0": a["h0"][1:], "c0": a["c0"][1:]},
    "num_layers": lambda a: {"num_layers": 3},
    "no num_layers": lambda a: {"num_layers": 0},
    "bidirectional": lambda a: {"bidirectional": False},
    "has_biases": lambda a: {"has_biases": False},
    "a weight too few": lambda a: {"weights": a["weights"][:-1]},
    "no weights": lambda a: {"weights": []},
    "rows of weight_ih": lambda a: {"weights": [a["weights"][0][1:], *a["weights"][1:]]},
    "columns of weight_hh": lambda a: {
        "weights": [a["weights"][0], a["weights"][1][:, 1:], *a["weights"][2:]]
    },
    "a bias": lambda a: {"weights": [*a["weights"][:-1], a["weights"][-1][1:]]},
    "dropout": lambda a: {"dropout": 1.5},
}
NAMES = ["cell", "input", "h0", "c0", "weights", "batch_sizes", "has_biases", "num_layers"]
NAMES += ["bidirectional", "dropout", "return_states", "train"]


#: The same for the arguments of three stacked models.
WRONG_OF_MODELS = {
    "models of the input": lambda a: {"input": a["input"][1:]},
    "models of h0": lambda a: {"h0": a["h0"][0]},
    "models of c0": lambda a: {"c0": a["c0"][:2]},
    "models of a bias": lambda a: {"weights": [*a["weights"][:-1], a["weights"][-1][0]]},
    "models of a weight": lambda a: {
        "weights": [*a["weights"][:5], a["weights"][5][:1], *a["weights"][6:]]
    },
    "no models": lambda a: {"weights": [w[:0] for w in a["weights"]]},
}
WRONG |= WRONG_OF_MODELS


@pytest.mark.once
@pytest.mark.parametrize("wrong", WRONG)
def test_fake_kernels_raise_as_the_kernels_do(wrong):
    """The same exception type from the kernel, the fake kernel and backward's fake kernel."""
    args = sample("lstm", L=2, D=2)
    args = stack_models(args, 3) if wrong in WRONG_OF_MODELS else args
    arguments = dict(zip(NAMES, args, strict=True))
    backward = backward_arguments(tuple(arguments.values()))
    arguments |= WRONG[wrong](arguments)
    args = list(arguments.values())
    raised = []
    for call in [
        lambda: ops.forward(*args, False),
        lambda: ops.forward(*to_meta(args), False),
        lambda: ops.backward(
            *to_meta([args[0], *backward[1:4], *args[1:-1], *backward[14:18]]),
            [True] * (3 + len(args[4])),
        ),
    ]:
        with pytest.raises((RuntimeError, ValueError)) as error:
            call()
        raised.append(error.type)
    assert raised == [raised[0]] * 3


@pytest.mark.once
@pytest.mark.parametrize("wrong", ["grad_output", "grad_h_n", "grad_c_n", "dtype", "wanted"])
def test_fake_backward_rejects_wrong_gradients(wrong):
    arguments = list(backward_arguments(sample("lstm")))
    if wrong == "wanted":
        arguments[18] = arguments[18][1:]
    elif wrong == "dtype":
        arguments[1] = arguments[1].double()
    else:
        i = ["grad_output", "grad_h_n", "grad_c_n"].index(wrong) + 1
        arguments[i] = arguments[i][..., 1:]
    for args in [arguments, to_meta(arguments)]:
        with pytest.raises((RuntimeError, ValueError), match=wrong if wrong != "dtype" else None):
            ops.backward(*args)


@pytest.mark.once
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layer_on_meta(name):
    layer = getattr(fastrnn, name)(3, 4, num_layers=2, bidirectional=True, device="meta")
    output, _ = layer(torch.empty(5, 2, 3, device="meta"))
    assert output.is_meta
    assert output.shape == (5, 2, 8)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu"])
def test_module_calls_the_operator_once(kind):
    """A call of the operator returns what the module returns, and the module calls it once."""
    ours, _ = pair(kind, 5, 17, num_layers=3, bidirectional=True)
    x = torch.randn(4, 3, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output, _ = ours(x)
        output.sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastrnn::forward"] == 1
    assert calls["fastrnn::backward"] == 1
    h0 = torch.zeros(6, 3, ours.proj_size or 17)
    c0 = torch.zeros(6, 3, 17) if kind.startswith("lstm") else None
    cell = kind.removesuffix("_proj")
    weights = [w.detach() for w in ours._flat_weights]
    direct = ops.forward(cell, x, h0, c0, weights, None, True, 3, True, 0.0, False, False, False)
    assert torch.equal(direct[0], output)


@pytest.mark.once
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell in LAYERS])
def test_operators_are_differentiable(cell):
    """First and second derivatives of the operator equal the module's."""
    ours, _ = pair(cell, 5, 17)
    x = torch.randn(4, 3, 5, requires_grad=True)
    h0 = torch.zeros(1, 3, 17)
    c0 = torch.zeros_like(h0) if CELLS[cell]["states"] == 2 else None
    found = []
    for output in [
        ours(x)[0],
        ops.forward(
            cell, x, h0, c0, ours._flat_weights, None, True, 1, False, 0.0, False, False, False
        )[0],
    ]:
        inputs = [x, *ours.parameters()]
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
