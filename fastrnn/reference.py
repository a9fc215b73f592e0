"""Each cell in plain PyTorch: its definition, the tests' oracle, and the higher derivatives.

The formulas are those of torch.nn's documentation (torch/nn/modules/rnn.py), in the order of
operations of torch's CPU code (aten/src/ATen/native/RNN.cpp). No function writes in place, so each
can be differentiated any number of times, in forward or reverse mode, in any dtype and on any
device.

A new cell is one function decorated with ``@_cell``, with the cell's name in the C++ registry.
Sizes: T steps, B batch, I input, H hidden, P projection, G gates, L layers, D directions, and N
rows of all steps (T*B, or the sum of batch_sizes).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CELLS", "gru", "lstm", "rnn_relu", "rnn_tanh", "run"]

#: Events of csrc/layer.h.
RESET, PAST_END = 1, 2

Cell = Callable[..., tuple[Tensor, Tensor | None]]

#: name -> one time step, as ``(x: [B, G*H], r: [B, G*H], h: [B, H], c: [B, C] or None) -> (h, c)``
#: where x = W_ih x_t + b_ih, r = W_hh h_{t-1} + b_hh, and the result h is not projected yet. C is
#: H, or H times the number of the states besides h. A cell with vectors, [H] each, gets them after
#: c.
CELLS: dict[str, Cell] = {}
#: name -> the number of vectors, of cells that have some.
VECTORS: dict[str, int] = {}


def _cell(step: Cell) -> Cell:
    CELLS[step.__name__] = step
    return step


@_cell
def lstm(x: Tensor, r: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of torch.nn.LSTM (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000).

    ::

        i, f, o = sigmoid(W_i* x_t + b_i* + W_h* h_{t-1} + b_h*)
        g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        c_t = f * c_{t-1} + i * g
        h_t = o * tanh(c_t)

    `run` multiplies h_t by W_hr^T where there is a projection (Sak et al. 2014).
    """
    assert c is not None
    i, f, g, o = (x + r).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@_cell
def gru(x: Tensor, r: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of torch.nn.GRU (Cho et al. 2014, with the reset gate after the product).

    ::

        r, z = sigmoid(W_i* x_t + b_i* + W_h* h_{t-1} + b_h*)
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z) * n + z * h_{t-1}
    """
    x_r, x_z, x_n = x.chunk(3, dim=1)
    r_r, r_z, r_n = r.chunk(3, dim=1)
    n = (x_n + (x_r + r_r).sigmoid() * r_n).tanh()
    return n + (x_z + r_z).sigmoid() * (h - n), None


@_cell
def rnn_tanh(x: Tensor, r: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of torch.nn.RNN (Elman 1990): h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)."""
    return (x + r).tanh(), None


