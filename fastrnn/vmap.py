"""torch.func.vmap of the operators.

The operator is called once. A dimension of the inputs is folded into the batch. Where weights have
it, or where each sample is to have gradients of the weights of its own, it becomes the operator's
own dimension of models (ops.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils import _pytree as pytree

from fastrnn import ops

_Dims = Sequence[Any]


class _Info(NamedTuple):
    """What a rule is told of its vmap."""

    batch_size: int
    randomness: str = "error"


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


def _to_models(t: Tensor | None, dim: int | None, V: int, of_models: bool) -> Tensor | None:
    """The tensor with V in front, or in the dimension of models that is there already."""
    if t is None:
        return None
    t = t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1) if of_models else t


def _from_models(t: Tensor, V: int, of_models: bool) -> tuple[Tensor, int | None]:
    """The way back, and where V is."""
    if t.dim() == 1:
        return t, None
    return t.unflatten(0, (V, t.size(0) // V)) if of_models else t, 0


def _are_of_models(weights: Sequence[Tensor], dims: Sequence[int | None]) -> bool:
    """Whether each sample's weights are those of several models: vmap over vmap."""
    return bool(weights) and weights[0].dim() - (dims[0] is not None) == 3


def _with_the_same_masks(dims: _Dims, args: Sequence[Any], V: int) -> tuple[Any, Any]:
    """The results of forward for one sample after the other, stacked."""
    leaves, spec = pytree.tree_flatten(tuple(args))
    where = pytree.tree_flatten(tuple(dims), is_leaf=lambda d: d is None)[0]
    device = next(t.device for t in leaves if isinstance(t, Tensor))
    results = []
    for v in range(V):
        # The numbers of a call are left undrawn, but by the last.
        fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with fork if v + 1 < V else contextlib.nullcontext():
            given = [t if d is None else t.select(d, v) for t, d in zip(leaves, where, strict=True)]
            results.append(ops.forward(*pytree.tree_unflatten(given, spec)))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * 7


def _forward(info: _Info, dims: _Dims, *args: Any) -> tuple[Any, Any]:
    cell, input, h0, c0, weights, batch_sizes, _, layers, _, p, train, *_ = args
    V = info.batch_size
    random = train and p > 0 and layers > 1
    if random and info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the "
            "'same' or 'different' randomness flags on vmap or perform the randomness operation "
            "out of vmap"
        )
    if random and info.randomness == "same":
        return _with_the_same_masks(dims, args, V)
    of_models = _are_of_models(weights, dims[4])
    if any(d is not None for d in dims[4]):
        tensors = zip([input, h0, c0, *weights], [*dims[1:4], *dims[4]], strict=True)
        input, h0, c0, *weights = (_to_models(t, d, V, of_models) for t, d in tensors)
        results = ops.forward(cell, input, h0, c0, weights, *args[5:])
        found = [_from_models(t, V, of_models) for t in results]
    else:
        packed = batch_sizes is not None
        rows = of_models + (not packed)
        one = of_models + 1
        results = ops.forward(
            cell, _fold(input, dims[1], rows, V), _fold(h0, dims[2], one, V),
            _fold(c0, dims[3], one, V), weights, batch_sizes * V if packed else None, *args[6:],
        )  # fmt: skip
        axes = [rows, one, one, one, one + 1, one + 1, one]
        found = [_unfold(t, axis, V) for t, axis in zip(results, axes, strict=True)]
    return tuple(t for t, _ in found), tuple(d for _, d in found)


# Of the arguments of backward, and what was kept among them.
_TENSORS, _KEPT = (1, 2, 3, 4, 5, 6), (13, 14, 15, 16)


def _backward(info: _Info, dims: _Dims, *args: Any) -> tuple[Any, Any]:
    weights, batch_sizes, wanted = args[7], args[8], args[17]
    V = info.batch_size
    of_models = _are_of_models(weights, dims[7])
    given = list(args)
    if any(d is not None for d in dims[7]) or any(wanted[3:]):
        for i in _TENSORS + _KEPT:
            if i in _KEPT and args[i].dim() - (dims[i] is not None) == 1:  # empty, for all
                given[i] = args[i] if dims[i] is None else args[i].select(dims[i], 0)
            else:
                given[i] = _to_models(args[i], dims[i], V, of_models)
        pairs = zip(weights, dims[7], strict=True)
        given[7] = [_to_models(w, d, V, of_models) for w, d in pairs]
        *grads, grad_weights = ops.backward(*given)
        found = [_from_models(t, V, of_models) for t in grads]
        of_weights = [_from_models(t, V, of_models) for t in grad_weights]
    else:
        packed = batch_sizes is not None
        rows = of_models + (not packed)
        one = of_models + 1
        # The axes of the batch: of the results' gradients, input and states; of what was kept.
        axes = dict(zip(_TENSORS, [rows, one, one, rows, one, one], strict=True))
        axes |= dict(zip(_KEPT, [one, one + 1, one + 1, one], strict=True))
        for i, axis in axes.items():
            given[i] = _fold(args[i], dims[i], axis, V)
        given[8] = batch_sizes * V if packed else None
        *grads, grad_weights = ops.backward(*given)
        found = [_unfold(t, axis, V) for t, axis in zip(grads, [rows, one, one], strict=True)]
        of_weights = [(t, None) for t in grad_weights]
    return (*(t for t, _ in found), [t for t, _ in of_weights]), (
        *(d for _, d in found),
        [d for _, d in of_weights],
    )


