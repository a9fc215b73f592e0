"""The operators with events, against reference.py: resets and ends in padded input."""

import itertools

import pytest
import torch
from cuda_calls import cuda_calls
from helpers import (
    FULL,
    LAYERS,
    LOW,
    OPERATOR_CELLS,
    VIRTUAL,
    flat,
    leaves,
    mapped,
    no_transforms,
    pair,
)
from helpers import slow_after as slow

from fastrnn import ops, reference
from fastrnn.functional import rnn
from fastrnn.network import Network, forward_arguments
from fastrnn.reference import PAST_END, RESET

pytestmark = pytest.mark.usefixtures("step_by_step")
T, B, I, H = 6, 4, 5, 17
BOTH = [False, True]


def events(steps=T, batch=B, device=None):
    """Rows without events; with resets, of the first step too; with an end; with all of them."""
    made = torch.zeros(steps, batch, dtype=torch.uint8, device="cpu")
    for b in range(batch):
        if b % 4 in (1, 3):
            made[0 if b % 4 == 1 else 1 :: 3, b] = RESET
        if b % 4 in (2, 3):
            made[max(1, steps - 1 - b % 5) :, b] = PAST_END
    return made.to(device or torch.get_default_device())


def arguments(cell, D=1, L=1, P=0, sizes=(T, B, I, H), dtype=torch.float64):
    """cell, input, h0, c0 and weights."""
    steps, batch, inputs, hidden = sizes
    info, R = OPERATOR_CELLS[cell], P or hidden
    G = info["gates"] * hidden
    weights = [
        torch.rand(shape, dtype=dtype) - 0.5
        for width in [inputs] * D + [D * R] * (D * (L - 1))
        for shape in [(G, width), (G, R), (G,), (G,), *([(R, hidden)] if P else [])]
    ]
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    h0 = torch.randn(L * D, batch, R, dtype=dtype)
    c0 = torch.randn(L * D, batch, hidden, dtype=dtype) if info["states"] == 2 else None
    return cell, *leaves((x, h0, c0, weights))


def results(run, args, made, **options):
    found = run(*args, made, has_biases=True, **options)
    return [t for t in found if t is not None]


def loss(found):
    """A sum with another factor for each value."""
    return sum((t * torch.linspace(0.5, 1, t.numel()).view(t.shape)).sum() for t in found)


def options_of(D, L):
    return {"num_layers": L, "bidirectional": D == 2}


def compare(args, made, tolerance=None, **options):
    found = results(rnn, args, made, **options)
    options.pop("recompute", None)
    exact = mapped(args[1:], lambda t: t.detach().double().requires_grad_())
    expected = results(reference.run, (args[0], *exact), made, **options)
    tolerance = tolerance or {}
    torch.testing.assert_close(found, expected, check_dtype=False, **tolerance)
    grads = [
        torch.autograd.grad(loss(values), flat(tensors))
        for values, tensors in [(found, args[1:]), (expected, exact)]
    ]
    torch.testing.assert_close(*grads, check_dtype=False, **tolerance)


SHAPES = [(cell, 0) for cell in OPERATOR_CELLS] + [("lstm", 7)]


@pytest.mark.parametrize("recompute", slow(1, BOTH), ids=["keep", "recompute"])
@pytest.mark.parametrize("states", BOTH, ids=["last", "states"])
@pytest.mark.parametrize(("D", "L"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize(("cell", "P"), SHAPES)
def test_values_and_gradients(cell, P, dtype, D, L, states, recompute):
    args = arguments(cell, D, L, P, dtype=dtype)
    options = {**options_of(D, L), "return_states": states}
    # Gradients in float32 are sums over all rows; the reference is in float64.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else None
    compare(args, events(), tolerance, **options, recompute=recompute)


@pytest.mark.parametrize("hidden", [1, 16, 33])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 5), (3, 17), (40, 33)])
@pytest.mark.parametrize(("cell", "P"), slow(2, [("lstm", 0), ("gru", 0), ("rnn_tanh", 0)]))
def test_sizes(cell, P, steps, batch, hidden):
    if VIRTUAL and steps > 3:
        pytest.skip("takes long on the virtual GPU")
    args = arguments(cell, 2, 1, P, sizes=(steps, batch, 3, hidden))
    compare(args, events(steps, batch), **options_of(2, 1), return_states=True)


