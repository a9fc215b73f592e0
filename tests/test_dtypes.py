"""Rounding errors: in every dtype, the error against float64 is at most twice torch's.

The reference is torch's error for the same weights and inputs, already rounded to the dtype. A
fixed tolerance could not tell rounding from a bug. Errors are pooled over several seeds, so that
the ratio does not depend on a few lucky roundings.
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
    device,
    flat,
    gradients,
    in_double,
    leaves,
    mapped,
    normals,
    pair,
    ragged,
    random_state,
)

BOTH = [False, True]
SEEDS = range(3)

#: (T, B, I, H): one step, odd sizes, long sums, long sequences
SIZES = [(1, 3, 33, 17), (7, 8, 5, 33), (5, 4, 300, 40), (30, 17, 16, 64), (200, 2, 8, 48)]


def compare(draw, times=2, first_times=None):
    """Compares the tensors that draw(seed) returns as (ours, theirs, exact), pooled over SEEDS.

    `times` as in assert_no_worse; `first_times`, if given, replaces it for the first tensor.
    """
    pools = zip(*(zip(*draw(seed), strict=True) for seed in SEEDS), strict=True)
    for number, pool in enumerate(pools):  # one result tensor of all seeds
        pool = list(pool)
        for results in pool:
            assert results[0].dtype == results[1].dtype, number
        assert_pool_no_worse(pool, first_times if first_times and number == 0 else times)


def avoid_relu_kinks_on_cuda(kind, dtype, *layers):
    """On CUDA sums are rounded to 16 bits, as torch's are. On the CPU they stay in float32."""
    if dtype in LOW and device() == "cuda":
        avoid_relu_kinks(kind, *layers)


@pytest.mark.parametrize("size", affordable(SIZES), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_error_of_values(kind, dtype, size):
    T, B, I, H = size

    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = pair(kind, I, H, num_layers=2, dtype=dtype)
        args = torch.randn(T, B, I, dtype=dtype), random_state(theirs, B)
        with torch.no_grad():
            return [flat(r) for r in (ours(*args), theirs(*args), in_double(theirs, *args))]

    compare(draw)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (d, s)
        for d in [torch.float32, *LOW]
        for s in affordable(SIZES)
        if d not in LOW or s[0] < 200
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_error_of_gradients(kind, dtype, size):
    T, B, I, H = size

    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = pair(kind, I, H, bidirectional=True, dtype=dtype)
        avoid_relu_kinks_on_cuda(kind, dtype, ours, theirs)
        args = leaves((torch.randn(T, B, I, dtype=dtype), random_state(theirs, B)))
        results = [
            gradients(layer(*args), [*flat(args), *layer.parameters()]) for layer in [ours, theirs]
        ]
        exact = copy.deepcopy(theirs).double()
        doubles = leaves(mapped(args, torch.Tensor.double))
        outputs = flat(exact(*doubles))
        # The same cotangents as those of the results in the dtype, rounded to it.
        cotangents = [
            random.to(o.device, dtype).double()
            for random, o in zip(normals(outputs, 1), outputs, strict=True)
        ]
        inputs = [*flat(doubles), *exact.parameters()]
        return [*results, list(torch.autograd.grad(outputs, inputs, cotangents))]

    # On CUDA a weight's gradient is one product over all T * B rows. torch adds up T sums of B
    # rows. The k-th partial sum of random terms has magnitude sqrt(k), and its rounding error is
    # proportional to that. The squared errors add up to (T B)^2 / 2 for one long sum and to
    # T B^2 / 2 + B T^2 / 2 for torch's.
    longer_sum = (T * B / (T + B)) ** 0.5 if device() == "cuda" else 1
    # The input's gradient is a sum over gates and units. On CUDA the inner loop is over the gates,
    # in torch over the units. One of GRU's gates has by far the largest gradients, so torch's
    # partial sums are large during the last third only, ours throughout.
    gates_inside = 2 * 3**0.5 if device() == "cuda" and kind == "gru" else 2
    compare(draw, times=max(2, longer_sum), first_times=gates_inside)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_error_of_packed(kind, dtype):
    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = pair(kind, 16, 40, num_layers=2, bidirectional=True, dtype=dtype)
        args = ragged([40, 3, 1, 17, 25, 2], 16, dtype), random_state(theirs, 6)
        with torch.no_grad():
            return [flat(r) for r in (ours(*args), theirs(*args), in_double(theirs, *args))]

    compare(draw)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_error_of_cells(kind, dtype):
    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = cell_pair(kind, 33, 40, dtype=dtype)
        args = torch.randn(17, 33, dtype=dtype), cell_state(theirs, 17)
        with torch.no_grad():
            return [flat(r) for r in (ours(*args), theirs(*args), in_double(theirs, *args))]

    compare(draw)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_small_numbers(kind, dtype):
    """Relative precision where tanh(x) is nearly x: pre-activations of at most 1e-4."""

    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = pair(kind, 5, 17, bias=False, dtype=dtype)
        args = (
            torch.randn(3, 4, 5, dtype=dtype) * 1e-4,
            mapped(random_state(theirs, 4), lambda t: t * 1e-4),
        )
        with torch.no_grad():
            return [flat(r) for r in (ours(*args), theirs(*args), in_double(theirs, *args))]

    compare(draw)


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_results_and_gradients_have_the_dtype(kind, dtype):
    ours, _ = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=dtype)
    for x in [torch.randn(4, 3, 5, dtype=dtype), ragged([4, 2, 1], 5, dtype)]:
        args = leaves((x, random_state(ours, 3)))
        outputs = flat(ours(*args))
        found = gradients(outputs, [*flat(args), *ours.parameters()])
        assert {t.dtype for t in [*outputs, *found]} == {dtype}


