"""The autograd Functions around the operators.

What is saved, the backward, and the backward of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn import ops, reference


@dataclass(frozen=True)
class Network:
    """What a network is, beside its tensors, in the order of torch.lstm's arguments."""

    cell: str
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    recompute: bool = False  # keep the outputs alone, and compute the gates again in the backward


Results = tuple[Tensor, Tensor, Tensor]


def run(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> Results:
    """output, h_n and c_n (empty for a cell without c) of a network.

    Differentiable any number of times.
    """
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, h0, c0, *weights)
    ):
        results: Results = _Forward.apply(  # type: ignore[no-untyped-call]
            network, batch_sizes, input, h0, c0, *weights
        )[:3]
        return results
    return _results(network, batch_sizes, input, h0, c0, weights, keep=False)[:3]  # type: ignore[return-value]


def _results(
    network: Network,
    batch_sizes: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    keep: bool,
) -> tuple[Tensor, ...]:
    """output, h_n and c_n by the fused operator, and what it keeps for backward."""
    n = network
    return ops.forward(  # type: ignore[no-any-return]
        n.cell, input, h0, c0, weights, batch_sizes,
        n.has_biases, n.num_layers, n.bidirectional, n.dropout, n.train, keep, n.recompute,
    )  # fmt: skip


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        network: Network,
        batch_sizes: Tensor | None,
        input: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return _results(network, batch_sizes, input, h0, c0, weights, keep=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        network, batch_sizes, *tensors = inputs
        _, _, _, hidden, saved, c, noise = output
        ctx.network = network
        ctx.mark_non_differentiable(hidden, saved, c, noise)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, hidden, saved, c, noise, *tensors)

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        batch_sizes, *kept = ctx.saved_tensors[:5]
        tensors = ctx.saved_tensors[5:]
        grad_results = (grad_output, grad_h_n, grad_c_n)
        if all(g is None for g in grad_results):
            return (None,) * (2 + len(tensors))
        wanted = list(ctx.needs_input_grad[2:])
        return None, None, *gradients(ctx.network, wanted, batch_sizes, kept, grad_results, tensors)


def gradients(
    network: Network,
    wanted: list[bool],
    batch_sizes: Tensor | None,
    kept: Sequence[Tensor],
    grad_results: tuple[Tensor | None, ...],
    tensors: tuple[Any, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, h0, c0 and weights, None where not wanted.

    They can be differentiated in their turn if gradients are enabled (create_graph=True); then
    csrc/node.cpp, which has a way of its own otherwise, calls this too.
    """
    if torch.is_grad_enabled():
        grads = _Backward.apply(  # type: ignore[no-untyped-call]
            network, wanted, batch_sizes, tuple(kept), *grad_results, *tensors
        )
    else:
        grads = _gradients(network, wanted, batch_sizes, kept, grad_results, tensors)
    return tuple(g if yes else None for g, yes in zip(grads, wanted, strict=True))


def _gradients(
    network: Network,
    wanted: list[bool],
    batch_sizes: Tensor | None,
    kept: Sequence[Tensor],
    grad_results: tuple[Tensor | None, ...],
    tensors: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Gradients of input, h0, c0 and weights (empty where not wanted), by the fused operator."""
    n = network
    input, h0, c0, *weights = tensors
    grad_input, grad_h0, grad_c0, grad_weights = ops.backward(
        n.cell, *grad_results, input, h0, c0, weights, batch_sizes,
        n.has_biases, n.num_layers, n.bidirectional, n.dropout, *kept, wanted,
    )  # fmt: skip
    return grad_input, grad_h0, grad_c0, *grad_weights


class _Backward(torch.autograd.Function):
    """The backward pass as a differentiable function.

    Its value is the fused operator's; its own gradient goes through the plain formulas of
    `reference`.
    """

    @staticmethod
    def forward(
        network: Network,
        wanted: list[bool],
        batch_sizes: Tensor | None,
        kept: tuple[Tensor, ...],
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        grad_results = (grad_output, grad_h_n, grad_c_n)
        return _gradients(network, wanted, batch_sizes, kept, grad_results, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        network, wanted, batch_sizes, kept, *variables = inputs
        ctx.network = network
        ctx.wanted = wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, kept[-1], *variables)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, noise, *variables = ctx.saved_tensors
        higher = torch.is_grad_enabled()
        n: Network = ctx.network
        with torch.enable_grad():
            # Views, so that a gradient of one variable does not reach another through the history
            # they may share.
            own: list[Any] = [None if v is None else _fresh(v, higher) for v in variables]
            grad_results, tensors = own[:3], own[3:]
            input, h0, c0, *weights = tensors
            results = reference.run(
                n.cell, input, h0, c0, weights, batch_sizes,
                has_biases=n.has_biases, num_layers=n.num_layers, bidirectional=n.bidirectional,
                dropout=n.dropout, noise=noise if noise.numel() else None,
            )  # fmt: skip
            used: list[tuple[Any, Any]] = [
                (r, g) for r, g in zip(results, grad_results, strict=True) if g is not None
            ]
            inputs = [t for t, yes in zip(tensors, ctx.wanted, strict=True) if yes]
            first: tuple[Any, ...] = torch.autograd.grad(
                [r for r, _ in used],
                inputs,
                [g for _, g in used],
                create_graph=True,
                allow_unused=True,
            )
        given = [g for g, yes in zip(grad_grads, ctx.wanted, strict=True) if yes]
        pairs: list[tuple[Any, Any]] = [
            (f, g) for f, g in zip(first, given, strict=True)
            if f is not None and g is not None and f.requires_grad
        ]  # fmt: skip
        asked = [v for v, yes in zip(own, ctx.needs_input_grad[4:], strict=True) if yes]
        second = iter(
            torch.autograd.grad(
                [f for f, _ in pairs], asked, [g for _, g in pairs],
                create_graph=higher, allow_unused=True,
            ) if pairs else [None] * len(asked)
        )  # fmt: skip
        return (None,) * 4 + tuple(
            next(second) if yes else None for yes in ctx.needs_input_grad[4:]
        )


def _fresh(tensor: Tensor, higher: bool) -> Tensor:
    """The same values as a variable of its own.

    It stays connected to `tensor` if `higher` derivatives are to come.
    """
    if not tensor.is_floating_point():
        return tensor
    if higher and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()
