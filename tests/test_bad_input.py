"""Anything at all given to the operators: an exception that names it, or a right answer."""

import pytest
import torch
from helpers import LAYERS, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import backward_arguments, sample
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import ops, reference

ERRORS = (RuntimeError, ValueError, TypeError, IndexError)  # NotImplementedError is a RuntimeError
CELL, X, H0, C0, WEIGHTS, SIZES, BIAS, LAYERS_, BIDIRECTIONAL, DROPOUT, TRAIN = range(11)


def call(arguments, place=None, value=None, keep=False):
    arguments = list(arguments)
    if place is not None:
        arguments[place] = value
    return ops.forward(*arguments, keep)


def with_weight(arguments, i, value):
    weights = list(arguments[WEIGHTS])
    weights[i] = value
    return weights


LSTM = sample("lstm", L=2, D=2)
PACKED = sample("lstm", packed=True)


@pytest.mark.parametrize(
    ("arguments", "place", "value", "message"),
    [
        (LSTM, CELL, "lstn", "no cell is called 'lstn'"),
        (LSTM, X, LSTM[X][0], "input must have 3 dimensions, got 2"),
        (LSTM, X, LSTM[X][..., :-1], r"Expected weight_ih size \[68, 4\], got \[68, 5\]"),
        (LSTM, X, LSTM[X][:0], "Expected sequence length to be larger than 0 in RNN"),
        (LSTM, X, LSTM[X][:, :2], r"Expected hidden\[0\] size \[4, 2, 17\], got \[4, 3, 17\]"),
        (LSTM, X, LSTM[X].double(), "same dtype, but got Double and Float"),
        (LSTM, X, LSTM[X].long(), "same dtype, but got Long and Float"),
        (LSTM, X, LSTM[X].to_sparse(), "has layout Sparse"),
        (LSTM, X, LSTM[X].to("meta"), "not at the same device"),
        (LSTM, H0, LSTM[H0][0], "3 dimensions, got 2"),
        (LSTM, H0, LSTM[H0][:2], r"Expected hidden\[0\] size \[4, 3, 17\]"),
        (LSTM, H0, LSTM[H0].double(), "same dtype"),
        (LSTM, H0, LSTM[H0].to_mkldnn(), "has layout Mkldnn"),
        (LSTM, H0, LSTM[H0].to("meta"), "found input tensor at cpu and hidden tensor at meta"),
        (LSTM, C0, None, "lstm expects two hidden states"),
        (LSTM, C0, LSTM[C0][:, :2], r"Expected hidden\[1\] size \[4, 3, 17\]"),
        (LSTM, C0, torch.zeros(1, 0, 2**61), "incorrect number of RNN parameters|Expected"),
        (LSTM, C0, torch.zeros(1).expand(4, 3, 2**40), "incorrect number of RNN parameters|hidden"),
        (sample("gru"), C0, torch.zeros(1, 3, 17), "gru expects one hidden state"),
        (LSTM, WEIGHTS, [], "incorrect number of RNN parameters"),
        (LSTM, WEIGHTS, LSTM[WEIGHTS][:-1], "incorrect number of RNN parameters"),
        (LSTM, WEIGHTS, LSTM[WEIGHTS] * 2, "incorrect number of RNN parameters"),
        (LSTM, BIAS, False, "incorrect number of RNN parameters|Expected weight"),
        (LSTM, LAYERS_, 0, "num_layers must be greater than zero"),
        (LSTM, LAYERS_, -2, "num_layers must be greater than zero"),
        (LSTM, LAYERS_, 1, "incorrect number of RNN parameters"),
        (LSTM, LAYERS_, 2**62, "incorrect number of RNN parameters"),
        (LSTM, BIDIRECTIONAL, False, "incorrect number of RNN parameters"),
        (LSTM, DROPOUT, -0.1, "between 0 and 1, but got -0.1"),
        (LSTM, DROPOUT, 1.1, "between 0 and 1, but got 1.1"),
        (LSTM, DROPOUT, float("nan"), "between 0 and 1, but got nan"),
        (LSTM, SIZES, torch.tensor([3, 1]), "input must have 2 dimensions, got 3"),
        (PACKED, SIZES, None, "input must have 3 dimensions, got 2"),
        (PACKED, SIZES, torch.tensor([1, 3, 3, 2]), "must not increase"),
        (PACKED, SIZES, torch.tensor([3, -1, 4]), "narrow.*length must be non-negative"),
        (PACKED, SIZES, torch.tensor([3, 3, 3, 3]), "exceeds dimension size"),
        (PACKED, SIZES, torch.tensor([2**62, 2**62]), "exceeds dimension size"),
        (PACKED, SIZES, torch.tensor([3, 3]), "sum to 6 but the packed data has 9 rows"),
        (PACKED, SIZES, torch.tensor([0, 0]), "sum to 0 but"),
        (PACKED, SIZES, torch.tensor([], dtype=torch.int64), "batch_sizes can not be empty"),
        (PACKED, SIZES, torch.tensor([[3, 3, 2, 1]]), "batch_sizes must have 1 dimension"),
        (PACKED, SIZES, torch.tensor([3.0, 3, 2, 1]), "expected scalar type Long but found Float"),
        (PACKED, SIZES, torch.tensor([3, 3, 2, 1], dtype=torch.int32), "Long but found Int"),
        (PACKED, SIZES, torch.tensor([3, 3, 2, 1], device="meta"), "should always be on CPU"),
        (PACKED, SIZES, torch.tensor([4, 3, 1, 1]), r"Expected hidden\[0\] size \[1, 4, 17\]"),
    ],
)
def test_one_wrong_argument(arguments, place, value, message):
    call(arguments)
    for keep in [False, True]:
        with pytest.raises(ERRORS, match=message):
            call(arguments, place, value, keep)


