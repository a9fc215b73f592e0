"""Invalid arguments of the operators: an exception that names the argument, or a correct result."""

import pytest
import torch
from helpers import (
    LAYERS,
    OPERATOR_CELLS,
    VIRTUAL,
    check_examples,
    example_count,
    flat,
    host_tensor,
    pack,
    pair,
    slow_after,
)
from hypothesis import strategies as st
from test_layouts import each, spread
from test_ops import backward_arguments, sample
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops, reference

ERRORS = (RuntimeError, ValueError, TypeError, IndexError)  # NotImplementedError is a RuntimeError
CELL, X, H0, C0, WEIGHTS, SIZES, BIAS, LAYERS_, BIDIRECTIONAL, DROPOUT, TRAIN = range(11)


def call(arguments, position=None, value=None, keep=False):
    arguments = list(arguments)
    if position is not None:
        arguments[position] = value
    return ops.forward(*arguments, keep)


def with_weight(arguments, i, value):
    weights = list(arguments[WEIGHTS])
    weights[i] = value
    return weights


def huge(*size):
    """An expanded tensor of any size: its storage holds one element."""
    return torch.zeros(1).expand(size)


LSTM = sample("lstm", L=2, D=2)
PACKED = sample("lstm", packed=True)
DEVICE = LSTM[X].device
# CPU only: CUDA has no Mkldnn tensors, and the virtual GPU no sparse ones.
SPARSE = {"Sparse": torch.Tensor.to_sparse} if DEVICE.type == "cpu" else {}
LAYOUTS = {**SPARSE, "Mkldnn": torch.Tensor.to_mkldnn} if SPARSE else {}
GRU = sample("gru")


