"""Events: what happens to each row of padded input at each step, for the kernels to read.

The operators take them, [T, B] of uint8 on the input's device, in the place of batch_sizes.
csrc/layer.h draws what they do.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import autocast, functional
from fastrnn.fallback import missing_kernels, transforms_active
from fastrnn.network import Network
from fastrnn.reference import PAST_END


def of(
    resets: Tensor | None,
    lengths: Tensor | None,
    steps: int,
    batch: int,
    batch_first: bool,
    device: torch.device,
) -> Tensor:
    """The events [T, B] on `device`, for resets [T, B], or [B, T] if `batch_first`, and lengths.

    Raises:
        ValueError: for lengths outside 1 to T, if they are on the CPU or the environment variable
            FASTRNN_CHECK_LENGTHS is 1.
    """
    waits = device.type == "cpu"  # for values that a GPU computes
    if resets is None:
        events = torch.zeros(steps, batch, dtype=torch.uint8, device=device)
    else:
        resets = resets.transpose(0, 1) if batch_first else resets
        # True is RESET. A copy: the caller may reuse the mask before the backward pass.
        events = resets.to(device, torch.uint8, non_blocking=not waits)
    if lengths is None:
        return events
    check_lengths(lengths, steps)
    lengths = lengths.to(device, non_blocking=not waits)
    times = torch.arange(steps, device=device).unsqueeze(1)
    return events.masked_fill(times >= lengths, PAST_END)


def has_values(lengths: Tensor) -> bool:
    """Whether the values may be read: not while a graph is made, nor inside a transform."""
    return not (
        torch.compiler.is_compiling()
        or transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or lengths.is_meta
    )


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Raise a ValueError where `of` does."""
    on_cpu = lengths.device.type == "cpu"
    if not has_values(lengths) or not (on_cpu or os.environ.get("FASTRNN_CHECK_LENGTHS") == "1"):
        return
    for i, length in enumerate(lengths.tolist()):
        if not 1 <= length <= steps:
            raise ValueError(f"lengths: expected 1 to {steps}, got lengths[{i}] = {length}")


def past_end(events: Tensor, batch_first: bool) -> Tensor:
    """Where rows have ended, in the layout of the input."""
    ended = events == PAST_END
    return ended.transpose(0, 1) if batch_first else ended


def results_of_layer(
    layer: nn.RNNBase, input: Tensor, hx: Any, events: Tensor, return_states: bool, recompute: bool
) -> tuple[Tensor, Any]:
    """What forward of an RNN, LSTM or GRU returns, with events.

    Args:
        hx: the states, which have been checked, or None.
        return_states: whether rows of the output are as wide as those of the operator.

    Raises:
        NotImplementedError: where this build has no kernels for the input.
    """
    missing = missing_kernels(input)
    if missing is not None:
        raise NotImplementedError(
            f"resets and lengths: this build of fastrnn has no kernels {missing}"
        )
    cell = layer.mode.lower()
    layer._update_flat_weights()
    batched = input.dim() == 3
    batch_first = layer.batch_first and batched
    x = input if batched else input.unsqueeze(1)
    if batch_first:
        x = x.transpose(0, 1).contiguous()
    network = Network(
        cell,
        layer.bias,
        layer.num_layers,
        layer.bidirectional,
        float(layer.dropout),
        return_states=return_states,
        train=layer.training,
        recompute=recompute,
    )
    if hx is None:
        count = layer.num_layers * network.directions
        widths = [layer.proj_size or layer.hidden_size, layer.hidden_size]
        states = [x.new_zeros(count, x.size(1), width) for width in widths[: 1 + (cell == "lstm")]]
    else:
        if isinstance(hx, Tensor) == (cell == "lstm") or (cell == "lstm" and len(hx) != 2):
            raise RuntimeError(
                f"{cell} expects {'two hidden states' if cell == 'lstm' else 'a tensor'}"
            )
        given = [hx] if isinstance(hx, Tensor) else list(hx)
        states = given if batched else [state.unsqueeze(1) for state in given]
    # As torch's forward does: a subclass may have methods of its own.
    checked: Any = tuple(states) if cell == "lstm" else states[0]
    if hx is not None:
        checked = layer.permute_hidden(checked, None)
    layer.check_forward_args(x, checked, None)
    states = list(checked) if cell == "lstm" else [checked]
    weights: list[Any] = layer._flat_weights
    dtypes = autocast.dtypes(cell, True, x, states, weights)
    output, *last = functional.network_results(network, x, events, states, weights, dtypes)
    if batch_first:
        output = output.transpose(0, 1)
    if not batched:
        output, last = output.squeeze(1), [state.squeeze(1) for state in last]
    return output, tuple(last) if cell == "lstm" else last[0]
