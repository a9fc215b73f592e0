"""torch.func.vmap of the operators.

A dimension of the inputs is folded into the batch: the operator is called once. Where weights have
it, or where each sample is to have gradients of the weights of its own, the operator is called for
one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastrnn import ops

_Dims = Sequence[Any]


def _fold(t: Tensor | None, dim: int | None, axis: int, V: int) -> Tensor | None:
    """The tensor with V samples for each of the axis, those of one beside each other.

    So that rows which are alive at a step stay the first ones, in packed data too.
    """
    if t is None:
        return None
    if t.dim() - (dim is not None) == 1:  # empty: nothing was kept
        return t if dim is None else t.select(dim, 0)
    t = (
        t.unsqueeze(axis + 1).expand(*t.shape[: axis + 1], V, *t.shape[axis + 1 :])
        if dim is None
        else t.movedim(dim, axis + 1)
    )
    return t.flatten(axis, axis + 1)


def _unfold(t: Tensor, axis: int, V: int) -> tuple[Tensor, int | None]:
    """The way back, and where V is."""
    if t.dim() == 1:
        return t, None
    return t.unflatten(axis, (t.size(axis) // V, V)), axis + 1


def _one_by_one(
    operator: Callable[..., Any], dims: _Dims, args: Sequence[Any], V: int, same_random: bool
) -> tuple[Any, Any]:
    """The operator's results for every sample, stacked."""
    leaves, spec = pytree.tree_flatten(tuple(args))
    where = pytree.tree_flatten(tuple(dims), is_leaf=lambda d: d is None)[0]
    device = next(t.device for t in leaves if isinstance(t, Tensor))
    results = []
    for v in range(V):
        # The numbers of a call with the same randomness are left undrawn, but by the last.
        fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with fork if same_random and v + 1 < V else contextlib.nullcontext():
            given = [t if d is None else t.select(d, v) for t, d in zip(leaves, where, strict=True)]
            results.append(operator(*pytree.tree_unflatten(given, spec)))
    flat = [pytree.tree_flatten(r) for r in results]
    stacked = [torch.stack(parts) for parts in zip(*(f for f, _ in flat), strict=True)]
    return pytree.tree_unflatten(stacked, flat[0][1]), pytree.tree_unflatten(
        [0] * len(stacked), flat[0][1]
    )


@torch.library.register_vmap("fastrnn::forward")
def _forward(info: Any, dims: _Dims, *args: Any) -> tuple[Any, Any]:
    cell, input, h0, c0, weights, batch_sizes, biases, layers, bidirectional, p, train, *keep = args
    V = info.batch_size
    random = train and p > 0 and layers > 1
    if random and info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the "
            "'same' or 'different' randomness flags on vmap or perform the randomness operation "
            "out of vmap"
        )
    same_random = random and info.randomness == "same"
    if any(d is not None for d in dims[4]) or same_random:
        return _one_by_one(ops.forward, dims, args, V, same_random)
    packed = batch_sizes is not None
    results = ops.forward(
        cell, _fold(input, dims[1], 0 if packed else 1, V), _fold(h0, dims[2], 1, V),
        _fold(c0, dims[3], 1, V), weights, batch_sizes * V if packed else None,
        biases, layers, bidirectional, p, train, *keep,
    )  # fmt: skip
    axes = [0 if packed else 1, 1, 1, 1, 2, 2, 1]
    found = [_unfold(t, axis, V) for t, axis in zip(results, axes, strict=True)]
    return tuple(t for t, _ in found), tuple(d for _, d in found)


@torch.library.register_vmap("fastrnn::backward")
def _backward(info: Any, dims: _Dims, *args: Any) -> tuple[Any, Any]:
    weights, batch_sizes, wanted = args[7], args[8], args[17]
    V = info.batch_size
    if any(d is not None for d in dims[7]) or any(wanted[3:]):
        return _one_by_one(ops.backward, dims, args, V, same_random=False)
    packed = batch_sizes is not None
    rows = 0 if packed else 1
    # The axes of the batch: of the results' gradients, input and states; of what was kept.
    axes = {1: rows, 2: 1, 3: 1, 4: rows, 5: 1, 6: 1, 13: 1, 14: 2, 15: 2, 16: 1}
    folded = [_fold(a, dims[i], axes[i], V) if i in axes else a for i, a in enumerate(args)]
    folded[8] = batch_sizes * V if packed else None
    *found, grad_weights = ops.backward(*folded)
    pairs = [_unfold(t, axis, V) for t, axis in zip(found, [rows, 1, 1], strict=True)]
    return (*(t for t, _ in pairs), grad_weights), (
        *(d for _, d in pairs),
        [None] * len(weights),
    )
