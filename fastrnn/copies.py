"""Copies of layers and cells."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

_Module = TypeVar("_Module", bound=nn.Module)


def deep_copy(self: _Module, memo: dict[int, Any]) -> _Module:
    """Copy as copy.deepcopy does, also where weights are computed from other tensors.

    copy.deepcopy refuses tensors that are not leaves. A parametrization leaves such tensors in
    ``_flat_weights``; pruning and the old weight_norm leave them as attributes, whose values the
    copy has. The copy computes its own weights at each call, as the original does.

    A copy of a module whose ``compile()`` was called is not compiled, as with nn.Linear. A compiled
    copy of torch's layers would compute with the original's parameters.
    """
    for value in vars(self).values():
        if isinstance(value, torch.Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    if parametrize.is_parametrized(self):  # can't be pickled; torch also copies the attributes
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = vars(self).copy()
        if "_flat_weights" in state:  # _flat_weight_refs differs, so the copy reads its weights
            state["_flat_weights"] = [None] * len(state["_flat_weights"])
        vars(copied).update(copy.deepcopy(state, memo))
    else:
        make, arguments, *rest = cast(tuple[Any, ...], self.__reduce_ex__(4))
        copied = make(*copy.deepcopy(arguments, memo))
        memo[id(self)] = copied
        if rest and rest[0] is not None:
            copied.__setstate__(copy.deepcopy(rest[0], memo))
    vars(copied).pop("_compiled_call_impl", None)
    return copied


def with_class(self: _Module, cls: Any) -> _Module:
    """Return a module of the class ``cls`` with the same parameters."""
    module = copy.copy(self)
    module.__class__ = cls
    return module
