"""Random layers of random sizes and options compared with torch's; the same cases in every run.

`make fuzz` draws other cases, for as long as you like. A failing case is minimised and printed as
one line: paste it into a test of this file, or after `from test_fuzz import *`.
"""

import contextlib
import copy
from dataclasses import dataclass

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    LOW,
    avoid_relu_kinks,
    cell_pair,
    cell_state,
    check_examples,
    example_count,
    flat,
    gradients,
    leaves,
    mapped,
    pack,
    pair,
    random_state,
)
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

import fastrnn

DTYPES = [torch.float32, torch.float64, *LOW]
#: Memory layouts of a tensor, all with the same values.
STRIDES = ["plain", "transposed", "every second", "one row for all", "an offset"]

sizes = st.integers(1, 70)
projected_sizes = st.integers(2, 70)  # proj_size must be smaller
flags = st.booleans()


@dataclass(frozen=True)
class Case:
    """A layer, or a cell if T is 0, and its arguments."""

    kind: str
    T: int
    B: int
    I: int
    H: int
    dtype: torch.dtype = torch.float32
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] = ()  # of the sequences, if the input is packed
    state: bool = True
    strides: str = "plain"
    requires_grad: int = -1  # one bit for each of the input, the states and the weights
    threads: int = 2
    fast_path: bool = True  # else forward runs in Python and calls the operators
    recompute: bool = False
    seed: int = 0


