"""What torch.autocast does to a network: the dtype to compute in, and those of the results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn import _C


def dtypes(
    cell: str,
    padded: bool,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype to compute a network in and that of c_n, as torch's layers have under autocast.

    Args:
        cell: a cell of torch's.
        padded: whether it is a layer on padded data: neither on packed data nor a cell.
        input, states, params: the tensors of the call, before any cast.

    Returns:
        The lower precision where all results have it or a projection rounds them, else float32;
        None where autocast is off or leaves the tensors alone.
    """
    device = input.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None, None
    h0, *c0 = states
    for t in (input, h0, *params):  # faster than any(...), and cells take microseconds
        if t.dtype is torch.float64:
            return None, None
    low = torch.get_autocast_dtype(device)
    if device == "cuda":
        return low, low
    # On the CPU, the results of nn.RNN, of a fused LSTM and of a projection are those of a product.
    # The states of a GRU and of an LSTM that is not fused are sums with the previous state, which
    # promote the dtypes of both.
    promoted = torch.promote_types((c0[0] if c0 else h0).dtype, low)
    projected = bool(c0) and c0[0].dim() == 3 and h0.dim() == 3 and c0[0].size(2) != h0.size(2)
    if cell.startswith("rnn") or (cell == "lstm" and padded and not projected):
        return low, low
    return (low if projected else promoted), promoted


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in this dtype, weights from autocast's cache."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return [t.to(dtype) for t in tensors]
    return _C.autocast_to(tensors, dtype)