@pytest.mark.cpu
def test_several_chunks_of_the_backward_pass():
    """The rows of a backward chunk are at most a few hundred."""
    args = arguments("gru", 2, sizes=(64, 40, 3, 8))
    compare(args, events(64, 40), **options_of(2, 1))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("cell", "P"), SHAPES)
def test_16_bits(cell, P, dtype):
    """Each part of a row has the bits that it has alone."""
    args = arguments(cell, 1, 1, P, dtype=dtype)
    made = torch.zeros(T, B, dtype=torch.uint8)
    made[2] = RESET
    with torch.no_grad():
        whole = results(rnn, args, made, **options_of(1, 1))
        zeros = mapped(args[2:4], torch.zeros_like)
        parts = [
            results(rnn, (cell, x, *states, args[4]), None, **options_of(1, 1))
            for x, states in [(args[1][:2], args[2:4]), (args[1][2:], zeros)]
        ]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], parts[1][1:], strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("cell", slow(2, OPERATOR_CELLS))
def test_same_bits_for_any_threads_and_batch_mates(cell):
    args, made = arguments(cell, 2, sizes=(9, 24, 8, 40)), events(9, 24)

    def values_and_gradients(args, made):
        found = results(rnn, args, made, **options_of(2, 1))
        return found, torch.autograd.grad(found[0].sum(), args[1])[0]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, grad = values_and_gradients(args, made)
    finally:
        torch.set_num_threads(threads)
    again, same = values_and_gradients(args, made)
    assert all(torch.equal(a, b) for a, b in zip([*one, grad], [*again, same], strict=True))
    some = mapped(args[1:4], lambda t: t[:, 3:8].detach().requires_grad_())
    few, part = values_and_gradients((cell, *some, args[4]), made[:, 3:8])
    assert all(torch.equal(a[:, 3:8], b) for a, b in zip([*one, grad], [*few, part], strict=True))


def test_no_events_change_no_bits():
    args = arguments("lstm", 2, 2)
    none = torch.zeros(T, B, dtype=torch.uint8)
    for a, b in zip(
        results(rnn, args, none, **options_of(2, 2)),
        results(rnn, args, None, **options_of(2, 2)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.once
@no_transforms
@pytest.mark.parametrize("cell", slow(2, OPERATOR_CELLS))
def test_higher_derivatives(cell):
    _, x, *others = arguments(cell, 2, sizes=(4, 4, 2, 3))
    made = events(4)

    def function(x):
        found = results(rnn, (cell, x, *others), made, return_states=True, **options_of(2, 1))
        return found[0]

    assert torch.autograd.gradgradcheck(function, x)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)


@pytest.mark.once
@pytest.mark.parametrize("of_events", BOTH, ids=["shared", "each"])
@pytest.mark.parametrize("of_weights", BOTH, ids=["batch", "models"])
def test_vmap(of_events, of_weights):
    cell, *tensors = arguments("lstm")
    x, h0, c0, weights = mapped(tensors, torch.Tensor.detach)
    made = torch.stack([events(), events().flip(1), torch.zeros_like(events())])
    given = made if of_events else made[0]
    xs = torch.stack([x, x + 1, x - 1])
    w_hh = torch.stack([weights[1], weights[1] * 2, -weights[1]]) if of_weights else weights[1]

    def value(x, w_hh, made):
        args = (cell, x, h0, c0, [weights[0], w_hh, *weights[2:]])
        return loss(results(rnn, args, made, **options_of(1, 1)))

    function = torch.func.grad(value, argnums=(0, 1) if of_weights else 0)
    dims = (0, 0 if of_weights else None, 0 if of_events else None)
    found = torch.func.vmap(function, dims)(xs, w_hh, given)
    for i in range(3):
        one = function(xs[i], w_hh[i] if of_weights else w_hh, given[i] if of_events else given)
        torch.testing.assert_close(mapped(found, lambda t, i=i: t[i]), one)


@pytest.mark.once
@no_transforms
def test_models_with_events_of_their_own():
    """A call for several models: values, tangents by the formulas, and the fake kernel."""
    each = [arguments("lstm")[1:] for _ in range(2)]
    made = [events(), events().flip(1)]
    x, h0, c0, *weights = (torch.stack(t).detach() for t in zip(*map(flat, each), strict=True))

    def run(x, h0, c0, weights, made):
        return tuple(results(rnn, ("lstm", x, h0, c0, weights), made, **options_of(1, 1)))

    def with_tangents(x, h0, c0, weights, made):
        return torch.func.jvp(lambda x: run(x, h0, c0, weights, made), (x,), (torch.ones_like(x),))

    found = with_tangents(x, h0, c0, weights, torch.stack(made))
    for i, (args, own) in enumerate(zip(each, made, strict=True)):
        one = with_tangents(*mapped(args, torch.Tensor.detach), own)
        torch.testing.assert_close(mapped(found, lambda t, i=i: t[i]), one)
    meta = mapped((x, h0, c0, weights, torch.stack(made)), lambda t: t.to("meta"))
    assert [t.shape for t in run(*meta)] == [t.shape for t in found[0]]


@pytest.mark.once
def test_fake_kernels():
    cell, x, h0, c0, weights = arguments("lstm", 2, dtype=torch.float32)
    network = Network(cell, True, **options_of(2, 1), dropout=0.0, return_states=True)
    call = tuple(forward_arguments(network, x, h0, c0, weights, events()))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward, call, test_utils=utilities)


