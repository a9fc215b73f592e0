"""Derivatives by the formulas of `reference`, in plain PyTorch, which any transform can go through.

csrc calls the functions here for what the kernels do not compute: tangents and gradients of
gradients, where the latter are differentiated again, inside a transform or not on the CPU. First
derivatives in reverse mode are the operator `backward`.

All take the options of `reference.run` as a dict. `tensors` are input, h0, c0 (or None) and the
weights. `grads` are the gradients of output, h_n and c_n, or None where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from fastrnn import reference
from fastrnn.network import of_model
from fastrnn.ops import are_of_models

_Tensors = Sequence[Tensor | None]
_Flags = Sequence[bool]


def results(
    options: dict[str, Any],
    batch_sizes: Tensor | None,
    dropout_mask: Tensor,
    tensors: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """output, h_n and c_n (or None), as the operator `forward` computes them."""
    if are_of_models(tensors[3:]):
        each = [
            results(
                options, of_model(batch_sizes, model),
                dropout_mask[model] if dropout_mask.numel() else dropout_mask,
                [None if t is None else t[model] for t in tensors],
            )
            for model in range(len(tensors[3]))
        ]  # fmt: skip
        return tuple(
            None if models[0] is None else torch.stack(models) for models in zip(*each, strict=True)
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
    """Gradients of the tensors where `wanted`, else None, with their tangents.

    These are the results of the operator `backward`, which calls this function. No transform of
    torch.func can start within an operator. torch.autograd.grad can, and it propagates tangents.
    """
    with torch.enable_grad(), enable_inplace_requires_grad(True):
        tensors = [None if t is None else _variable(t) for t in tensors]
    return _pull_back(
        lambda them: results(options, batch_sizes, dropout_mask, them),
        tensors, wanted, grads, _product_by_graph,
    )  # fmt: skip


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

    def first_gradients(arguments: list[Any]) -> tuple[Tensor | None, ...]:
        return _pull_back(
            lambda tensors: results(options, batch_sizes, dropout_mask, tensors),
            arguments[3:], wanted, arguments[:3], _product_by_transform,
        )  # fmt: skip

    return _pull_back(first_gradients, variables, needed, grads, _product_by_transform)


def tangent_gradients(
    options: dict[str, Any],
    batch_sizes: Tensor | None,
    dropout_mask: Tensor,
    needed: _Flags,
    variables: _Tensors,
    grads: _Tensors,
) -> tuple[Tensor | None, ...]:
    """Gradients of `variables`: the tangents of the tensors, and then these.

    `grads` are those of the tangents of the results.
    """
    count = len(variables) // 2

    def tangents(arguments: list[Any]) -> tuple[Tensor | None, ...]:
        directions, tensors = arguments[:count], arguments[count:]
        moved = [i for i, t in enumerate(directions) if t is not None]

        def of_moved(*values: Tensor) -> list[Tensor]:
            all_of_them = list(tensors)
            for i, value in zip(moved, values, strict=True):
                all_of_them[i] = value
            found = results(options, batch_sizes, dropout_mask, all_of_them)
            return [t for t in found if t is not None]

        primals = tuple(tensors[i] for i in moved)
        found = torch.func.jvp(of_moved, primals, tuple(directions[i] for i in moved))[1]
        return (*found, *[None] * (3 - len(found)))

    return _pull_back(tangents, variables, needed, grads, _product_by_transform)


_Function = Callable[..., list[Tensor]]


def _product_by_transform(
    function: _Function, variables: list[Tensor], grads: list[Tensor]
) -> Sequence[Tensor]:
    """The vector-Jacobian product, at any depth of derivatives."""
    pull: Callable[[list[Tensor]], tuple[Tensor, ...]] = torch.func.vjp(function, *variables)[1]
    return pull(grads)


def _product_by_graph(
    function: _Function, variables: list[Tensor], grads: list[Tensor]
) -> Sequence[Tensor]:
    """The vector-Jacobian product, for variables made by `_variable`."""
    with torch.enable_grad():
        found: Sequence[Tensor] = torch.autograd.grad(
            function(*variables), variables, grads, create_graph=True, materialize_grads=True
        )
    return found


def _variable(t: Tensor) -> Tensor:
    """A view that requires a gradient, and is connected to `t` if `t` requires one."""
    view = t.view_as(t)
    return view if view.requires_grad else view.requires_grad_()


def _pull_back(
    function: Callable[[list[Any]], tuple[Tensor | None, ...]],
    variables: _Tensors,
    wanted: _Flags,
    grads: _Tensors,
    product: Callable[[_Function, list[Tensor], list[Tensor]], Sequence[Tensor]],
) -> tuple[Tensor | None, ...]:
    """Gradients of the variables where `wanted`, from those of the results of `function`."""
    selected = [yes and v is not None for yes, v in zip(wanted, variables, strict=True)]
    own: list[Any] = [v for yes, v in zip(selected, variables, strict=True) if yes]
    present = [g for g in grads if g is not None]

    def of_own(*values: Tensor) -> list[Tensor]:
        rest = iter(values)
        found = function(
            [next(rest) if yes else v for yes, v in zip(selected, variables, strict=True)]
        )
        return [f for f, g in zip(found, grads, strict=True) if f is not None and g is not None]

    found = iter(product(of_own, own, present) if present else [torch.zeros_like(v) for v in own])
    return tuple(next(found) if yes else None for yes in selected)
