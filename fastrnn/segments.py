"""`resets=` and `lengths=`: layers on sequences that are cut, as packed data.

    output, hx = layer(input, hx, resets=resets)      # bool [T, B], in the layout of the input
    output, hx = layer(input, hx, lengths=lengths)    # int64 [B], 1 to T, in any order

Where ``resets[t, b]`` is true, no state and no gradient passes between steps t - 1 and t of row b:
the state that enters step t is zero, or what the cell's ``initial`` says, and in the reverse
direction the one that enters step t - 1. resets are [B, T] with ``batch_first``, [T] for unbatched
input, and a PackedSequence for one. A reset of step 0 replaces the given state.

``lengths[b]`` is the number of steps of row b. The results are those of
``torch.nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)`` and
``pad_packed_sequence``: zeros past the end, the last states are each row's, and the reverse
direction begins at each row's end.

There are two ways to compute them:

- as events (fastrnn/events.py), which the kernels read at each step: resets alone, and on a GPU or
  inside a transform of torch.func both. Nothing waits for the GPU, and its values of lengths are
  not checked: a row with a length above T has T steps, one with 0 or less has none, and keeps its
  initial states. The environment variable FASTRNN_CHECK_LENGTHS=1 turns the check on, at the cost
  of waiting.
- as packed data: lengths on a CPU, so that no step of padding is computed, PackedSequences, and
  cells whose `initial` is not zero. A part of a row between two resets, a segment, is then a row of
  its own, and the layer runs once on all segments, packed by length (csrc/torch/segments.cpp draws
  it). A GPU's resets are copied to the host. Under autocast an LSTM then computes as torch's does
  with packed data: in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastrnn import _C as _C  # which registers the operator
from fastrnn import events
from fastrnn.fallback import transforms_active


class _Segments(NamedTuple):
    """What the operator `segments` returns: N rows of packed data, S segments, B rows."""

    order: Tensor  # [N]
    inverse: Tensor  # [T * B], -1 for padding
    batch_sizes: Tensor  # on the CPU, like that of a PackedSequence
    first: Tensor  # [S], -1 for a segment that begins with a reset
    last: Tensor  # [S], -1 for one that ends before a reset
    begin: Tensor  # [B]
    end: Tensor  # [B]

    def to(self, device: torch.device) -> _Segments:
        if device.type == "cpu":
            return self
        moved = [t if t is self.batch_sizes else t.to(device) for t in self]
        return _Segments(*moved)


def call(
    forward: Callable[..., Any],
    layer: nn.RNNBase,
    input: Any,
    hx: Any,
    initial: Sequence[float],
    resets: Any,
    lengths: Any,
) -> tuple[Any, Any]:
    """The output and the last states of a layer.

    Args:
        forward: ``forward(layer, input, hx, events=None)``, which returns those without resets and
            lengths, or with events.
        initial: what each of the states begins with after a reset; zeros where it is shorter.
        input, hx, resets, lengths: as the module's docstring says.

    Raises:
        ValueError: for resets or lengths of another shape, dtype or value.
        TypeError, RuntimeError: for states of other types, sizes or number, as torch's layers do.
    """
    packed = isinstance(input, PackedSequence)
    if packed:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        steps, batch = batch_sizes.size(0), int(batch_sizes[0])
        resets, lengths = _of_packed(input, resets, lengths)
    else:
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{layer.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        data = input if input.dim() == 3 else input.unsqueeze(1)
        sorted_indices = unsorted_indices = None
        steps, batch = data.shape[:2]
    batched = packed or input.dim() == 3
    batch_first = layer.batch_first and not packed and batched
    if batch_first:
        steps, batch = batch, steps
    resets = _checked("resets", resets, torch.bool)
    lengths = _checked("lengths", lengths, torch.int64)
    if not batched:
        resets = resets.unsqueeze(1) if resets is not None else None
        lengths = torch.atleast_1d(lengths) if lengths is not None else None
    if not packed and resets is not None:
        size = [batch, steps] if batch_first else [steps, batch]
        _check_size("resets", "bool", resets, size)
    if not packed and lengths is not None:
        _check_size("lengths", "int64", lengths, [batch])
    if batch == 0 or steps == 0:
        return forward(layer, input, hx)  # type: ignore[no-any-return]
    states = _states(layer, hx, batch, batched, sorted_indices)
    on_cpu = data.device.type == "cpu"
    in_transform = not torch.compiler.is_compiling() and transforms_active()
    if not packed and not any(initial) and (lengths is None or not on_cpu or in_transform):
        made = events.of(resets, lengths, steps, batch, batch_first, data.device)
        if lengths is not None:  # padding may be anything, and zeros times NaN are NaN
            ended = events.past_end(made, batch_first).unsqueeze(-1)
            input = input.masked_fill(ended if batched else ended.squeeze(1), 0)
        return forward(layer, input, hx, events=made)  # type: ignore[no-any-return]
    if batch == 1 and not packed and resets is None and events.has_values(lengths):
        return _of_one_row(forward, layer, input, hx, lengths, steps, batch_first)
    found = torch.ops.fastrnn.segments(resets, lengths, steps, batch, batch_first)
    segments = _Segments(*found).to(data.device)

    rows = data if packed else data.flatten(0, 1)
    order, inverse = segments.order, segments.inverse
    if packed:
        # Rows of [T, B] that exist are the packed rows, in their order.
        exist = inverse >= 0
        order, inverse = (exist.cumsum(0) - 1)[order], inverse[exist]
    rows = rows.index_select(0, order)
    directions = 2 if layer.bidirectional else 1
    given = [
        _entering(state, segments, directions, initial[i] if i < len(initial) else 0.0)
        for i, state in enumerate(states)
    ]
    of_segments = None if hx is None else given[0] if isinstance(hx, Tensor) else tuple(given)
    output, last = forward(layer, PackedSequence(rows, segments.batch_sizes), of_segments)

    if lengths is None or packed:
        output = output.data.index_select(0, inverse)
    else:
        padded = output.data.new_zeros(steps * batch, output.data.size(-1))
        output = padded.index_copy(0, order, output.data)
    several = not isinstance(last, Tensor)
    leaving = [_leaving(state, segments, directions) for state in (last if several else [last])]
    if packed:
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        if unsorted_indices is not None:
            leaving = [state.index_select(1, unsorted_indices) for state in leaving]
    elif batched:
        # As torch's, no view, which detach_() would refuse.
        output = torch.ops.aten._unsafe_view(output, (*data.shape[:2], output.size(-1)))
    else:
        leaving = [state.squeeze(1) for state in leaving]
    return output, tuple(leaving) if several else leaving[0]


def _of_one_row(
    forward: Callable[..., Any], layer: nn.RNNBase, input: Tensor, hx: Any, lengths: Tensor,
    steps: int, batch_first: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The results of a batch of one row, computed from its steps alone."""
    events.check_lengths(lengths, steps)
    (length,), time = lengths.tolist(), 1 if batch_first else 0
    output, last = forward(layer, input.narrow(time, 0, length), hx)
    padding = [0, 0] * (output.dim() - 1 - time) + [0, steps - length]
    return (F.pad(output, padding) if length < steps else output), last


