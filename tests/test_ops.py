"""The operators as torch.library sees them: schemas, fake kernels, tracing."""

import itertools

import pytest
import torch
from helpers import host_tensor, pair

import fastrnn
from fastrnn import ops

CELLS = fastrnn.CELLS
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sample(cell, *, packed=False, L=1, D=1, P=0, bias=True, dropout=0.0, train=False, dtype=None):
    """The arguments of forward, without `keep`."""
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
    return cell, x, h0, c0, weights, sizes, bias, L, D == 2, dropout, train


def samples():
    for cell, packed in itertools.product(CELLS, [False, True]):
        yield sample(cell, packed=packed)
        yield sample(cell, packed=packed, L=2, D=2, dropout=0.5, train=True)
        yield sample(cell, packed=packed, bias=False, dtype=torch.bfloat16)
        yield sample(cell, packed=packed, dtype=torch.float64)
        if CELLS[cell]["allows_projection"]:
            yield sample(cell, packed=packed, L=2, D=2, P=3)


def backward_arguments(arguments, wanted=True):
    cell, x, h0, c0, weights, sizes, bias, L, bidirectional, dropout, _ = arguments
    output, h_n, c_n, *kept = ops.forward(*arguments, True)
    grads = [torch.randn_like(output), torch.randn_like(h_n)]
    grads.append(None if c0 is None else torch.randn_like(c_n))
    flags = [wanted] * (3 + len(weights))
    network = (bias, L, bidirectional, dropout)
    return cell, *grads, x, h0, c0, weights, sizes, *network, *kept, flags


UTILITIES = [
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
]


@pytest.mark.once
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    for arguments in (a for a in samples() if a[0] == cell):
        check_one(arguments)


def check_one(arguments):
    for keep in [False, True]:
        # Tracing compares two runs, which draw different dropout masks.
        random = arguments[-1] and arguments[-2] > 0
        utilities = UTILITIES[:3] if random else UTILITIES
        torch.library.opcheck(ops.forward, (*arguments, keep), test_utils=utilities)
    torch.library.opcheck(ops.backward, backward_arguments(arguments), test_utils=UTILITIES)


def properties(tensors):
    flat = [t for item in tensors for t in (item if isinstance(item, list) else [item])]
    return [(t.shape, t.dtype, t.stride()) for t in flat]


def to_meta(arguments):
    def move(a):
        if isinstance(a, list):
            return [move(b) for b in a]
        # batch_sizes stay on the CPU, as in a PackedSequence.
        return a.to("meta") if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    return [move(a) for a in arguments]


@pytest.mark.once
@pytest.mark.parametrize("wanted", [True, False])
def test_fake_kernels_tell_shapes_dtypes_and_strides(wanted):
    for arguments in samples():
        for keep in [False, True]:
            real = ops.forward(*arguments, keep)
            assert properties(real) == properties(ops.forward(*to_meta(arguments), keep))
        arguments = backward_arguments(arguments, wanted)
        meta = to_meta(arguments)
        meta = [
            a.to("meta") if isinstance(a, torch.Tensor) and a.dtype == torch.uint8 else a
            for a in meta
        ]
        assert properties(ops.backward(*arguments)) == properties(ops.backward(*meta))


@pytest.mark.once
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_layer_on_meta(name):
    layer = getattr(fastrnn, name)(3, 4, num_layers=2, bidirectional=True, device="meta")
    output, _ = layer(torch.empty(5, 2, 3, device="meta"))
    assert output.is_meta
    assert output.shape == (5, 2, 8)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu"])
def test_one_call_is_the_whole_network(kind):
    """The operator called straight gives what the module gives; and the module calls it once."""
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
    direct = ops.forward(cell, x, h0, c0, weights, None, True, 3, True, 0.0, False, False)
    assert torch.equal(direct[0], output)


@pytest.mark.once
@pytest.mark.parametrize("cell", CELLS)
def test_the_bare_operators_are_differentiable(cell):
    """The same gradients as the module's, of which it is a call; and those of `backward`'s own."""
    ours, _ = pair(cell, 5, 17)
    x = torch.randn(4, 3, 5, requires_grad=True)
    h0 = torch.zeros(1, 3, 17)
    c0 = torch.zeros_like(h0) if CELLS[cell]["states"] == 2 else None
    found = []
    for output in [
        ours(x)[0],
        ops.forward(cell, x, h0, c0, ours._flat_weights, None, True, 1, False, 0.0, False, False)[
            0
        ],
    ]:
        wanted = [x, *ours.parameters()]
        first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum(), wanted)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
