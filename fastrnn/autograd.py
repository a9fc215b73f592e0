"""Networks as differentiable functions: the call of the operator, and derivatives by formulas.

csrc/node.cpp makes the operators differentiable: `forward` by one call of `backward`. What has no
kernel comes here, to be computed by `reference` in plain PyTorch, which any transform goes through:
gradients of gradients, and all of forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from fastrnn import distributed, ops, reference


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


def run(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n and c_n (empty for a cell without c) of a network.

    Differentiable any number of times.
    """
    n = network
    if distributed.are_distributed([input, h0, c0, *weights]):
        return distributed.run_locally(
            lambda x, h, c, local: run(n, x, h, c, local, batch_sizes),
            input, h0, c0, weights, packed=batch_sizes is not None,
        )  # fmt: skip
    output, h_n, c_n, *_ = ops.forward(
        n.cell, input, h0, c0, weights, batch_sizes,
        n.has_biases, n.num_layers, n.bidirectional, n.dropout, n.train, False, n.recompute,
    )  # fmt: skip
    return output, h_n, c_n


# ---- by formulas, for csrc/node.cpp --------------------------------------------------------------
# `options` are those of reference.run by name, and the cell. `tensors` are input, h0, c0 (or None)
# and the weights; `grads` those of output, h_n and c_n, None where there is none.

_Tensors = Sequence[Tensor | None]
_Flags = Sequence[bool]


def results(
    options: dict[str, Any],
    batch_sizes: Tensor | None,
    dropout_mask: Tensor,
    tensors: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """output, h_n and c_n (or None), as the operator `forward` gives them."""
    if ops.are_of_models(tensors[3:]):
        each = [
            results(
                options, batch_sizes, dropout_mask[model] if dropout_mask.numel() else dropout_mask,
                [None if t is None else t[model] for t in tensors],
            )
            for model in range(len(tensors[3]))
        ]  # fmt: skip
        return tuple(
            None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)
        )
    dtype = tensors[0].dtype
    if dtype in (torch.bfloat16, torch.float16):  # computed in float32, as by the kernels
        tensors = [None if t is None else t.float() for t in tensors]
    input, h0, c0, *weights = tensors
    found = reference.run(
        input=input, h0=h0, c0=c0, weights=weights, batch_sizes=batch_sizes,
        dropout_mask=dropout_mask if dropout_mask.numel() else None, **options,
    )  # fmt: skip
    return tuple(None if t is None else t.to(dtype) for t in found)


def gradients(
    options: dict[str, Any],
    batch_sizes: Tensor | None,
    dropout_mask: Tensor,
    wanted: _Flags,
    grads: _Tensors,
    tensors: _Tensors,
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors where `wanted`, else None: those of the operator `backward`.

    With their tangents. The operator itself asks for them, and no transform can begin in there: by
    autograd as it is around it, which carries tangents along.
    """
    with torch.enable_grad(), enable_inplace_requires_grad(True):
        tensors = [None if t is None else _variable(t) for t in tensors]
    return _pulled_back(
        lambda given: results(options, batch_sizes, dropout_mask, given),
        tensors,
        wanted,
        grads,
        _by_graph,
    )


def second_gradients(
    options: dict[str, Any],
    batch_sizes: Tensor | None,
    dropout_mask: Tensor,
    wanted: _Flags,
    needed: _Flags,
    variables: _Tensors,
    grads: _Tensors,
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `backward`, `grads` and then `tensors`, where `needed`."""

    def first(given: list[Any]) -> tuple[Tensor | None, ...]:
        return _pulled_back(
            lambda tensors: results(options, batch_sizes, dropout_mask, tensors),
            given[3:], wanted, given[:3], _by_transform,
        )  # fmt: skip

    return _pulled_back(first, variables, needed, grads, _by_transform)


_Function = Callable[..., list[Tensor]]


def _by_transform(
    function: _Function, variables: list[Tensor], grads: list[Tensor]
) -> Sequence[Tensor]:
    """The product of grads and Jacobian, at any depth of derivatives."""
    pull: Callable[[list[Tensor]], tuple[Tensor, ...]] = torch.func.vjp(function, *variables)[1]
    return pull(grads)


def _by_graph(
    function: _Function, variables: list[Tensor], grads: list[Tensor]
) -> Sequence[Tensor]:
    """The same of what _variable gives."""
    with torch.enable_grad():
        found: Sequence[Tensor] = torch.autograd.grad(
            function(*variables), variables, grads, create_graph=True, materialize_grads=True
        )
    return found


def _variable(t: Tensor) -> Tensor:
    """The same values as a variable of its own, connected to `t` if that is one."""
    view = t.view_as(t)
    return view if view.requires_grad else view.requires_grad_()


def _pulled_back(
    function: Callable[[list[Any]], tuple[Tensor | None, ...]],
    variables: _Tensors,
    wanted: _Flags,
    grads: _Tensors,
    product: Callable[[_Function, list[Tensor], list[Tensor]], Sequence[Tensor]],
) -> tuple[Tensor | None, ...]:
    """Gradients of the variables where `wanted`, from those of the results of `function`."""
    asked = [yes and v is not None for yes, v in zip(wanted, variables, strict=True)]
    own: list[Any] = [v for yes, v in zip(asked, variables, strict=True) if yes]
    given = [g for g in grads if g is not None]

    def of_own(*those: Tensor) -> list[Tensor]:
        left = iter(those)
        found = function(
            [next(left) if yes else v for yes, v in zip(asked, variables, strict=True)]
        )
        return [f for f, g in zip(found, grads, strict=True) if f is not None and g is not None]

    found = iter(product(of_own, own, given) if given else [torch.zeros_like(v) for v in own])
    return tuple(next(found) if yes else None for yes in asked)