@pytest.mark.parametrize("kind", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"])
def test_one_wrong_weight(kind):
    arguments = sample("lstm", L=2, D=2, P=3)
    place = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"].index(kind)
    for i in range(place, 20, 5):  # in each layer and direction
        w = arguments[WEIGHTS][i]
        for value in [w[:-1], w[..., :-1], w[0], w[None], w.t() if w.dim() == 2 else w[::2]]:
            with pytest.raises(RuntimeError, match=rf"Expected {kind} |weight_ih with"):
                call(arguments, WEIGHTS, with_weight(arguments, i, value))
        with pytest.raises(RuntimeError, match="same dtype"):
            call(arguments, WEIGHTS, with_weight(arguments, i, w.double()))
        with pytest.raises(RuntimeError, match="parameter tensor has layout Sparse"):
            call(arguments, WEIGHTS, with_weight(arguments, i, w.to_sparse()))
        with pytest.raises(RuntimeError, match="input tensor at cpu and parameter tensor at meta"):
            call(arguments, WEIGHTS, with_weight(arguments, i, w.to("meta")))


def test_unsupported_dtypes_and_projections():
    ints = [a.to(torch.int64) if isinstance(a, torch.Tensor) else a for a in LSTM]
    ints[WEIGHTS] = [w.to(torch.int64) for w in LSTM[WEIGHTS]]
    with pytest.raises(RuntimeError, match="dtype Long is not supported, expected Float"):
        call(ints)
    wide = sample("lstm", P=3)
    with pytest.raises(RuntimeError, match=r"Expected weight|smaller than hidden_size"):
        call(wide, H0, torch.zeros(1, 3, 40))


BACKWARD = backward_arguments(sample("lstm", L=2, D=2, dropout=0.5, train=True))
NAMES = ["grad_output", "grad_h_n", "grad_c_n", "hidden", "saved", "c", "noise"]
PLACES = [1, 2, 3, 13, 14, 15, 16]


@pytest.mark.parametrize(("name", "place"), list(zip(NAMES, PLACES, strict=True)), ids=NAMES)
def test_one_wrong_argument_of_backward(name, place):
    good = BACKWARD[place]
    ops.backward(*BACKWARD)
    wrong = [good[:-1], good[..., :-1], good[None], good.to(torch.int16), good.to("meta")]
    for value in [*wrong, good.to_sparse()]:
        arguments = list(BACKWARD)
        arguments[place] = value
        with pytest.raises(ERRORS, match=rf"{name}"):
            ops.backward(*arguments)


def test_wanted_and_absent_gradients():
    with pytest.raises(ValueError, match="wanted has 2 elements, expected 19"):
        ops.backward(*BACKWARD[:-1], [True, False])
    gru = list(backward_arguments(sample("gru")))
    gru[3] = torch.zeros(1, 3, 17)
    with pytest.raises(RuntimeError, match="gru has no c_n"):
        ops.backward(*gru)
    nothing = list(BACKWARD)
    nothing[1:4] = [None] * 3
    grads = ops.backward(*nothing)
    assert all(not g.any() for g in [*grads[:3], *grads[3]])


@pytest.mark.parametrize("cell", fastrnn.CELLS)
def test_odd_layouts_give_right_answers(cell):
    """Expanded, overlapping, transposed and sliced tensors, and batch_sizes with strides."""
    cell, x, h0, c0, weights, _, bias, *_ = sample(cell)
    x = torch.randn(5).expand(4, 3, 5)
    h0 = torch.randn(17).expand(1, 3, 17)
    c0 = None if c0 is None else torch.randn(20).as_strided((1, 3, 17), (0, 1, 1))
    weights = [0.2 * torch.randn(w.shape[::-1]).permute(*range(w.dim())[::-1]) for w in weights]
    options = {"has_biases": bias, "num_layers": 1, "bidirectional": False}
    found = fastrnn.functional.rnn(cell, x, h0, c0, weights, **options)
    exact = reference.run(cell, x, h0, c0, weights, **options)
    torch.testing.assert_close(found[0], exact[0])
    sizes = torch.tensor([3, 9, 3, 9, 2, 9, 1, 9])[::2]
    data = torch.randn(5, 9).t()
    found = fastrnn.functional.rnn(cell, data, h0, c0, weights, sizes, **options)
    exact = reference.run(cell, data, h0, c0, weights, sizes.contiguous(), **options)
    torch.testing.assert_close(found[0], exact[0])


@st.composite
def a_change(draw):
    """Something that is done to one tensor of a call."""
    kind = draw(st.sampled_from(["narrow", "repeat", "dim", "dtype", "view", "empty"]))
    dim, n = draw(st.integers(0, 2)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float64, torch.bfloat16, torch.int32, torch.bool]))

    def change(t):
        d = dim % t.dim()
        return {
            "narrow": lambda: t.narrow(d, 0, max(t.size(d) - n, 0)),
            "repeat": lambda: torch.cat([t] * (n + 1), d),
            "dim": lambda: t.unsqueeze(d),
            "dtype": lambda: t.to(dtype),
            "view": lambda: t.flatten().clone().expand(n, t.numel()).t(),
            "empty": lambda: t[:0],
        }[kind]()

    return change


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_change_of_a_tensor_raises_or_computes(data):
    cell = data.draw(st.sampled_from(sorted(fastrnn.CELLS)))
    packed = data.draw(st.booleans())
    arguments = list(sample(cell, packed=packed, L=2, D=2))
    change = data.draw(a_change())
    place = data.draw(st.sampled_from([X, H0, C0, SIZES, WEIGHTS]))
    if place == WEIGHTS:
        i = data.draw(st.integers(0, len(arguments[WEIGHTS]) - 1))
        arguments[WEIGHTS] = with_weight(arguments, i, change(arguments[WEIGHTS][i]))
    elif arguments[place] is not None:
        arguments[place] = change(arguments[place])
    options = {"has_biases": True, "num_layers": 2, "bidirectional": True}
    try:
        output = call(arguments)[0]
    except ERRORS:
        return
    cell, x, h0, c0, weights, sizes = arguments[:6]
    exact = reference.run(cell, x, h0, c0, weights, sizes, **options)[0]
    torch.testing.assert_close(output, exact)


