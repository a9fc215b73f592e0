"""CUDA only: kernel paths, streams, devices, synchronisation, launches, graphs, moving modules."""

import copy
from collections import defaultdict

import pytest
import torch
from cuda_calls import cuda_calls
from helpers import (
    LAYERS,
    LOW,
    VIRTUAL,
    assert_pool_no_worse,
    avoid_relu_kinks,
    flat,
    gradients,
    leaves,
    mapped,
    pair,
    ragged,
)
from helpers import random_state as state_of

import fastrnn

pytestmark = [pytest.mark.cuda, pytest.mark.once]

PATHS = ["stepwise", "persistent", "one_block"]
ONE_LAUNCH = PATHS[1:]
BOTH = [False, True]


def can_be_persistent(kind, dtype):
    return kind != "lstm_proj" and dtype != torch.float64


def paths_of(kind, dtype):
    """The paths that a small layer can take, with TF32 not allowed."""
    return [
        path for path in PATHS
        if path == "stepwise"
        or (can_be_persistent(kind, dtype) and (path == "persistent" or dtype in LOW))
    ]  # fmt: skip


CASES = [(kind, path) for kind in LAYERS for path in paths_of(kind, torch.float16)]


@pytest.fixture
def on_path(monkeypatch):
    """A function that forces a path by name. one_block needs TF32 for float32, so it allows it."""

    def choose(path):
        monkeypatch.setenv("FASTRNN_CUDA_PATH", path)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", path == "one_block")

    return choose


@pytest.fixture
def allow_tf32():
    """A function that sets whether TF32 is allowed for cuDNN and for matmul."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul

    def allow(*values):
        for setting, value in zip(settings, values, strict=True):
            setting.allow_tf32 = value

    before = [setting.allow_tf32 for setting in settings]
    yield allow
    allow(*before)


def forward_and_backward(layer, *args):
    """Outputs and gradients for cotangents of ones, without copies from the host."""
    outputs = flat(layer(*args))
    inputs = [t for t in flat(args) if t.requires_grad] + list(layer.parameters())
    return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])]


def distance(a, b):
    """The maximum difference, relative to the maximum of |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [3, 40])
def test_input_gradient_of_a_gru(steps, dtype):
    """With fewer rows than the weights and with more.

    The kernel stores the gates' gradients in another order than the weights' rows. One product
    multiplies them with the weights in place.
    """
    gru = fastrnn.GRU(5, 17, bidirectional=True).to("cuda", dtype)
    x = torch.randn(steps, 2, 5, device="cuda", dtype=dtype, requires_grad=True)
    exact = copy.deepcopy(gru).double()
    exact_x = x.detach().double().requires_grad_()
    gru(x)[0].sum().backward()
    exact(exact_x)[0].sum().backward()
    torch.testing.assert_close(x.grad, exact_x.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("kind", "path"), [c for c in CASES if c[1] != "one_block"])