@pytest.mark.parametrize(
    ("arguments", "position", "value", "message"),
    [
        (LSTM, CELL, "lstn", "no cell is called 'lstn'"),
        (LSTM, X, LSTM[X][0], "input must have 3 dimensions, got 2"),
        (LSTM, X, LSTM[X][..., :-1], r"Expected weight_ih size \[68, 4\], got \[68, 5\]"),
        (LSTM, X, LSTM[X][:0], "Expected sequence length to be larger than 0 in RNN"),
        (LSTM, X, LSTM[X][:, :2], r"Expected hidden\[0\] size \[4, 2, 17\], got \[4, 3, 17\]"),
        (LSTM, X, LSTM[X].double(), "same dtype, but got Double and Float"),
        (LSTM, X, LSTM[X].long(), "same dtype, but got Long and Float"),
        (LSTM, X, LSTM[X].to("meta"), "not at the same device"),
        (LSTM, X, LSTM[X].to(torch.complex64), "same dtype, but got ComplexFloat and Float"),
        (LSTM, X, LSTM[X][..., :0], r"input_size must be greater than zero"),
        (LSTM, X, None, "the input tensor is undefined"),
        (LSTM, H0, None, "the hidden tensor is undefined"),
        (GRU, H0, None, "the hidden tensor is undefined"),
        (PACKED, H0, None, "the hidden tensor is undefined"),
        (LSTM, H0, LSTM[H0][0], "3 dimensions, got 2"),
        (LSTM, H0, LSTM[H0][None], "3 dimensions, got 4"),
        (LSTM, H0, LSTM[H0][:2], r"Expected hidden\[0\] size \[4, 3, 17\], got \[2, 3, 17\]"),
        (LSTM, H0, LSTM[H0][:, :2], r"Expected hidden\[0\] size \[4, 3, 17\], got \[4, 2, 17\]"),
        (LSTM, H0, LSTM[H0][..., :16], "incorrect number of RNN parameters"),
        (GRU, H0, GRU[H0][..., :16], r"Expected weight_ih size \[48, 5\], got \[51, 5\]"),
        (GRU, H0, GRU[H0][..., :0], "hidden_size must be greater than zero"),
        (LSTM, H0, LSTM[H0].double(), "same dtype"),
        (
            LSTM,
            H0,
            LSTM[H0].to("meta"),
            f"found input tensor at {DEVICE} and hidden tensor at meta",
        ),
        (LSTM, C0, None, "lstm expects two hidden states"),
        (LSTM, C0, LSTM[C0].half(), "same dtype, but got Half and Float"),
        *(
            (LSTM, position, change(LSTM[position]), f"has layout {name}")
            for position in [X, H0, C0]
            for name, change in LAYOUTS.items()
        ),
        (
            LSTM,
            C0,
            LSTM[C0].to("meta"),
            f"found input tensor at {DEVICE} and hidden tensor at meta",
        ),
        (LSTM, C0, LSTM[C0][0], r"Expected hidden\[1\] size \[4, 3, 17\], got \[3, 17\]"),
        (LSTM, C0, LSTM[C0][:3], r"Expected hidden\[1\] size \[4, 3, 17\], got \[3, 3, 17\]"),
        (LSTM, C0, LSTM[C0][..., :9], "incorrect number of RNN parameters"),
        (LSTM, C0, LSTM[C0][:, :2], r"Expected hidden\[1\] size \[4, 3, 17\]"),
        (LSTM, C0, torch.zeros(1, 0, 2**61), "incorrect number of RNN parameters"),
        (LSTM, C0, huge(4, 3, 2**40), "incorrect number of RNN parameters"),
        (GRU, C0, torch.zeros(1, 3, 17), "gru expects one hidden state"),
        (LSTM, WEIGHTS, [], "incorrect number of RNN parameters"),
        (LSTM, WEIGHTS, LSTM[WEIGHTS][:-1], "incorrect number of RNN parameters"),
        (LSTM, WEIGHTS, LSTM[WEIGHTS] * 2, "incorrect number of RNN parameters"),
        (LSTM, WEIGHTS, [*LSTM[WEIGHTS][:-1], None], "a value of type 'List.Tensor.' for argument"),
        (LSTM, BIAS, False, "incorrect number of RNN parameters"),
        (LSTM, BIAS, "yes", "a value of type 'bool' for argument 'has_biases'"),
        (LSTM, LAYERS_, 0, "num_layers must be greater than zero"),
        (LSTM, LAYERS_, -2, "num_layers must be greater than zero"),
        (LSTM, LAYERS_, 1, "incorrect number of RNN parameters"),
        (LSTM, LAYERS_, 2**62, "incorrect number of RNN parameters"),
        (LSTM, LAYERS_, -(2**63), "num_layers must be greater than zero"),
        (LSTM, LAYERS_, 2**70, "a value of type 'int' for argument 'num_layers'"),
        (LSTM, LAYERS_, 2.5, "a value of type 'int' for argument 'num_layers'"),
        (LSTM, BIDIRECTIONAL, False, "incorrect number of RNN parameters"),
        (LSTM, DROPOUT, -1.0, "between 0 and 1, but got -1"),
        (LSTM, DROPOUT, 2.0, "between 0 and 1, but got 2"),
        (LSTM, DROPOUT, float("nan"), "between 0 and 1, but got nan"),
        (LSTM, DROPOUT, float("inf"), "between 0 and 1, but got inf"),
        (LSTM, SIZES, host_tensor([3, 1]), "input must have 2 dimensions, got 3"),
        (PACKED, SIZES, None, "input must have 3 dimensions, got 2"),
        (PACKED, SIZES, host_tensor([1, 3, 3, 2]), "must not increase"),
        (PACKED, SIZES, host_tensor([3, -1, 4]), "narrow.*length must be non-negative"),
        (PACKED, SIZES, host_tensor([3, 3, 3, 3]), "exceeds dimension size"),
        (PACKED, SIZES, host_tensor([2**62, 2**62]), "exceeds dimension size"),
        (PACKED, SIZES, host_tensor([3, 3]), "sum to 6 but the packed data has 9 rows"),
        (PACKED, SIZES, host_tensor([3, 3, 2, 0]), "sum to 8 but the packed data has 9 rows"),
        (PACKED, SIZES, host_tensor([3, 3, 2, 1, 1]), "exceeds dimension size"),
        (PACKED, SIZES, host_tensor([0, 0]), "sum to 0 but"),
        (PACKED, SIZES, host_tensor([0, 3, 3, 3]), "must not increase, but .* 3 follows 0"),
        (PACKED, SIZES, host_tensor([2**63 - 1, 2]), "exceeds dimension size"),
        (PACKED, SIZES, host_tensor([3, 3, 2, -(2**63)]), "length must be non-negative"),
        (PACKED, SIZES, host_tensor(9), "batch_sizes must have 1 dimension, got 0"),
        (PACKED, SIZES, host_tensor([3, 3, 2, 1]).to_sparse(), "on CPU, as a dense tensor"),
        (PACKED, X, PACKED[X][:8], r"start \(8\) \+ length \(1\) exceeds dimension size \(8\)"),
        (PACKED, X, PACKED[X][..., None], "input must have 2 dimensions, got 3"),
        (PACKED, SIZES, host_tensor([]), "batch_sizes can not be empty"),
        (PACKED, SIZES, host_tensor([[3, 3, 2, 1]]), "input must have 3 dimensions, got 2"),
        (
            PACKED,
            SIZES,
            host_tensor([3.0, 3, 2, 1], torch.float32),
            "expected scalar type Long but found Float",
        ),
        (PACKED, SIZES, host_tensor([3, 3, 2, 1], torch.int32), "Long but found Int"),
        (PACKED, SIZES, torch.tensor([3, 3, 2, 1], device="meta"), "should always be on CPU"),
        (PACKED, SIZES, host_tensor([4, 3, 1, 1]), r"Expected hidden\[0\] size \[1, 4, 17\]"),
    ],
)
def test_one_invalid_argument(arguments, position, value, message):
    call(arguments)
    for keep in [False, True]:
        with pytest.raises(ERRORS, match=message) as error:
            call(arguments, position, value, keep)
        # torch's constructors raise ValueError for an invalid dropout or nonlinearity.
        assert error.type is (ValueError if position in [CELL, DROPOUT] else RuntimeError)


