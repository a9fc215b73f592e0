"""The operators' fake kernels: shapes and dtypes of the results without computing them.

They refuse what the kernels refuse, with the texts of the checks in C++. Sizes: T steps, B batch, N
rows (T*B, or the rows of packed data), I input, H hidden, R the size of h (H, or P with a
projection), L layers, D directions, G gates, E models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.cells import CELLS
from fastrnn.network import Network, bind

_Tensors = Sequence[Tensor | None]


def install() -> None:
    """Register the fake kernels."""
    torch.library.register_fake("fastrnn::forward", _forward)
    torch.library.register_fake("fastrnn::backward", _backward)


# ---- checks --------------------------------------------------------------------------------------


def _check_devices(input: Tensor, batch_sizes: Tensor | None, others: dict[str, _Tensors]) -> None:
    """Check devices: a fake kernel is called also where one tensor of many is on meta."""
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
    """Check a shape. A compiler may know some sizes only at run time."""
    text = f"Expected {name} size {list(expected)}, got {list(tensor.shape)}"
    torch._check(tensor.dim() == len(expected), lambda: text)
    for size, expected_size in zip(tensor.shape, expected, strict=True):
        torch._check(size == expected_size, lambda: text)


def _check_network(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> None:
    """Check dtypes and shapes, as csrc/check.cpp does."""
    cell = network.cell
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
    if not 0 <= network.dropout <= 1:
        raise ValueError(
            f"dropout probability has to be between 0 and 1, but got {network.dropout}"
        )
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if batch_sizes is not None and (batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64):
        raise RuntimeError("batch_sizes must have 1 dimension and dtype torch.int64")
    if network.num_layers <= 0:
        raise RuntimeError("num_layers must be greater than zero")
    if h0.dim() != 3:
        raise RuntimeError(f"Expected hidden to have 3 dimensions, got {h0.dim()}")
    L, D, G = network.num_layers, network.directions, info["gates"]
    B, R = h0.shape[1:]
    H = c0.shape[2] if c0 is not None and c0.dim() == 3 else R
    projected = H != R
    per_direction = 2 + 2 * network.has_biases + projected
    if len(weights) != L * D * per_direction:
        raise RuntimeError("got an incorrect number of RNN parameters")
    if projected and not info["allows_projection"]:
        raise RuntimeError(f"{cell} does not support projections")
    if projected and R > H:
        raise RuntimeError("proj_size has to be smaller than hidden_size")
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, 0), "weight_hh": (G * H, R)}
    shapes |= {"bias_ih": (G * H,), "bias_hh": (G * H,)} if network.has_biases else {}
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
    _check_shape("hidden" if c0 is None else "hidden[0]", h0, L * D, B, R)
    if c0 is not None:
        _check_shape("hidden[1]", c0, L * D, B, H)


def _check_gradients(
    network: Network,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
) -> None:
    """Check dtypes and shapes of the gradients of the results."""
    for name, grad in {
        "grad_output": grad_output,
        "grad_h_n": grad_h_n,
        "grad_c_n": grad_c_n,
    }.items():
        if grad is not None and grad.dtype != input.dtype:
            raise RuntimeError(f"Expected {name} of dtype {input.dtype}, got {grad.dtype}")
    if grad_output is not None:
        width = network.directions * h0.shape[2]
        _check_shape("grad_output", grad_output, *input.shape[:-1], width)
    if grad_h_n is not None:
        _check_shape("grad_h_n", grad_h_n, *h0.shape)
    if grad_c_n is not None:
        if c0 is None:
            raise RuntimeError(f"{network.cell} has no c_n, but grad_c_n was given")
        _check_shape("grad_c_n", grad_c_n, *c0.shape)


# ---- several models ------------------------------------------------------------------------------


def _of_first_model(models: int, tensors: _Tensors) -> list[Any]:
    """The first model's slices of tensors, all of which must be of this number of models."""
    for t in tensors:
        text = "" if t is None else f"Expected tensors of {models} models, got {list(t.shape)}"
        torch._check(t is None or (t.dim() > 0 and t.shape[0] == models), lambda text=text: text)
    return [None if t is None else t[0] for t in tensors]


def _of_all_models(models: int, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of all models, given those of one. Empty results have one dimension."""
    return tuple(t if t.dim() == 1 else t.new_empty((models, *t.shape)) for t in results)


# ---- the kernels ---------------------------------------------------------------------------------


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    network, arguments = bind(ops.forward, args, kwargs)
    return _results(network, **arguments)


def _results(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """output, h_n, c_n, hidden, saved, c and dropout_mask."""
    _check_devices(input, batch_sizes, {"hidden": [h0, c0], "parameter": weights})
    if ops.are_of_models(weights):
        models = weights[0].shape[0]
        input, h0, c0, *weights = _of_first_model(models, [input, h0, c0, *weights])
        one = _results(network, input, h0, c0, weights, batch_sizes, keep)
        return _of_all_models(models, one)
    _check_network(network, input, h0, c0, weights, batch_sizes)
    L, D = network.num_layers, network.directions
    B, R = h0.shape[1:]
    H = R if c0 is None else c0.shape[2]
    N = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]

    def empty(dtype: torch.dtype) -> Tensor:
        return input.new_empty((0,), dtype=dtype)

    def saved_for_backward(*size: int, dtype: torch.dtype) -> Tensor:
        return input.new_empty(size, dtype=dtype) if keep else empty(dtype)

    output = input.new_empty((*input.shape[:-1], D * R))
    h_n = input.new_empty((L * D, B, R))
    c_n = input.new_empty((0,) if c0 is None else (L * D, B, H))
    hidden = saved_for_backward(L, N, D * R, dtype=input.dtype)
    if network.recompute:
        saved, c = empty(input.dtype), empty(input.dtype)
    else:
        values = CELLS[network.cell]["saved"]
        saved = saved_for_backward(L, D, N, values * H, dtype=input.dtype)
        c = saved_for_backward(L, D, N, 0 if c0 is None else H, dtype=input.dtype)
    if network.drops:
        dropout_mask = saved_for_backward(L - 1, N, D * R, dtype=torch.uint8)
    else:
        dropout_mask = empty(torch.uint8)
    return output, h_n, c_n, hidden, saved, c, dropout_mask


def _backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    network, arguments = bind(ops.backward, args, kwargs)
    return _gradients(network, **arguments)


def _gradients(
    network: Network,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    hidden: Tensor,
    saved: Tensor,
    c: Tensor,
    dropout_mask: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of input, h0, c0 and the weights: empty where not wanted."""
    others: dict[str, _Tensors] = {
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
    one: list[Any] = [grad_output, grad_h_n, grad_c_n, input, h0, c0, *weights]
    if ops.are_of_models(weights):
        one = _of_first_model(weights[0].shape[0], one)
    g_output, g_h_n, g_c_n, x, h, c_0, *w = one
    _check_network(network, x, h, c_0, w, batch_sizes)
    _check_gradients(network, g_output, g_h_n, g_c_n, x, h, c_0)
    if len(wanted) != 3 + len(weights):
        raise ValueError(
            f"wanted has {len(wanted)} elements, expected {3 + len(weights)}: "
            "one for input, h0, c0 and each weight"
        )

    def gradient(of: Tensor | None, yes: bool) -> Tensor:
        return input.new_empty((0,) if of is None or not yes else of.shape)

    found = [gradient(t, yes) for t, yes in zip([input, h0, c0, *weights], wanted, strict=True)]
    return found[0], found[1], found[2], found[3:]