def test_gradients_of_biases(kind, path, steps, dtype, on_path):
    """Bias gradients are accumulated step by step, by each block for its rows.

    Some sequences start late or end early. The results are the same bits in every run, and for
    each bias alone.
    """
    if path not in paths_of(kind, dtype):
        pytest.skip("float64 is always stepwise")
    layer, _ = pair(kind, 5, 40, bidirectional=True, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    for B in [16, 50]:
        x = ragged([1 + 3 * b % steps for b in range(B)], 5, dtype)
        doubles = mapped(x, torch.Tensor.double)
        names = [name for name, _ in layer.named_parameters() if "bias" in name]

        def found(layer, x, names):
            output = flat(layer(x))[0]
            inputs = [layer.get_parameter(name) for name in names]
            return torch.autograd.grad(output, inputs, torch.ones_like(output))

        on_path("stepwise")
        expected = found(exact, doubles, names)
        on_path(path)
        both = found(layer, x, names)
        for name, a, b in zip(names, both, expected, strict=True):
            torch.testing.assert_close(a, b.to(dtype))
            assert torch.equal(found(layer, x, [name])[0], a)


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", [k for k in LAYERS if can_be_persistent(k, torch.float32)])
def test_all_paths_agree_with_torch(kind, dtype, packed, on_path):
    pools = defaultdict(list)  # by path and index of the result
    for B, H in [(1, 1), (3, 17), (17, 33), (2, 64), (5, 100)]:
        ours, theirs = pair(kind, 5, H, num_layers=2, bidirectional=True, dtype=dtype)
        lengths = [1 + 3 * b % 4 for b in range(B)]
        # In 16 bits, rounding near relu's kink decides whether a gradient flows.
        differentiable = kind != "rnn_relu" or dtype not in LOW
        x = ragged(lengths, 5, dtype) if packed else torch.randn(4, B, 5, dtype=dtype)
        args = leaves((x, state_of(theirs, B)))

        def values(layer, args=args, differentiable=differentiable):
            outputs = flat(layer(*args))
            inputs = [*flat(args), *layer.parameters()]
            return [*outputs, *(gradients(outputs, inputs) if differentiable else [])]

        expected = values(theirs)
        doubles = leaves(mapped(args, torch.Tensor.double))
        exact = values(copy.deepcopy(theirs).double(), doubles) if dtype in LOW else expected
        for path in paths_of(kind, dtype):
            on_path(path)
            found = values(ours)
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert a.dtype == b.dtype
                if dtype in LOW:
                    pools[path, i].append((a, b, exact[i]))
                else:
                    torch.testing.assert_close(a, b)
    assert bool(pools) == (dtype in LOW)
    for pool in pools.values():
        assert_pool_no_worse(pool)


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_without_initial_states(kind, path, on_path):
    """The results equal those with explicit zeros.

    No memory is filled with zeros, and the first step skips the recurrent product. Also checked for
    double backward, batched gradients and a single step.
    """
    on_path(path)
    layer, _ = pair(kind, 5, 17, num_layers=2, bidirectional=True)
    avoid_relu_kinks(kind, layer)
    x, zeros = torch.randn(4, 3, 5), mapped(state_of(layer, 3), torch.zeros_like)
    inputs = [x.requires_grad_(), *layer.parameters()]

    def values(*states, x=x):
        outputs = flat(layer(x, *states))
        return [*outputs, *gradients(outputs, inputs)]

    def higher_order(*states):
        output = layer(x, *states)[0]
        first = torch.autograd.grad(output, x, torch.ones_like(output), create_graph=True)[0]
        many = torch.stack([output.detach().cos(), output.detach()])
        return [
            first,
            *gradients([first], inputs),
            *torch.autograd.grad(output, inputs, many, is_grads_batched=True),
        ]

    def single_step(*states):
        on_path("stepwise")
        return values(*states, x=x[:1])

    for function in [values, higher_order, single_step]:
        for a, b in zip(function(), function(zeros), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ONE_LAUNCH)
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", [k for k in LAYERS if can_be_persistent(k, torch.float32)])
def test_tf32_agrees_with_torch_where_it_is_allowed(kind, packed, path, on_path):
    """As in cuDNN, products have TF32 operands (10-bit mantissa) and float32 accumulation."""
    for B, H in [(3, 17), (17, 33), (5, 96)]:
        on_path("persistent")
        ours, theirs = pair(kind, 5, H, num_layers=2, bidirectional=True)
        avoid_relu_kinks(kind, ours, theirs)
        lengths = [1 + 3 * b % 4 for b in range(B)]
        x = leaves(ragged(lengths, 5) if packed else torch.randn(4, B, 5))
        args = (x, leaves(state_of(theirs, B)))
        exact = forward_and_backward(theirs, *args)
        full = forward_and_backward(ours, *args)
        on_path(path)
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=True):
            rounded = forward_and_backward(ours, *args)
        # TF32: the relative error is at most 2^-11 for an operand and 2^-10 for a product. Errors
        # propagate through four steps and into the gradients. float32: at most 2^-24 for each of
        # about a hundred products and sums, so 2^-17 for a value.
        for a, b in zip(full, exact, strict=True):
            assert distance(a, b) < 8 * 2**-17
        for a, b in zip(rounded, exact, strict=True):
            assert distance(a, b) < 8 * 2**-10
        assert any(not torch.equal(a, b) for a, b in zip(rounded, full, strict=True))


