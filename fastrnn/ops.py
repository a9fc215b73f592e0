"""The operators `torch.ops.fastrnn.forward` and `.backward`: loading them, and their fake kernels.

One call of `forward` runs a whole network (all layers, both directions), one call of `backward` its
whole backward pass. Both check every argument in C++. A fake kernel tells shapes and dtypes without
computing; sizes are named as everywhere: T steps, B batch, N rows (T * B, or the rows of packed
data), I input, H hidden, R the size of h (H, or P with a projection), L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn import _C as _C

CELLS: dict[str, dict[str, int]] = _C.cells()
"""The registered cells: name -> gates, states (2 with a c beside h), saved, allows_projection."""

forward = torch.ops.fastrnn.forward.default
backward = torch.ops.fastrnn.backward.default


def _check_devices(
    input: Tensor, batch_sizes: Tensor | None, others: dict[str, Sequence[Tensor | None]]
) -> None:
    """Check devices: a call with one meta tensor among real ones comes to the fake kernel."""
    for kind, tensors in others.items():
        for tensor in tensors:
            if tensor is not None and tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{input.device} and {kind} tensor at {tensor.device}"
                )
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes should always be on CPU, got {batch_sizes.device}")


@torch.library.register_fake("fastrnn::forward")
def _forward_fake(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    train: bool,
    keep: bool,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    _check_devices(input, batch_sizes, {"hidden": [h0, c0], "parameter": weights})
    directions = 2 if bidirectional else 1
    B, R = h0.shape[1:]
    H = R if c0 is None else c0.shape[2]
    rows = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    width = directions * R

    def kept(*size: int, dtype: torch.dtype) -> Tensor:
        return input.new_empty(size if keep else (0,), dtype=dtype)

    output = input.new_empty((*input.shape[:-1], width))
    h_n = input.new_empty((num_layers * directions, B, R))
    c_n = input.new_empty((0,) if c0 is None else (num_layers * directions, B, H))
    hidden = kept(num_layers, rows, width, dtype=input.dtype)
    if recompute:
        saved, c = input.new_empty((0,)), input.new_empty((0,))
    else:
        saved = kept(num_layers, directions, rows, CELLS[cell]["saved"] * H, dtype=input.dtype)
        c = kept(num_layers, directions, rows, 0 if c0 is None else H, dtype=input.dtype)
    if train and dropout > 0 and num_layers > 1:
        noise = kept(num_layers - 1, rows, width, dtype=torch.uint8)
    else:
        noise = input.new_empty((0,), dtype=torch.uint8)
    return output, h_n, c_n, hidden, saved, c, noise


@torch.library.register_fake("fastrnn::backward")
def _backward_fake(
    cell: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    hidden: Tensor,
    saved: Tensor,
    c: Tensor,
    noise: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    others: dict[str, Sequence[Tensor | None]] = {
        "hidden": [h0, c0, hidden],
        "parameter": weights,
        "saved": [saved],
        "c": [c],
        "noise": [noise],
        "grad_output": [grad_output],
        "grad_h_n": [grad_h_n],
        "grad_c_n": [grad_c_n],
    }
    _check_devices(input, batch_sizes, others)

    def gradient(of: Tensor | None, yes: bool) -> Tensor:
        return input.new_empty((0,) if of is None or not yes else of.shape)

    grads = [gradient(t, yes) for t, yes in zip([input, h0, c0, *weights], wanted, strict=True)]
    return grads[0], grads[1], grads[2], grads[3:]