@_cell
def rnn_relu(x: Tensor, r: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of torch.nn.RNN, nonlinearity='relu': h_t = max(0, W_ih x_t + b_ih + ...)."""
    return (x + r).relu(), None


def _first(state: Tensor, n: int) -> Tensor:
    """The states of the n sequences that have a row at a step."""
    return state if n == state.size(0) else state[:n]


def _renew(new: Tensor, state: Tensor) -> Tensor:
    """The new states of the first sequences, and the old ones of those without a row."""
    n = new.size(0)
    return new if n == state.size(0) else torch.cat([new, state[n:]])


def _direction(
    step: Cell,
    x: Tensor,  # [N, I]
    h: Tensor,  # [B, H or P]
    c: Tensor | None,  # [B, C]
    weights: Sequence[Tensor],  # w_ih, w_hh, [b_ih, b_hh], the cell's vectors, [w_hr]
    sizes: list[int],  # [T], rows of each step
    *,
    has_biases: bool,
    vectors: int,
    reverse: bool,
    events: Tensor | None,  # [T, B]
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """One direction of one layer: output [N, H or P], h_n, c_n, and c_t of all steps."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if has_biases else (None, None)
    others = weights[4 if has_biases else 2 :]
    w_hr = others[-1] if len(others) > vectors else None
    xs = F.linear(x, w_ih, b_ih).split(sizes)
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    # The reverse direction needs no case of its own for packed data. In reverse, the batch grows: a
    # sequence starts from its initial state at its own last step.
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        h_t = _first(h, sizes[t])
        c_t = None if c is None else _first(c, sizes[t])
        if events is not None and t + reverse < len(sizes):
            enters = (events[t + reverse] == RESET).unsqueeze(1)
            h_t = h_t.masked_fill(enters, 0)
            c_t = None if c_t is None else c_t.masked_fill(enters, 0)
        before = h_t, c_t
        if w_hh.dim() == 1:  # of a diagonal cell
            r = h_t.repeat(1, w_hh.size(0) // h_t.size(1)) * w_hh
            r = r if b_hh is None else r + b_hh
        else:
            r = F.linear(h_t, w_hh, b_hh)
        y, c_t = step(xs[t], r, h_t, c_t, *others[:vectors])
        y = y if w_hr is None else F.linear(y, w_hr)
        if events is None:
            outputs.append(y)
            states += [] if c_t is None else [c_t]
        else:
            ended = (events[t] == PAST_END).unsqueeze(1)
            outputs.append(y.masked_fill(ended, 0))
            states += [] if c_t is None else [c_t.masked_fill(ended, 0)]
            y = torch.where(ended, before[0], y)
            c_t = None if c_t is None or before[1] is None else torch.where(ended, before[1], c_t)
        h = _renew(y, h)
        c = None if c is None or c_t is None else _renew(c_t, c)
    order = -1 if reverse else 1
    return torch.cat(outputs[::order]), h, c, states[::order]


def run(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float = 0.0,
    dropout_mask: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A network of all layers and directions.

    Args:
        cell: a name in `CELLS`.
        input: [T, B, I], or packed data [N, I] with `batch_sizes`.
        h0: [L*D, B, H or P].
        c0: [L*D, B, C] for a cell with c, else None.
        weights: in torch's order, for each layer and direction: w_ih [G*H, I or D*H], w_hh [G*H,
            H] or [G*H], then b_ih and b_hh [G*H] if `has_biases`, then the cell's vectors [H], then
            w_hr [P, H] if there is a projection.
        batch_sizes: [T] int64 on the CPU, non-increasing, as in a PackedSequence. Or for padded
            input, where it is, events [T, B] uint8: RESET, where the state that enters the step is
            zeros (in the reverse direction the one that enters the step before), and PAST_END,
            where the output is zeros and no state changes. After PAST_END a row has nothing else.
        dropout: the probability of a zero in `dropout_mask`.
        dropout_mask: [L-1, N, D*H] of uint8 or bool: which outputs between two layers are kept.
            Without it nothing is dropped, whatever `dropout` is.
        return_states: whether a row of the output ends with c_t of the last layer, of a cell with
            c: first that of the forward direction.

    Returns:
        output [T, B, D*H] or [N, D*H], or with states D*H + D*C wide; h_n and c_n (or None), shaped
        as h0 and c0.

    Raises:
        RuntimeError: if there are no steps.
    """
    events = None
    if batch_sizes is not None and batch_sizes.dim() > 1:
        events, batch_sizes = batch_sizes, None
    if batch_sizes is None:
        T, B = input.shape[:2]
        sizes, x = [B] * T, input.flatten(0, 1)
    else:
        # Not tolist(), which before torch 2.7 fails inside the transforms of torch.func.
        sizes, x = [int(n) for n in batch_sizes], input
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    D = 2 if bidirectional else 1
    count = len(weights) // (num_layers * D)
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for layer in range(num_layers):
        if layer > 0 and dropout_mask is not None:
            # As torch does: the value times 0 or 1 / (1 - p), rounded to the dtype.
            keep = dropout_mask[layer - 1].to(x.dtype)
            x = x * (keep / (1 - dropout) if dropout < 1 else keep)
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for k in range(layer * D, (layer + 1) * D):
            output, h, c, all_c = _direction(
                CELLS[cell], x, h0[k], None if c0 is None else c0[k],
                weights[k * count : (k + 1) * count], sizes,
                has_biases=has_biases, vectors=VECTORS.get(cell, 0), reverse=k % D == 1,
                events=events,
            )  # fmt: skip
            outputs.append(output)
            states += [torch.cat(all_c)] if all_c else []
            h_n.append(h)
            c_n += [] if c is None else [c]
        x = torch.cat(outputs, dim=1) if bidirectional else outputs[0]
    if return_states:
        x = torch.cat([x, *states], dim=1)
    output = x if batch_sizes is not None else x.unflatten(0, (T, B))
    return output, torch.stack(h_n), torch.stack(c_n) if c_n else None