@pytest.mark.skipif(VIRTUAL, reason="the virtual GPU has no cuDNN")
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_agrees_with_cudnn(kind, dtype, packed):
    """nn.LSTM usually runs on cuDNN. The other tests compare with torch's own kernels."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, theirs = pair(kind, 5, 33, num_layers=2, bidirectional=True, dtype=dtype)
        x = leaves(ragged([6, 4, 1], 5) if packed else torch.randn(6, 3, 5))
        x = leaves(mapped(x, lambda t: t.to(dtype)))
        args = (x, state_of(theirs, 3))
        found, expected = (forward_and_backward(layer, *args) for layer in [ours, theirs])
    doubles = leaves(mapped(x, torch.Tensor.double)), mapped(args[1], torch.Tensor.double)
    exact = forward_and_backward(copy.deepcopy(theirs).double(), *doubles)
    # Not assert_close: the two sum in different orders.
    for a, b, c in zip(found, expected, exact, strict=True):
        assert distance(a, c) < max(2 * distance(b, c), 1e-5 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("path", ["persistent", "one_block"])
@pytest.mark.parametrize("hidden", [17, 64])
def test_all_states_on_every_path(hidden, path, packed, on_path):
    """c of all steps and the gradients that come from it."""
    layer, _ = pair("lstm", 5, hidden, num_layers=2, bidirectional=True)
    x = leaves(ragged([4, 1, 3], 5) if packed else torch.randn(4, 3, 5))

    def values():
        output, _, (c,) = layer(x, return_states=True)
        output, c = (t.data if packed else t for t in (output, c))
        weight = torch.linspace(1, 2, c.numel()).view_as(c)
        loss = (c * weight).sum() + output.square().sum()
        return [output, c, *torch.autograd.grad(loss, [*flat(x)[:1], *layer.parameters()])]

    on_path("stepwise")
    expected = values()
    on_path(path)
    # one_block rounds operands to TF32: see above.
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if path == "one_block" else {}
    torch.testing.assert_close(values(), expected, **tolerance)


def test_forced_path_that_is_not_supported(on_path):
    layer, _ = pair("lstm", 5, 17, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    on_path("persistent")
    with pytest.raises(NotImplementedError, match="this layer can not be: float64"):
        layer(x)
    on_path("one_block")
    torch.backends.cudnn.allow_tf32 = False
    for unsupported, input, why in [
        (layer, x, "float64"),
        (fastrnn.LSTM(5, 17), x.float(), "float32 without TF32"),
        (
            fastrnn.LSTM(5, 129, dtype=torch.float16),
            x.half(),
            "its weights do not fit into the reg",
        ),
    ]:
        with pytest.raises(NotImplementedError, match=f"this layer can not be: {why}"):
            unsupported(input)
    on_path("sideways")
    with pytest.raises(
        ValueError, match="is 'sideways', expected stepwise, persistent or one_block"
    ):
        layer(x)


def test_large_batches_take_the_stepwise_path(on_path, capsys):
    """When each block would have many tiles of rows. A persistent kernel is possible but slower."""
    layer = fastrnn.GRU(1, 32)  # float32 without TF32, so not one_block
    batch = 600 * torch.cuda.get_device_properties(0).multi_processor_count
    few, many = (torch.randn(2, B, 1) for B in [16, batch])
    for x, path, expected in [
        (few, "", "path: persistent"),
        (many, "", "why: faster for so many rows"),
        (many, "persistent", "path: persistent"),
    ]:
        on_path(path)
        fastrnn.explain(layer, x)
        assert expected in capsys.readouterr().out


@pytest.mark.skipif(VIRTUAL, reason="the virtual GPU does not round to TF32")
def test_cells_use_tf32_by_the_setting_for_matmul(allow_tf32):
    """nn.LSTMCell uses torch's matmul, for which TF32 has a separate setting."""
    layer, x = fastrnn.LSTMCell(128, 128), torch.randn(32, 128)
    exact = torch.nn.LSTMCell(128, 128).double()
    exact.load_state_dict(layer.state_dict())
    for allowed in BOTH:
        allow_tf32(not allowed, allowed)
        assert (distance(layer(x)[0], exact(x.double())[0]) > 1e-5) == allowed