NO_MEMORY = r"overflow|can't allocate memory|out of memory"


@pytest.mark.skipif(VIRTUAL, reason="the virtual GPU fills every allocation")
@pytest.mark.parametrize("keep", slow_after(1, [False, True]))
def test_sizes_that_exceed_memory(keep):
    """They raise an error, and no product of sizes overflows to a small number."""
    options = (False, 1, False, 0.0, False, False, keep)
    # 4 * (2**62 + 1) overflows to 4, the number of rows of weight_ih.
    H, I = 2**62 + 1, 2**60 + 1
    weights = [huge(4, I), torch.zeros(4, 1), huge(1, H)]
    for B in [0, 1]:
        states = (torch.zeros(1, B, 1), huge(1, B, H))
        with pytest.raises(
            RuntimeError, match=r"Expected weight_ih .* hidden_size 46116860184273879"
        ):
            ops.forward("lstm", huge(2, B, I), *states, weights, None, *options)
    for H in [2**30, 2**31 - 1]:
        x, weights = huge(1, 1, H), [huge(H, H)] * 2
        with pytest.raises(RuntimeError, match=NO_MEMORY):
            ops.forward("rnn_tanh", x, huge(1, 1, H), None, weights, None, *options)
    for x, h0 in [
        (huge(2**59, 3, 5), GRU[H0]),
        (huge(2**45, 3, 5), GRU[H0]),
        (huge(4, 2**58, 5), huge(1, 2**58, 17)),
    ]:
        with pytest.raises(RuntimeError, match=NO_MEMORY):
            ops.forward("gru", x, h0, None, GRU[WEIGHTS], None, True, *options[1:])
    with pytest.raises(RuntimeError, match=r"Expected hidden size \[1, 3, 17\]"):
        ops.forward("gru", GRU[X], huge(2**57, 3, 17), None, GRU[WEIGHTS], None, True, *options[1:])


def test_empty_batch_with_very_many_steps():
    """A loop over the steps would take years."""
    x, h0 = torch.zeros(2**62, 0, 5), torch.zeros(1, 0, 17)
    output, h_n, *_ = ops.forward("gru", x, h0, None, *GRU[WEIGHTS:], False)
    assert output.shape == (2**62, 0, 17)
    assert h_n.shape == (1, 0, 17)
    arguments = list(PACKED)
    arguments[X] = torch.zeros(0, 5)
    arguments[H0] = arguments[C0] = torch.zeros(1, 0, 17)
    arguments[SIZES] = host_tensor([0, 0])
    assert call(arguments, keep=True)[0].shape == (0, 17)