# ---- the rules -----------------------------------------------------------------------------------
# torch.library.register_vmap goes through the arguments and results as trees of anything: that took
# longer than eight models of a step each.

_functorch = torch._C._functorch
_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _unwrapped(t: Any, level: int) -> tuple[Any, Any]:
    """The tensor or list of them without this vmap's dimension, and where that was."""
    if isinstance(t, Tensor):
        return _functorch._unwrap_batched(t, level)
    if isinstance(t, list) and t and isinstance(t[0], Tensor):
        pairs = [_functorch._unwrap_batched(one, level) for one in t]
        return [one for one, _ in pairs], [d for _, d in pairs]
    return t, None


def _has_dim(dim: Any) -> bool:
    return any(d is not None for d in dim) if isinstance(dim, list) else dim is not None


def _wrapped(t: Any, dim: Any, level: int) -> Any:
    """The way back."""
    if isinstance(t, list):
        return [_wrapped(one, d, level) for one, d in zip(t, dim, strict=True)]
    return t if dim is None else _functorch._add_batch_dim(t, dim, level)


def _rule(operator: Any, batched: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """What vmap calls in place of the operator."""

    def run(_: Any, *args: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        pairs = [_unwrapped(t, level) for t in args]
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            if not any(_has_dim(d) for _, d in pairs):
                return operator(*args)
            info = _Info(interpreter.batch_size(), interpreter.randomness())
            found, dims = batched(info, [d for _, d in pairs], *(t for t, _ in pairs))
        return tuple(_wrapped(t, d, level) for t, d in zip(found, dims, strict=True))

    return run


# ---- the older vmap ------------------------------------------------------------------------------
# Of torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional's vectorize=True.


_MOST_LEVELS = 63  # kVmapNumLevels in ATen/LegacyBatchedTensorImpl.h, less the one that is none


def _unwrapped_of_older(t: Any, level: int) -> tuple[Any, int | None]:
    """The tensor with its dimension of this vmap in front, and where that is; or as it is."""
    if not isinstance(t, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(t):
        return t, None
    # One without such a dimension comes back expanded to this size.
    removed = torch._remove_batch_dim(t, level, 0, 0)
    return (removed, 0) if len(removed) else (t, None)


def _backward_of_older_vmap(*args: Any) -> Any:
    leaves, spec = pytree.tree_flatten(args)
    nesting = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # The innermost that is left. A thread of autograd's, as gradients on a GPU have it, is not told
    # how many there are.
    for level in range(nesting or _MOST_LEVELS, 0, -1):
        pairs = [_unwrapped_of_older(t, level) for t in leaves]
        sizes = [len(t) for t, d in pairs if d is not None]
        if sizes:
            break
    else:
        raise RuntimeError("fastrnn: no tensor here has a dimension of a vmap")
    found, dims = _backward(
        _Info(sizes[0]),
        pytree.tree_unflatten([d for _, d in pairs], spec),
        *pytree.tree_unflatten([t for t, _ in pairs], spec),
    )
    results, spec = pytree.tree_flatten(found)
    where = pytree.tree_flatten(dims, is_leaf=lambda d: d is None)[0]
    wrapped = [
        t if d is None else torch._add_batch_dim(t, d, level)
        for t, d in zip(results, where, strict=True)
    ]
    return pytree.tree_unflatten(wrapped, spec)


_rules = torch.library.Library("fastrnn", "IMPL")
_rules.impl("forward", _rule(ops.forward, _forward), "FuncTorchBatched", with_keyset=True)
_rules.impl("backward", _rule(ops.backward, _backward), "FuncTorchBatched", with_keyset=True)
_rules.impl("backward", _backward_of_older_vmap, "Batched")