@pytest.mark.once
def test_bad_input():
    args = arguments("lstm")
    made = events()
    for bad, message in [
        (made[1:], "Expected events size"),
        (made.T, "Expected events size"),
        (made.long(), "Expected events of dtype Byte, got Long"),
        (made[None], "Expected events size"),
        (made.to("meta"), "not at the same device"),
        *([] if VIRTUAL else [(made.to_sparse(), "layout")]),
    ]:
        with pytest.raises(RuntimeError, match=message):
            results(rnn, args, bad, **options_of(1, 1))
    # Other values are no event.
    odd = torch.where(made == 0, 255, made)
    for a, b in zip(*(results(rnn, args, e, **options_of(1, 1)) for e in (made, odd)), strict=True):
        assert torch.equal(a, b)


# ---- layers on a GPU -----------------------------------------------------------------------------


def cuts():
    lengths = torch.tensor([3, T, 1, 4])
    resets = events() == RESET
    return [{"resets": resets}, {"lengths": lengths}, {"resets": resets, "lengths": lengths}]


def step_of_training(layer, x, **cut):
    output, _ = layer(x, **cut)
    return torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])


@pytest.mark.cuda
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_waits_for_the_gpu(kind):
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    for cut in cuts():
        calls = cuda_calls(lambda cut=cut: step_of_training(layer, x, **cut))
        assert calls.waits == 0
        assert calls.to_host == 0


@pytest.mark.cuda
@pytest.mark.skipif(VIRTUAL, reason="the virtual GPU has no CUDA graphs")
def test_in_a_cuda_graph():
    layer, _ = pair("lstm", I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    for cut in cuts():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step_of_training(layer, x, **cut)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step_of_training(layer, x, **cut)
        for values in itertools.chain(cut.values(), [x.detach()]):
            values.copy_(values.roll(1, -1))
        graph.replay()
        torch.testing.assert_close(found, step_of_training(layer, x, **cut))


@pytest.mark.cuda
def test_lengths_on_a_gpu_are_clamped(monkeypatch):
    layer, _ = pair("lstm", I, H)
    x, h, c = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(1, B, H)
    x[3:, 1] = float("nan")
    bad, good = torch.tensor([0, 3, 2**62, -5]), torch.tensor([1, 3, T, 1])
    output, last = layer(x, (h, c), lengths=bad)
    expected, ends = layer(x, (h, c), lengths=good)
    assert torch.equal(output[:, [1, 2]], expected[:, [1, 2]])
    assert not output[:, [0, 3]].any()
    for found, start, end in zip(last, (h, c), ends, strict=True):
        assert torch.equal(found[:, [0, 3]], start[:, [0, 3]])
        assert torch.equal(found[:, [1, 2]], end[:, [1, 2]])
    monkeypatch.setenv("FASTRNN_CHECK_LENGTHS", "1")
    with pytest.raises(ValueError, match=r"lengths: expected 1 to 6, got lengths\[0\] = 0"):
        layer(x, lengths=bad)