@pytest.mark.parametrize("kind", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"])
def test_one_invalid_weight(kind):
    arguments = sample("lstm", L=2, D=2, P=3)
    position = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"].index(kind)
    for i in range(position, 20, 5):  # in each layer and direction
        w = arguments[WEIGHTS][i]
        for value in [w[:-1], w[..., :-1], w[0], w[None], w.t() if w.dim() == 2 else w[::2]]:
            with pytest.raises(
                RuntimeError, match=rf"Expected {kind} |weight_ih with|input of 1 models"
            ):
                call(arguments, WEIGHTS, with_weight(arguments, i, value))
        with pytest.raises(RuntimeError, match="same dtype"):
            call(arguments, WEIGHTS, with_weight(arguments, i, w.double()))
        for name, change in LAYOUTS.items():
            with pytest.raises(RuntimeError, match=f"parameter tensor has layout {name}"):
                call(arguments, WEIGHTS, with_weight(arguments, i, change(w)))
        with pytest.raises(RuntimeError, match=f"tensor at {DEVICE} and parameter tensor at meta"):
            call(arguments, WEIGHTS, with_weight(arguments, i, w.to("meta")))


def test_unsupported_dtypes_and_projections():
    ints = [a.to(torch.int64) if isinstance(a, torch.Tensor) else a for a in LSTM]
    ints[WEIGHTS] = [w.to(torch.int64) for w in LSTM[WEIGHTS]]
    with pytest.raises(RuntimeError, match="dtype Long is not supported, expected Float"):
        call(ints)
    wide = sample("lstm", P=3)
    with pytest.raises(RuntimeError, match="proj_size has to be smaller than hidden_size"):
        call(wide, H0, torch.zeros(1, 3, 40))


def freed(t):
    """A copy of the tensor whose storage has been resized to 8 bytes."""
    t = t.clone()
    t.untyped_storage().resize_(8)
    return t


BACKWARD = backward_arguments(sample("lstm", L=2, D=2, dropout=0.5, train=True))
NAMES = ["grad_output", "grad_h_n", "grad_c_n", "hidden", "saved", "c", "dropout_mask"]
POSITIONS = [1, 2, 3, 14, 15, 16, 17]


@pytest.mark.parametrize(("name", "position"), list(zip(NAMES, POSITIONS, strict=True)), ids=NAMES)
def test_one_invalid_argument_of_backward(name, position):
    good = BACKWARD[position]
    ops.backward(*BACKWARD)
    for value, message in [
        (good[:-1], f"Expected {name} size "),
        (good[..., :-1], f"Expected {name} size "),
        (good[None], f"Expected {name} size "),
        (good.flatten(), f"Expected {name} size "),
        (good.to(torch.int16), f"Expected {name} of dtype .*, got "),
    ]:
        arguments = list(BACKWARD)
        arguments[position] = value
        with pytest.raises(RuntimeError, match=message):
            ops.backward(*arguments)
    for value, message in [
        (good.to("meta"), f"found input tensor at {DEVICE} and {name} tensor at meta"),
        *((change(good), f"the {name} tensor has layout {odd}") for odd, change in SPARSE.items()),
        (freed(good), f"the {name} tensor of size .* its storage has 8"),
    ]:
        arguments = list(BACKWARD)
        arguments[position] = value
        with pytest.raises(RuntimeError, match=message):
            ops.backward(*arguments)


@pytest.mark.parametrize("position", [4, 5, 6], ids=["input", "h0", "c0"])
def test_backward_checks_the_arguments_of_forward(position):
    arguments = list(BACKWARD)
    arguments[position] = BACKWARD[position][:, :2]
    with pytest.raises(RuntimeError, match=r"Expected hidden\[\d\] size"):
        ops.backward(*arguments)
    arguments[position] = None
    with pytest.raises(RuntimeError, match=r"tensor is undefined|expects two hidden states"):
        ops.backward(*arguments)


def test_backward_without_saved_tensors():
    """Forward without `keep` saves no tensors for backward."""
    arguments = list(BACKWARD)
    arguments[14:18] = ops.forward(*LSTM, False)[3:]
    with pytest.raises(RuntimeError, match=r"Expected hidden size \[2, 12, 34\], got \[0\]"):
        ops.backward(*arguments)


def test_requested_and_undefined_gradients():
    for n in [0, 2, 18, 20]:
        with pytest.raises(ValueError, match=f"wanted has {n} elements, expected 19"):
            ops.backward(*BACKWARD[:-1], [True] * n)
    gru = list(backward_arguments(sample("gru")))
    gru[3] = torch.zeros(1, 3, 17)
    with pytest.raises(RuntimeError, match="gru has no c_n"):
        ops.backward(*gru)
    nothing = list(BACKWARD)
    nothing[1:4] = [None] * 3
    grads = ops.backward(*nothing)
    assert all(not g.any() for g in [*grads[:3], *grads[3]])


def test_trailing_steps_with_batch_size_zero():
    """As in torch, they change nothing, in either direction."""
    for cell in OPERATOR_CELLS:
        for arguments in [sample(cell, packed=True, L=2, D=2), sample(cell, packed=True)]:
            padded = list(arguments)
            padded[SIZES] = torch.cat([arguments[SIZES], host_tensor([0, 0])])
            for found, expected in zip(call(padded), call(arguments), strict=True):
                assert torch.equal(found, expected)


@st.composite
def tensor_change(draw):
    """A random function that changes one tensor of a call."""
    kind = draw(st.sampled_from(["narrow", "repeat", "dim", "dtype", "view", "empty", "spread"]))
    dim, n = draw(st.integers(0, 2)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float64, torch.bfloat16, torch.int32, torch.bool]))

    def change(t):
        d = dim % max(t.dim(), 1)
        return {
            "narrow": lambda: t.narrow(d, 0, max(t.size(d) - n, 0)),
            "repeat": lambda: torch.cat([t] * (n + 1), d),
            "dim": lambda: t.unsqueeze(d),
            "dtype": lambda: t.to(dtype),
            "view": lambda: t.flatten().clone().expand(n, t.numel()).t(),
            "empty": lambda: t[:0],
            "spread": lambda: spread(t),
        }[kind]()

    return change


