"""The operators `torch.ops.fastrnn.forward` and `.backward`: loading them, and their fake kernels.

One call of `forward` runs a whole network (all layers, both directions), one call of `backward` its
whole backward pass. Both check every argument in C++. A fake kernel tells shapes and dtypes without
computing, and refuses what the kernels refuse. Sizes are named as everywhere: T steps, B batch, N
rows (T * B, or the rows of packed data), I input, H hidden, R the size of h (H, or P with a
projection), L layers, D directions, G gates.

Where the weights have a dimension more in front, they are those of E models, and so is everything
but batch_sizes: input [E, T, B, I], weight_hh [E, G * H, R], output [E, T, B, D * R]. What is empty
for one model is empty for all. `vmap` over weights makes such calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def _check_shape(name: str, tensor: Tensor, *expected: int) -> None:
    """Check a shape, of which a compiler may know some sizes at run time alone."""
    text = f"Expected {name} size {list(expected)}, got {list(tensor.shape)}"
    torch._check(tensor.dim() == len(expected), lambda: text)
    for size, wanted in zip(tensor.shape, expected, strict=True):
        torch._check(size == wanted, lambda: text)


def _check_network(
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
) -> None:
    """csrc/check.cpp's checks of dtypes and shapes, in its words, of tensors without values."""
    if cell not in CELLS:
        known = ", ".join(CELLS)
        raise ValueError(f"fastrnn: no cell is called '{cell}', expected one of: {known}")
    info = CELLS[cell]
    if (c0 is not None) != (info["states"] == 2):
        states = "one hidden state" if c0 is not None else "two hidden states"
        raise RuntimeError(f"{cell} expects {states}")
    dtype = weights[0].dtype if weights else input.dtype
    for tensor in (input, h0, *([] if c0 is None else [c0]), *weights):
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"mat1 and mat2 must have the same dtype, but got {tensor.dtype} and {dtype}"
            )
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"fastrnn: dtype {dtype} is not supported, expected Float, Double, BFloat16 or Half"
        )
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if batch_sizes is not None and (batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64):
        raise RuntimeError("batch_sizes must have 1 dimension and dtype torch.int64")
    if num_layers <= 0:
        raise RuntimeError("num_layers must be greater than zero")
    if h0.dim() != 3:
        raise RuntimeError(f"Expected hidden to have 3 dimensions, got {h0.dim()}")
    D, G = 2 if bidirectional else 1, info["gates"]
    B, R = h0.shape[1:]
    H = c0.shape[2] if c0 is not None and c0.dim() == 3 else R
    projected = H != R
    per_direction = 2 + 2 * has_biases + projected
    if len(weights) != num_layers * D * per_direction:
        raise RuntimeError("got an incorrect number of RNN parameters")
    if projected and not info["allows_projection"]:
        raise RuntimeError(f"{cell} does not support projections")
    if projected and R > H:
        raise RuntimeError("proj_size has to be smaller than hidden_size")
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, 0), "weight_hh": (G * H, R)}
    shapes |= {"bias_ih": (G * H,), "bias_hh": (G * H,)} if has_biases else {}
    shapes |= {"weight_hr": (R, H)} if projected else {}
    for k, weight in enumerate(weights):
        name = list(shapes)[k % per_direction]
        I = input.shape[-1] if k < D * per_direction else D * R
        _check_shape(name, weight, *((G * H, I) if name == "weight_ih" else shapes[name]))
    if batch_sizes is None:
        torch._check(
            input.shape[0] > 0, lambda: "Expected sequence length to be larger than 0 in RNN"
        )
        B = input.shape[1]
    _check_shape("hidden" if c0 is None else "hidden[0]", h0, num_layers * D, B, R)
    if c0 is not None:
        _check_shape("hidden[1]", c0, num_layers * D, B, H)


def are_of_models(weights: Sequence[Tensor]) -> bool:
    """Whether these weights are those of several models."""
    return bool(weights) and weights[0].dim() == 3


