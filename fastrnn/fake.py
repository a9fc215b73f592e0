"""The operators' fake kernels: shapes and dtypes of the results without computing them.

They refuse what the kernels refuse: csrc/torch/check.cpp checks the arguments of both. Sizes: T
steps, B batch, N rows (T*B, or the rows of packed data), H hidden, R the size of h (H, or P with a
projection), L layers, D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import _C, ops
from fastrnn.network import Network, bind, of_model
from fastrnn.registered import CELLS

_Tensors = Sequence[Tensor | None]


def install() -> None:
    """Register the fake kernels."""
    torch.library.register_fake("fastrnn::forward", _forward)
    torch.library.register_fake("fastrnn::backward", _backward)
    torch.library.register_fake("fastrnn::segments", _segments)


# ---- several models ------------------------------------------------------------------------------


def _of_first_model(models: int, tensors: _Tensors) -> list[Any]:
    """The first model's slices of tensors, all of which must be of this number of models."""
    for t in tensors:
        text = "" if t is None else f"Expected tensors of {models} models, got {list(t.shape)}"
        of_all = t is None or (t.dim() > 0 and t.shape[0] == models)
        torch._check(of_all, functools.partial(str, text))
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
    if ops.are_of_models(weights):
        models = weights[0].shape[0]
        input, h0, c0, *weights = _of_first_model(models, [input, h0, c0, *weights])
        sizes = of_model(batch_sizes, 0)
        one = _results(network, input, h0, c0, weights, sizes, keep)
        return _of_all_models(models, one)
    B, N, H, R, width = _C.check_fake_forward(network, input, h0, c0, weights, batch_sizes)
    L, D = network.num_layers, network.directions

    def empty(dtype: torch.dtype) -> Tensor:
        return input.new_empty((0,), dtype=dtype)

    def saved_for_backward(*size: int, dtype: torch.dtype) -> Tensor:
        return input.new_empty(size, dtype=dtype) if keep else empty(dtype)

    output = input.new_empty((*input.shape[:-1], width))
    h_n = input.new_empty((L * D, B, R))
    C = 0 if c0 is None else c0.shape[-1]
    c_n = input.new_empty((0,) if c0 is None else (L * D, B, C))
    hidden = saved_for_backward(L, N, D * R, dtype=input.dtype)
    if network.recompute:
        saved, c = empty(input.dtype), empty(input.dtype)
    else:
        values = CELLS[network.cell]["saved"]
        saved = saved_for_backward(L, D, N, values * H, dtype=input.dtype)
        c = saved_for_backward(L, D, N, C, dtype=input.dtype)
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
    arguments: list[Any] = [grad_output, grad_h_n, grad_c_n, input, h0, c0, *weights]
    if ops.are_of_models(weights):
        arguments = _of_first_model(weights[0].shape[0], arguments)
        batch_sizes = of_model(batch_sizes, 0)
    g_output, g_h_n, g_c_n, x, h, c_0, *w = arguments
    _C.check_fake_backward(network, g_output, g_h_n, g_c_n, x, h, c_0, w, batch_sizes)
    kept = {"hidden": hidden, "saved": saved, "c": c, "dropout_mask": dropout_mask}
    for name, tensor in kept.items():
        if tensor.device != input.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at "
                f"{input.device} and {name} tensor at {tensor.device}"
            )
    if len(wanted) != 3 + len(weights):
        raise ValueError(
            f"wanted has {len(wanted)} elements, expected {3 + len(weights)}: "
            "one for input, h0, c0 and each weight"
        )

    def gradient(of: Tensor | None, yes: bool) -> Tensor:
        return input.new_empty((0,) if of is None or not yes else of.shape)

    found = [gradient(t, yes) for t, yes in zip([input, h0, c0, *weights], wanted, strict=True)]
    return found[0], found[1], found[2], found[3:]


def _segments(
    resets: Tensor | None, lengths: Tensor | None, steps: int, batch: int, batch_first: bool
) -> tuple[Tensor, ...]:
    """The values of resets and lengths give the numbers of rows, of segments, and of steps."""
    size = torch.library.get_ctx().new_dynamic_size
    rows = steps * batch if lengths is None else size()
    segments = batch if resets is None else size()
    sizes = (rows, steps * batch, size(), segments, segments, batch, batch)
    return tuple(torch.empty(n, dtype=torch.int64, device="cpu") for n in sizes)
