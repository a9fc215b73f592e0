"""Wrong arguments raise the same exception types and messages as torch's classes."""

import pytest
import torch
from helpers import device, ragged
from module_cases import CELLS, LAYERS, NAMES, B, H, I, T, build
from torch import nn

import fastrnn

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once


BAD_LAYERS = {
    "nothing": lambda new: new(),
    "one_size": lambda new: new(I),
    "float_size": lambda new: new(1.5, H),
    "float_hidden": lambda new: new(I, 4.0),
    "zero_input": lambda new: new(0, H),
    "negative_input": lambda new: new(-1, H),
    "zero_hidden": lambda new: new(I, 0),
    "zero_layers": lambda new: new(I, H, num_layers=0),
    "bias_number": lambda new: new(I, H, bias=1),
    "batch_first_text": lambda new: new(I, H, batch_first="yes"),
    "dropout_above_1": lambda new: new(I, H, dropout=1.5),
    "dropout_negative": lambda new: new(I, H, dropout=-0.1),
    "dropout_bool": lambda new: new(I, H, dropout=True),
    "dropout_text": lambda new: new(I, H, dropout="half"),
    "unknown_argument": lambda new: new(I, H, heads=2),
    "bad_dtype": lambda new: new(I, H, dtype=torch.int64),
    "bad_device": lambda new: new(I, H, device="abacus"),
}
BAD_CELLS = {
    "nothing": lambda new: new(),
    "one_size": lambda new: new(I),
    "negative_input": lambda new: new(-1, H),
    "text_hidden": lambda new: new(I, "four"),
    "unknown_argument": lambda new: new(I, H, num_layers=2),
    "bad_dtype": lambda new: new(I, H, dtype=torch.int64),
}
BAD_CONSTRUCTIONS = [
    *((name, how, BAD_LAYERS[how]) for name in ("RNN", "LSTM", "GRU") for how in BAD_LAYERS),
    *((name, how, BAD_CELLS[how]) for name in NAMES[3:] for how in BAD_CELLS),
    ("RNN", "unknown_nonlinearity", lambda new: new(I, H, nonlinearity="sin")),
    ("RNN", "unknown_nonlinearity_positional", lambda new: new(I, H, 1, "sin")),
    ("RNN", "proj_size", lambda new: new(I, H, proj_size=2)),
    ("GRU", "proj_size", lambda new: new(I, H, proj_size=2)),
    ("LSTM", "proj_size_too_large", lambda new: new(I, H, proj_size=H)),
    ("LSTM", "proj_size_negative", lambda new: new(I, H, proj_size=-1)),
]


def assert_same_error(ours, theirs):
    """Both raise the same exception type with the same message."""
    with pytest.raises(Exception) as their_error:
        theirs()
    with pytest.raises(their_error.type) as our_error:
        ours()
    assert our_error.type is their_error.type
    assert str(our_error.value) == str(their_error.value)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize(
    ("name", "misuse"),
    [pytest.param(name, misuse, id=f"{name}-{how}") for name, how, misuse in BAD_CONSTRUCTIONS],
)
def test_construction_errors(name, misuse):
    try:
        misuse(getattr(nn, name))
    except Exception:
        pass
    else:  # an old torch
        misuse(getattr(fastrnn, name))
        pytest.skip("torch takes these arguments")
    assert_same_error(lambda: misuse(getattr(fastrnn, name)), lambda: misuse(getattr(nn, name)))


def states(module, *batch, H=H, dtype=torch.float32, rows=None):
    """States of the given sizes for the module: (h, c) for an LSTM, else h."""
    lstm = isinstance(module, nn.LSTM | nn.LSTMCell)
    if isinstance(module, nn.RNNBase):
        rows = module.num_layers * (1 + module.bidirectional) if rows is None else rows
        batch = (rows, *batch)
    h = torch.zeros(*batch, getattr(module, "proj_size", 0) or H, dtype=dtype)
    return (h, torch.zeros(*batch, H, dtype=dtype)) if lstm else h


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def only_c_wrong(m):
    h, c = states(m, B)
    return m(zeros(B, B, I), (h, c[..., 1:]))