def _of_first(models: int, tensors: Sequence[Tensor | None]) -> list[Any]:
    """The first model's parts of arguments, all checked to be of so many models."""
    for t in tensors:
        text = "" if t is None else f"Expected tensors of {models} models, got {list(t.shape)}"
        torch._check(t is None or (t.dim() > 0 and t.shape[0] == models), lambda text=text: text)
    return [None if t is None else t[0] for t in tensors]


def _of_all(models: int, results: Sequence[Tensor]) -> list[Tensor]:
    """The results of all models, by those of one."""
    return [t if t.dim() == 1 else t.new_empty((models, *t.shape)) for t in results]


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
    if are_of_models(weights):
        models = weights[0].shape[0]
        input, h0, c0, *weights = _of_first(models, [input, h0, c0, *weights])
        found = _forward_fake(
            cell, input, h0, c0, weights, batch_sizes,
            has_biases, num_layers, bidirectional, dropout, train, keep, recompute,
        )  # fmt: skip
        return tuple(_of_all(models, found))
    _check_network(
        cell, input, h0, c0, weights, batch_sizes, has_biases, num_layers, bidirectional, dropout
    )
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
        dropout_mask = kept(num_layers - 1, rows, width, dtype=torch.uint8)
    else:
        dropout_mask = input.new_empty((0,), dtype=torch.uint8)
    return output, h_n, c_n, hidden, saved, c, dropout_mask


def _check_gradients(
    cell: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    bidirectional: bool,
) -> None:
    """The same of the gradients of the results."""
    for name, given in {
        "grad_output": grad_output,
        "grad_h_n": grad_h_n,
        "grad_c_n": grad_c_n,
    }.items():
        if given is not None and given.dtype != input.dtype:
            raise RuntimeError(f"Expected {name} of dtype {input.dtype}, got {given.dtype}")
    if grad_output is not None:
        width = (2 if bidirectional else 1) * h0.shape[2]
        _check_shape("grad_output", grad_output, *input.shape[:-1], width)
    if grad_h_n is not None:
        _check_shape("grad_h_n", grad_h_n, *h0.shape)
    if grad_c_n is not None:
        if c0 is None:
            raise RuntimeError(f"{cell} has no c_n, but grad_c_n was given")
        _check_shape("grad_c_n", grad_c_n, *c0.shape)


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
    dropout_mask: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    others: dict[str, Sequence[Tensor | None]] = {
        "hidden": [h0, c0, hidden],
        "parameter": weights,
        "saved": [saved],
        "c": [c],
        "dropout_mask": [dropout_mask],
        "grad_output": [grad_output],
        "grad_h_n": [grad_h_n],
        "grad_c_n": [grad_c_n],
    }
    _check_devices(input, batch_sizes, others)
    if are_of_models(weights):
        models = weights[0].shape[0]
        first = _of_first(models, [grad_output, grad_h_n, grad_c_n, input, h0, c0, *weights])
    else:
        first = [grad_output, grad_h_n, grad_c_n, input, h0, c0, *weights]
    g_output, g_h_n, g_c_n, x, h, c_0, *w = first
    _check_network(cell, x, h, c_0, w, batch_sizes, has_biases, num_layers, bidirectional, dropout)
    _check_gradients(cell, g_output, g_h_n, g_c_n, x, h, c_0, bidirectional)
    if len(wanted) != 3 + len(weights):
        raise ValueError(
            f"wanted has {len(wanted)} elements, expected {3 + len(weights)}: "
            "one for input, h0, c0 and each weight"
        )

    def gradient(of: Tensor | None, yes: bool) -> Tensor:
        return input.new_empty((0,) if of is None or not yes else of.shape)

    grads = [gradient(t, yes) for t, yes in zip([input, h0, c0, *weights], wanted, strict=True)]
    return grads[0], grads[1], grads[2], grads[3:]