NON_TENSORS = {
    CELL: st.sampled_from(["", "LSTM", "lstm ", *OPERATOR_CELLS]),
    SIZES: st.lists(st.integers(-1, 4) | st.sampled_from([2**62, -(2**63)]), max_size=6),
    BIAS: st.booleans(),
    LAYERS_: st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4),
    BIDIRECTIONAL: st.booleans(),
    DROPOUT: st.floats(),
}


def test_random_change_raises_or_is_correct(pytestconfig):
    check_examples(
        pytestconfig, st.data(), change_forward, max(1, example_count(pytestconfig) * 3 // 5)
    )


def change_forward(data):
    torch.manual_seed(0)  # so that hypothesis can replay an example
    cell = data.draw(st.sampled_from(sorted(OPERATOR_CELLS)))
    packed = data.draw(st.booleans())
    arguments = list(sample(cell, packed=packed, L=2, D=2))
    change = data.draw(tensor_change())
    position = data.draw(st.sampled_from([X, H0, C0, SIZES, WEIGHTS, *NON_TENSORS]))
    if position == WEIGHTS:
        i = data.draw(st.integers(0, len(arguments[WEIGHTS]) - 1))
        arguments[WEIGHTS] = with_weight(arguments, i, change(arguments[WEIGHTS][i]))
    elif position in NON_TENSORS and (position != SIZES or data.draw(st.booleans())):
        value = data.draw(NON_TENSORS[position])
        arguments[position] = host_tensor(value) if position == SIZES else value
    elif arguments[position] is not None:
        arguments[position] = change(arguments[position])
    try:
        results = call(arguments)
    except ERRORS:
        return
    *arguments, bias, layers, bidirectional, _, _, _ = arguments
    options = {"has_biases": bias, "num_layers": layers, "bidirectional": bidirectional}
    for found, exact in zip(results[:3], reference.run(*arguments, **options), strict=True):
        if exact is not None:
            torch.testing.assert_close(found, exact)


def test_random_change_of_backward_raises_or_is_correct(pytestconfig):
    check_examples(
        pytestconfig, st.data(), change_backward, max(1, example_count(pytestconfig) * 2 // 5)
    )


def change_backward(data):
    torch.manual_seed(0)
    cell = data.draw(st.sampled_from(sorted(OPERATOR_CELLS)))
    packed = data.draw(st.booleans())
    arguments = backward_arguments(sample(cell, packed=packed, L=2, dropout=0.5, train=True))
    change = data.draw(tensor_change())
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    position = data.draw(st.sampled_from([*tensors, 7]))
    changed = list(arguments)
    if position == 7:
        i = data.draw(st.integers(0, len(arguments[7]) - 1))
        changed[7] = [change(w) if i == k else w for k, w in enumerate(arguments[7])]
    else:
        changed[position] = change(arguments[position])
    try:
        results = ops.backward(*changed)
    except ERRORS:
        return
    # The only valid changes are to the layout: the values are the same.
    for found, expected in zip(flat(results), flat(ops.backward(*arguments)), strict=True):
        assert torch.equal(found, expected)


DATA = torch.randn(6, 4)


@pytest.mark.parametrize("kind", LAYERS)
def test_invalid_packed_sequences(kind):
    # Not compared with torch, which reads out of bounds for some of these.
    for bidirectional in [False, True]:
        ours, _ = pair(kind, 4, 8, bidirectional=bidirectional)
        for sizes, text in [
            ([1, 2, 3], "must not increase"),
            ([0, 3, 3], "must not increase"),
            ([3, -1, 4], r"narrow\(\): length must be non-negative"),
            ([2, 2, 2, -1], r"narrow\(\): length must be non-negative"),
            ([3, 3, 3], r"start \(6\) \+ length \(3\) exceeds dimension size \(6\)"),
            ([7], r"start \(0\) \+ length \(7\) exceeds dimension size \(6\)"),
            ([3, 2], "packed data has 6 rows"),
            ([0, 0], "packed data has 6 rows"),
        ]:
            with pytest.raises(RuntimeError, match=text):
                ours(PackedSequence(DATA, host_tensor(sizes)))


BATCH_SIZES = {
    "empty": host_tensor([]),
    "scalar": host_tensor(6),
    "matrix": host_tensor([[3, 3]]),
    "float": host_tensor([3.0, 3.0], torch.float32),
    "int32": host_tensor([3, 3], torch.int32),
    "meta": torch.tensor([3, 3], device="meta"),
    "2**62": host_tensor([2**62, 2**62]),
}


@pytest.mark.parametrize("sizes", BATCH_SIZES.values(), ids=BATCH_SIZES)
def test_batch_sizes_that_torch_rejects(sizes):
    """Invalid batch_sizes that torch's module rejects: the same exception and message."""
    for kind in LAYERS:
        errors = []
        for layer in pair(kind, 4, 8):
            with pytest.raises(ERRORS) as error:
                layer(PackedSequence(DATA, sizes))
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_trailing_steps_with_batch_size_zero_in_modules(kind):
    """torch accepts them at the end of a batch."""
    for bidirectional in [False, True]:
        ours, theirs = pair(kind, 4, 8, bidirectional=bidirectional)
        for sizes in [[3, 3, 0], [2, 2, 1, 1, 0, 0]]:
            packed = PackedSequence(DATA, host_tensor(sizes))
            results = [layer(packed) for layer in [ours, theirs]]
            for a, b in zip(*map(flat, results), strict=True):
                torch.testing.assert_close(a, b)
            for output, _ in results:
                output.data.sum().backward()
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
                a.grad = b.grad = None


@pytest.mark.parametrize("kind", LAYERS)
def test_invalid_states(kind):
    """The exceptions and messages are those of torch's layers."""
    ours, theirs = pair(kind, 4, 8, num_layers=2)
    R = ours.proj_size or 8

    def state(layers=2, batch=3, dtype=torch.float32, device=None, width=R):
        h = torch.zeros(layers, batch, width, dtype=dtype, device=device)
        c = torch.zeros(layers, batch, 8, dtype=dtype, device=device)
        return (h, c) if kind.startswith("lstm") else h

    packed = pack([torch.randn(n, 4) for n in [5, 3, 2]])
    for x in [torch.randn(5, 3, 4), packed]:
        for hx in [
            state(layers=1),
            state(layers=4),
            state(batch=2),
            state(width=R + 1),
            state(dtype=torch.float64),
            state(device="meta"),
        ]:
            expected = None  # torch broadcasts or ignores excess rows; fastrnn must not
            # On the GPU, torch with too few rows for a sorted batch fails a device-side assertion,
            # after which the process can no longer use CUDA.
            if not (DEVICE.type == "cuda" and x is packed and flat(hx)[0].size(1) == 2):
                try:
                    theirs(x, hx)
                except ERRORS as error:
                    expected = error
            with pytest.raises(ERRORS) as found:
                ours(x, hx)
            if expected is not None:
                assert type(found.value) is type(expected)
                assert str(found.value) == str(expected)


def test_all_arguments_on_meta():
    output, *_ = call(each(LSTM, lambda t: t.to("meta")))
    assert output.is_meta
    assert output.shape == (4, 3, 34)


@pytest.mark.parametrize("position", [X, H0, C0, SIZES, WEIGHTS])
def test_storage_that_is_too_small(position):
    """Sharded training frees the storages of parameters: nothing reads past their ends."""
    arguments = list(sample("lstm", packed=True))
    tensor = arguments[position][1] if position == WEIGHTS else arguments[position]
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    with pytest.raises(RuntimeError, match="needs a storage of"):
        call(arguments)