# ---- autocast ------------------------------------------------------------------------------------


def unsupported_by_onednn(kind, packed, low):
    """Whether torch's padded LSTM runs on oneDNN, which has no kernel for this dtype here."""
    if kind != "lstm" or packed or device() == "cuda":
        return False
    return low == torch.float16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


AUTOCAST = [
    (kind, packed, low)
    for kind in LAYERS
    for packed in BOTH
    for low in LOW
    if not unsupported_by_onednn(kind, packed, low)
]


@pytest.mark.once
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "packed", "low"), AUTOCAST)
def test_autocast(kind, packed, low, input_dtype, state_dtype):
    """With float32 weights: the results have the dtypes of torch's, and errors no larger."""

    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = pair(kind, 5, 17, num_layers=2)
        x = ragged([4, 2, 1, 4], 5) if packed else torch.randn(4, 4, 5)
        x = mapped(x, lambda t: t.to(input_dtype))
        hx = (
            None
            if state_dtype is None
            else mapped(random_state(theirs, 4), lambda t: t.to(state_dtype))
        )
        results = []
        for layer in [ours, theirs]:
            for record in BOTH:
                with torch.autocast(device(), dtype=low), torch.set_grad_enabled(record):
                    results.append(flat(layer(x, hx)))
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        return results[0], results[2], flat(in_double(theirs, x, hx))

    compare(draw)


@pytest.mark.once
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_autocast_of_cells(kind, input_dtype, state_dtype, low):
    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = cell_pair(kind, 5, 17)
        x = torch.randn(8, 5).to(input_dtype)
        hx = (
            None
            if state_dtype is None
            else mapped(cell_state(theirs, 8), lambda t: t.to(state_dtype))
        )
        with torch.autocast(device(), dtype=low):
            results = [flat(cell(x, hx)) for cell in [ours, theirs]]
        return [*results, flat(in_double(theirs, x, hx))]

    compare(draw)


@pytest.mark.once
@pytest.mark.parametrize(("kind", "packed", "low"), AUTOCAST)
def test_gradients_under_autocast(kind, packed, low):
    """The gradients of float32 leaves are float32, with errors no larger than torch's."""

    def draw(seed):
        torch.manual_seed(seed)
        ours, theirs = pair(kind, 5, 17, num_layers=2)
        avoid_relu_kinks_on_cuda(kind, low, ours, theirs)
        args = leaves(
            (ragged([4, 2, 1, 4], 5) if packed else torch.randn(4, 4, 5), random_state(theirs, 4))
        )
        results = []
        for layer in [ours, theirs]:
            with torch.autocast(device(), dtype=low):
                loss = sum(o.float().sin().sum() for o in flat(layer(*args)))
            results.append(torch.autograd.grad(loss, [*flat(args), *layer.parameters()]))
        assert {g.dtype for g in results[0]} == {torch.float32}
        exact = copy.deepcopy(theirs).double()
        doubles = leaves(mapped(args, torch.Tensor.double))
        loss = sum(o.sin().sum() for o in flat(exact(*doubles)))
        return [*results, torch.autograd.grad(loss, [*flat(doubles), *exact.parameters()])]

    compare(draw)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_leaves_float64_alone(kind):
    ours, _ = pair(kind, 5, 17, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.autocast(device(), dtype=torch.bfloat16):
        inside = flat(ours(x))
    assert all(torch.equal(a, b) for a, b in zip(inside, flat(ours(x)), strict=True))