@st.composite
def layer_cases(draw: st.DrawFn) -> Case:
    B = draw(st.one_of(st.integers(1, 9), st.integers(1, 40)))
    T = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(list(LAYERS)))
    lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B)) if draw(flags) else []
    return Case(
        kind=kind, T=T, B=B, I=draw(sizes),
        H=draw(projected_sizes if kind == "lstm_proj" else sizes),
        dtype=draw(st.sampled_from(DTYPES)), layers=draw(st.sampled_from([1, 1, 2, 3])),
        bidirectional=draw(flags), bias=draw(flags), batch_first=draw(flags),
        lengths=tuple(lengths), state=draw(flags), strides=draw(st.sampled_from(STRIDES)),
        requires_grad=draw(st.sampled_from([-1, 0, 1, *range(2, 64)])),
        threads=draw(st.integers(1, 3)), fast_path=draw(flags), recompute=draw(flags),
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@st.composite
def cell_cases(draw: st.DrawFn) -> Case:
    return Case(
        kind=draw(st.sampled_from(list(CELLS))), T=0, B=draw(st.integers(0, 40)), I=draw(sizes),
        H=draw(sizes), dtype=draw(st.sampled_from(DTYPES)), bias=draw(flags), state=draw(flags),
        strides=draw(st.sampled_from(STRIDES)), requires_grad=draw(st.integers(-1, 64)),
        threads=draw(st.integers(1, 3)), fast_path=draw(flags), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


def with_layout(values: Tensor, strides: str) -> Tensor:
    """The values in the named layout; "one row for all" repeats row 0 of the last two dims."""
    if strides == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "every second":
        return torch.stack([values, values], -1)[..., 0]
    if strides == "one row for all":
        return values[..., :1, :].expand_as(values)
    if strides == "an offset":
        buffer = values.new_zeros(values.numel() + 1)
        return buffer[1:].view_as(values).copy_(values)
    return values


def check(case: Case) -> None:
    """Compares values and gradients with torch's, both measured against a float64 reference."""
    torch.manual_seed(case.seed)
    torch.set_num_threads(case.threads)
    if case.T:
        options = {"num_layers": case.layers, "bidirectional": case.bidirectional}
        options |= {"bias": case.bias, "batch_first": case.batch_first, "dtype": case.dtype}
        ours, theirs = pair(case.kind, case.I, case.H, **options)
        ours.recompute = case.recompute
        rows = (case.B, case.T) if case.batch_first else (case.T, case.B)
        x = with_layout(torch.randn(*rows, case.I, dtype=case.dtype), case.strides)
        if case.lengths:
            alone = x.unbind(0 if case.batch_first else 1)
            x = pack([one[:n] for one, n in zip(alone, case.lengths, strict=True)])
        state = random_state(theirs, case.B) if case.state else None
    else:
        ours, theirs = cell_pair(case.kind, case.I, case.H, bias=case.bias, dtype=case.dtype)
        x = with_layout(torch.randn(case.B, case.I, dtype=case.dtype), case.strides)
        state = cell_state(theirs, case.B) if case.state else None
    avoid_relu_kinks(case.kind if case.bias else "", ours, theirs)
    # At a pre-activation of about 0, rounding decides whether a ReLU unit has a gradient.
    smooth = case.kind != "rnn_relu" or (case.bias and case.dtype not in LOW)
    requires_grad = case.requires_grad if smooth else 0

    def results(layer: torch.nn.Module, args: object, fast_path: bool = True) -> list[Tensor]:
        args = leaves(args) if requires_grad else args
        forward = layer if fast_path else type(layer).forward.__wrapped__.__get__(layer)
        with contextlib.nullcontext() if requires_grad else torch.no_grad():
            outputs = flat(forward(*args))
        inputs = [*flat(args), *layer.parameters()]
        inputs = [t for i, t in enumerate(inputs) if requires_grad >> i & 1]
        return [*outputs, *(gradients(outputs, inputs) if inputs else [])]

    args = (x, state)
    ours_found = results(ours, args, case.fast_path)
    expected = results(theirs, args)
    exact = results(copy.deepcopy(theirs).double(), mapped(args, Tensor.double))
    for found, their, true in zip(ours_found, expected, exact, strict=True):
        assert found.dtype == their.dtype
        assert found.shape == their.shape
        if true.numel() == 0:
            continue
        # Allowed: four times torch's error, as that may be small by chance, plus rounding. Rounding
        # is relative to the largest result, or to 1, about the size of the terms of a sum that
        # cancels. In float64 the reference is torch's own result, so torch's error is 0. There the
        # rounding of both counts: a sum of n terms of random signs has n roundings of partial sums
        # of size up to sqrt(n).
        error, theirs_error = ((t.double() - true).abs().max() for t in (found, their))
        units = 4 if case.dtype in LOW else 16
        if case.dtype == torch.float64:
            units = max(units, max(case.T, 1) * case.B)
        largest = true.abs().max().clamp(min=1)
        allowed = 4 * theirs_error + units * torch.finfo(case.dtype).eps * largest
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def check_and_print(case: Case) -> None:
    note(f"check({case!r})")
    check(case)


def test_layers(pytestconfig):
    check_examples(pytestconfig, layer_cases(), check_and_print, example_count(pytestconfig))


def test_cells(pytestconfig):
    check_examples(
        pytestconfig, cell_cases(), check_and_print, max(1, example_count(pytestconfig) // 5)
    )


@pytest.mark.slow
@pytest.mark.once
def test_failing_case_is_printed_as_one_line(pytestconfig, monkeypatch):
    """An injected error is found and minimised."""
    lstm = fastrnn.LSTM.__call__

    def wrong(self, x, state=None):
        output, state = lstm(self, x, state)
        return (output + (self.hidden_size > 20) if isinstance(output, Tensor) else output), state

    monkeypatch.setattr(fastrnn.LSTM, "__call__", wrong)
    with pytest.raises(AssertionError, match="off by") as failure:
        check_examples(pytestconfig, layer_cases(), check_and_print, 500)
    (line,) = [n for n in failure.value.__notes__ if n.startswith("check(Case(")]
    case = eval(line.removeprefix("check(").removesuffix(")"), {**globals(), "torch": torch})
    assert (case.kind, case.H, case.layers, case.lengths) == ("lstm", 21, 1, ())
    with pytest.raises(AssertionError, match="off by"):
        check(case)