DATA = torch.randn(6, 4)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_through_the_modules(kind):
    ours, theirs = pair(kind, 4, 8)
    for sizes, text in [
        ([1, 2, 3], "must not increase"),
        ([3, -1, 4], "narrow"),
        ([3, 3, 3], "exceeds dimension size"),
        ([3, 2], "packed data has 6 rows"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ours(PackedSequence(DATA, torch.tensor(sizes)))
    # torch takes steps without rows, at the end, for what they are.
    for sizes in [[3, 3, 0], [2, 2, 1, 1, 0, 0]]:
        packed = PackedSequence(DATA, torch.tensor(sizes))
        torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data)
        for layer in [ours, theirs]:
            layer(packed)[0].data.sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            a.grad = b.grad = None


@pytest.mark.parametrize("kind", LAYERS)
def test_states_through_the_modules(kind):
    """The texts are torch's: its layers are given the same."""
    ours, theirs = pair(kind, 4, 8, num_layers=2)
    R = ours.proj_size or 8

    def state(layers=2, batch=3, dtype=torch.float32, device="cpu", width=R):
        h = torch.zeros(layers, batch, width, dtype=dtype, device=device)
        c = torch.zeros(layers, batch, 8, dtype=dtype, device=device)
        return (h, c) if kind.startswith("lstm") else h

    packed = pack_sequence([torch.randn(n, 4) for n in [5, 3, 2]])
    for x in [torch.randn(5, 3, 4), packed]:
        for hx in [
            state(layers=1),
            state(layers=4),
            state(batch=2),
            state(width=R + 1),
            state(dtype=torch.float64),
            state(device="meta"),
        ]:
            try:
                theirs(x, hx)
            except ERRORS as error:
                expected = error
            else:  # torch broadcasts, or ignores what is too much; ours must not
                expected = None
            with pytest.raises(ERRORS) as found:
                ours(x, hx)
            if expected is not None:
                assert type(found.value) is type(expected)
                assert str(found.value) == str(expected)


def test_no_kernels_for_a_device_is_said():
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in LSTM]
    meta[WEIGHTS] = [w.to("meta") for w in LSTM[WEIGHTS]]
    assert call(meta)[0].is_meta  # by the fake kernel
    assert nn.LSTM(4, 8).to("meta")(torch.empty(5, 3, 4, device="meta"))[0].is_meta


@pytest.mark.parametrize("place", [X, H0, C0, SIZES, WEIGHTS])
def test_a_storage_that_was_freed(place):
    """As sharded training frees the storage of parameters: no read past its end."""
    arguments = list(sample("lstm", packed=True))
    tensor = arguments[place][1] if place == WEIGHTS else arguments[place]
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    with pytest.raises(RuntimeError, match="needs a storage of"):
        call(arguments)