def _checked(name: str, value: Any, dtype: torch.dtype) -> Tensor | None:
    if value is not None and not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor of {dtype}, got {type(value).__name__}")
    if value is not None and value.dtype is not dtype:
        raise ValueError(f"{name}: expected a tensor of {dtype}, got {value.dtype}")
    return value


def _check_size(name: str, dtype: str, given: Tensor, size: list[int]) -> None:
    if list(given.shape) != size:
        raise ValueError(
            f"{name}: expected a {dtype} tensor of size {size}, got {list(given.shape)}"
        )


def _of_packed(input: PackedSequence, resets: Any, lengths: Any) -> tuple[Any, Any]:
    """Resets [T, B] and lengths [B] of packed data, in the order of its rows."""
    if lengths is not None:
        raise ValueError("lengths: a PackedSequence has them, expected None")
    if not isinstance(resets, PackedSequence) or not torch.equal(
        resets.batch_sizes, input.batch_sizes
    ):
        raise ValueError("resets: expected a PackedSequence with the input's batch_sizes")
    own, order = resets.sorted_indices, input.sorted_indices
    if own is not None and order is not None and not torch.equal(own, order.to(own.device)):
        raise ValueError("resets: expected a PackedSequence with the input's order of rows")
    if resets.data.dim() != 1:
        raise ValueError(
            f"resets: expected packed data of size [{len(input.data)}], got {resets.data.shape}"
        )
    return pad_packed_sequence(PackedSequence(resets.data, resets.batch_sizes))


def _states(
    layer: nn.RNNBase, hx: Any, batch: int, batched: bool, order: Tensor | None
) -> list[Tensor]:
    """The initial states [L*D, B, *], in the order of the rows."""
    if hx is None:
        return []
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    if not all(isinstance(state, Tensor) for state in states):
        raise TypeError(f"{layer.mode}: expected the states as tensors, got {type(hx).__name__}")
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    for i, state in enumerate(states):
        which = f"hidden[{i}]" if len(states) > 1 else "hidden"
        width = (i == 0 and layer.proj_size) or layer.hidden_size
        size = (count, batch, width) if batched else (count, width)
        if tuple(state.shape) != size:
            raise RuntimeError(f"Expected {which} size {size}, got {list(state.shape)}")
    states = states if batched else [state.unsqueeze(1) for state in states]
    return states if order is None else [state.index_select(1, order) for state in states]


def _entering(state: Tensor, segments: _Segments, directions: int, initial: float) -> Tensor:
    """The states [L*D, S, *] that segments begin with: the rows', or `initial` after a reset."""
    parts = []
    for direction, rows in enumerate([segments.first, segments.last][:directions]):
        values = state[direction::directions].index_select(1, rows.clamp(min=0))
        parts.append(torch.where((rows >= 0).unsqueeze(1), values, initial))
    return _of_directions(parts)


def _leaving(state: Tensor, segments: _Segments, directions: int) -> Tensor:
    """The states [L*D, B, *] of the rows' ends, of the segments' [L*D, S, *]."""
    ends = [segments.end, segments.begin][:directions]
    return _of_directions([state[d::directions].index_select(1, end) for d, end in enumerate(ends)])


def _of_directions(parts: list[Tensor]) -> Tensor:
    """States [L*D, ...] of those of each direction, [L, ...]."""
    return torch.stack(parts, dim=1).flatten(0, 1) if len(parts) > 1 else parts[0]