def test_projections_take_the_stepwise_path():
    layer, theirs = pair("lstm", 3, 20, proj_size=True)
    x = torch.randn(2, 2, 3)
    calls = cuda_calls(lambda: layer(x))
    assert calls.of("forward_step") == 2
    assert calls.of("persistent") == 0
    torch.testing.assert_close(flat(layer(x)), flat(theirs(x)))


@pytest.mark.parametrize("allowed", BOTH, ids=["float32", "tf32"])
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru"])
def test_layers_use_tf32_by_the_setting_for_cudnn(kind, allowed, on_path, allow_tf32):
    """Whatever the setting for matmul."""
    on_path("stepwise")
    allow_tf32(allowed, not allowed)
    ours, theirs = pair(kind, 128, 128)
    x = torch.randn(3, 32, 128)
    exact = forward_and_backward(copy.deepcopy(theirs).double(), leaves(x.double()))
    found = forward_and_backward(ours, leaves(x))
    rounds = allowed and not VIRTUAL and torch.cuda.get_device_capability() >= (8, 0)
    # TF32 keeps 11 significant bits of an operand, and rounding errors partly cancel in a sum.
    for a, b in zip(found, exact, strict=True):
        assert distance(a, b) < 1e-2
        assert (distance(a, b) > 1e-5) == rounds


# ---- launches, copies, streams -------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_launches(kind, path, packed, bidirectional, on_path):
    """One launch per step, or one per layer, for both directions; no host copies, no waits."""
    on_path(path)
    T, layers = 6, 2
    layer, _ = pair(kind, 5, 17, num_layers=layers, bidirectional=bidirectional, dropout=0.5)
    x = ragged([6, 4, 1], 5) if packed else torch.randn(T, 3, 5)
    args = leaves((x, state_of(layer, 3)))
    calls = cuda_calls(lambda: forward_and_backward(layer, *args))
    assert calls.to_host == 0
    assert calls.waits == 0
    if path in ONE_LAUNCH:
        assert calls.of(f"{path}_forward") == calls.of(f"{path}_backward") == layers
        assert calls.of("_step") == 0
        assert calls.of("store_offsets") == 2 * layers * packed
    else:
        assert calls.of("persistent") == calls.of("one_block") == 0
        assert calls.of("forward_step") == layers * T
        # grad_h0 takes one more launch of the kernel that accumulates dL/dh.
        sums = calls.of("backward_sum")
        assert sums == layers * (T + 1) * (kind == "lstm_proj")
        assert calls.of("backward_step") == layers * (T + (kind != "lstm_proj"))


@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "path"), [c for c in CASES if c[0] != "lstm_proj"])
def test_states_are_read_and_written_in_place(kind, path, dtype, packed, bidirectional, on_path):
    """The steps read and write states, their gradients and the output directly.

    Nothing is copied or zeroed before or after them, with two exceptions: a persistent kernel's
    barrier counters start at zero, and stepwise the states of sequences that start late are copied.
    """
    on_path(path)
    if path == "one_block" and dtype == torch.float32:
        pytest.skip("one_block computes float32 in TF32")
    layer, _ = pair(kind, 40, 40, bidirectional=bidirectional, dtype=dtype, bias=False)
    x = ragged([6, 4, 1], 40, dtype=dtype) if packed else torch.randn(6, 3, 40, dtype=dtype)
    args = leaves((x, state_of(layer, 3)))
    results = []

    def forward():
        results[:] = flat(layer(*args))

    def backward():
        grads = [torch.ones_like(r) for r in results]
        torch.autograd.backward(results, grads, inputs=list(layer.parameters()), retain_graph=True)

    counters = path == "persistent"
    late = path == "stepwise" and packed and bidirectional
    assert cuda_calls(forward).on_device == counters + late
    layer.zero_grad()
    assert cuda_calls(backward).on_device <= counters