BAD_LAYER_CALLS = {
    "no_input": lambda m: m(),
    "none": lambda m: m(None),
    "a_list": lambda m: m([1.0, 2.0]),
    "unknown_argument": lambda m: m(zeros(B, B, I), steps=[1]),
    "0d": lambda m: m(zeros()),
    "1d": lambda m: m(zeros(I)),
    "4d": lambda m: m(zeros(1, B, B, I)),
    "input_size": lambda m: m(zeros(B, B, I + 1)),
    "input_size_unbatched": lambda m: m(zeros(T, I + 1)),
    "input_size_packed": lambda m: m(ragged([2, 3], I + 1)),
    "dtype_double": lambda m: m(zeros(B, B, I, dtype=torch.float64)),
    "dtype_long": lambda m: m(zeros(B, B, I, dtype=torch.int64)),
    "dtype_packed": lambda m: m(ragged([2, 3], I, torch.float64)),
    "state_size": lambda m: m(zeros(B, B, I), states(m, B, H=H + 1)),
    "state_batch": lambda m: m(zeros(B, B, I), states(m, B + 1)),
    "state_layers": lambda m: m(zeros(B, B, I), states(m, B, rows=9)),
    "state_layers_packed": lambda m: m(ragged([2, 3], I), states(m, B, rows=9)),
    "state_batch_packed": lambda m: m(ragged([2, 3], I), states(m, 1)),
    "state_unbatched_for_batch": lambda m: m(zeros(B, B, I), states(m)),
    "state_batched_for_unbatched": lambda m: m(zeros(T, I), states(m, 1)),
    "state_rows_unbatched": lambda m: m(zeros(T, I), states(m, rows=9)),
    "state_dtype": lambda m: m(zeros(B, B, I), states(m, B, dtype=torch.float64)),
    "state_of_a_number": lambda m: m(zeros(B, B, I), 0.0),
}
BAD_CELL_CALLS = {
    "no_input": lambda m: m(),
    "none": lambda m: m(None),
    "a_list": lambda m: m([1.0, 2.0]),
    "unknown_argument": lambda m: m(zeros(B, I), steps=[1]),
    "0d": lambda m: m(zeros()),
    "3d": lambda m: m(zeros(T, B, I)),
    "input_size": lambda m: m(zeros(B, I + 1)),
    "input_size_unbatched": lambda m: m(zeros(I + 1)),
    "dtype_double": lambda m: m(zeros(B, I, dtype=torch.float64)),
    "dtype_long": lambda m: m(zeros(B, I, dtype=torch.int64)),
    "state_size": lambda m: m(zeros(B, I), states(m, B, H=H + 1)),
    "state_batch": lambda m: m(zeros(B, I), states(m, B + 1)),
    "state_1d_for_batch": lambda m: m(zeros(B, I), states(m)),
    "state_3d": lambda m: m(zeros(B, I), states(m, 1, B)),
    "state_2d_for_unbatched": lambda m: m(zeros(I), states(m, B)),
    "state_dtype": lambda m: m(zeros(B, I), states(m, B, dtype=torch.float64)),
    "state_of_a_number": lambda m: m(zeros(B, I), 0.0),
}
BAD_CALLS = [
    *((case, how, BAD_LAYER_CALLS[how]) for case in LAYERS for how in BAD_LAYER_CALLS),
    *((case, how, BAD_CELL_CALLS[how]) for case in CELLS for how in BAD_CELL_CALLS),
    ("lstm", "c_size", only_c_wrong),
    ("lstm_proj", "c_size", only_c_wrong),
]


@pytest.mark.parametrize(
    ("case", "misuse"),
    [pytest.param(case, misuse, id=f"{case}-{how}") for case, how, misuse in BAD_CALLS],
)
def test_call_errors(case, misuse):
    ours, theirs = build(fastrnn, case).float(), build(nn, case).float()
    if device() == "cuda" and misuse is BAD_LAYER_CALLS["state_batch_packed"]:
        # torch's layer fails a device-side assertion, which ends the CUDA context.
        with pytest.raises(
            RuntimeError, match=r"Expected hidden size \(., 2, .\), got \[., 1, .\]"
        ):
            misuse(ours)
        return
    assert_same_error(lambda: misuse(ours), lambda: misuse(theirs))


def test_unknown_nonlinearity_set_later():
    ours, theirs = build(fastrnn, "rnn_cell"), build(nn, "rnn_cell")
    ours.nonlinearity = theirs.nonlinearity = "sin"
    assert_same_error(lambda: ours(zeros(B, I)), lambda: theirs(zeros(B, I)))