@pytest.mark.parametrize(("kind", "path"), CASES)
def test_the_current_stream(kind, path, on_path):
    """The kernels run in the current stream, after the work that is already in it."""
    on_path(path)
    layer, _ = pair(kind, 5, 17, bidirectional=True)
    x = leaves(torch.randn(4, 3, 5))
    expected = forward_and_backward(layer, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        if not VIRTUAL:
            torch.cuda._sleep(50_000_000)  # delays the copy of x by some 30 ms
        late.copy_(x.detach())
        found = forward_and_backward(layer, late.requires_grad_())
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_device_other_than_the_current_one(kind, path, on_path):
    on_path(path)
    layer, _ = pair(kind, 5, 17, bidirectional=True)
    x = torch.randn(4, 3, 5)
    expected = forward_and_backward(layer, leaves(x))
    found = forward_and_backward(layer.to("cuda:1"), leaves(x.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.skipif(VIRTUAL, reason="the virtual GPU has no CUDA graphs")
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_in_a_cuda_graph(kind, path, packed, on_path):
    on_path(path)
    layer, _ = pair(kind, 5, 17, num_layers=2, bidirectional=True)
    x = leaves(ragged([6, 4, 1], 5) if packed else torch.randn(6, 3, 5))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward_and_backward(layer, x)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            flat(x)[0].normal_()
        graph.replay()
        for a, b in zip(found, forward_and_backward(layer, x), strict=True):
            torch.testing.assert_close(a, b)


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_moving_a_layer_to_the_gpu_and_back(kind):
    with torch.device("cpu"):
        layer, _ = pair(kind, 5, 17, num_layers=2, bidirectional=True)
        x = torch.randn(4, 3, 5)
    first = flat(layer(x))
    on_gpu = flat(layer.to("cuda")(x.to("cuda")))
    assert {t.device.type for t in on_gpu} == {"cuda"}
    torch.testing.assert_close([t.cpu() for t in on_gpu], first)
    back = flat(layer.to("cpu")(x))
    assert all(torch.equal(a, b) for a, b in zip(back, first, strict=True))
    assert fastrnn.fallbacks() == {}


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_reproducible(kind, packed):
    """From the generator's seed and from its state; each call advances the generator."""
    layer, _ = pair(kind, 5, 17, num_layers=3, dropout=0.5)
    x = leaves(ragged([6, 4, 1], 5) if packed else torch.randn(6, 3, 5))
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    runs = [forward_and_backward(layer, x) for _ in range(2)]
    torch.cuda.set_rng_state(state)
    runs.append(forward_and_backward(layer, x))
    torch.cuda.manual_seed(3)
    runs.append(forward_and_backward(layer, x))
    for repeated in runs[2:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], repeated, strict=True))
    assert not torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("kind", LAYERS)
def test_accelerate(kind):
    _, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, 5)
    expected = flat(theirs(x))
    model = torch.nn.Sequential(theirs)
    fastrnn.accelerate(model)
    assert type(model[0]).__module__ == "fastrnn.modules"
    torch.testing.assert_close(flat(model(x)), expected)


def test_state_on_another_device_raises():
    for layer in pair("lstm", 5, 17):
        h = torch.zeros(1, 3, 17, device="cpu")
        with pytest.raises(RuntimeError, match=r"not at the same device|on the same device"):
            layer(torch.randn(4, 3, 5), (h, h))
