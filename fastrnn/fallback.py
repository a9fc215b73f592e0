"""Calls that torch's own functions answer: by their results, or by their errors."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrnn import _C

_log = logging.getLogger("fastrnn")
_counts: collections.Counter[str] = collections.Counter()

# Devices with kernels in this build; on meta, the fake kernels.
_DEVICES = ("cpu", "meta", *(["cuda"] if _C.has_cuda else []))

_ERRORS = (TypeError, RuntimeError, ValueError, IndexError)


def fallbacks() -> dict[str, int]:
    """How many calls torch's own kernels computed because this build has none for the arguments.

    Returns:
        Reason -> number of calls. Reasons are a device without kernels, a dtype or layout without
        kernels (complex, sparse), and sizes of 0.
    """
    return dict(_counts)


def missing_kernels(input: Tensor) -> str | None:
    """What this build has no kernels for, or None if it has kernels for such an input."""
    if input.device.type not in _DEVICES:
        return f"on {input.device.type}"
    if input.is_complex():
        return f"of {input.dtype}"
    if input.layout is not torch.strided:
        return f"of {input.layout}"
    return None


def call_torch(function: Callable[..., Any], reason: str, *args: Any) -> Any:
    """The results of torch's function, counted as a fallback unless it raises."""
    results = function(*args)
    count(f"{function.__name__} {reason}", "torch's own are used")
    return results


def count(call: str, instead: str) -> None:
    """Count a call without kernels, and log the first of its kind.

    Args:
        call: what was called, and why there are no kernels.
        instead: what computes it.
    """
    if not _counts[call]:
        _log.warning("%s: this build of fastrnn has no kernels for it, %s", call, instead)
    _counts[call] += 1


def answer_as_torch(function: Callable[..., Any], refused: Exception, *args: Any) -> Any:
    """Torch's error, or torch's results, for arguments that the kernels refused.

    Results only for sizes of 0 and for tensors of layouts and dtypes without kernels. Of other
    arguments, such as weights of a wrong shape, torch's kernels may read out of bounds.

    Raises:
        Exception: torch's, or `refused` where torch raises none.
    """
    tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
    unsupported = any(
        isinstance(t, Tensor)
        and (t.layout is not torch.strided or t.is_complex() or t.numel() == 0)
        for t in tensors
    )
    if not unsupported:
        raise_as_torch(function, *args)
        raise refused
    try:
        return call_torch(function, "of arguments without kernels", *args)
    except _ERRORS as error:
        raise error from None


def raise_as_torch(function: Callable[..., Any], *args: Any) -> None:
    """Raise torch's error for these arguments, whose text depends on torch's version.

    Returns where torch takes them, and inside transforms of torch.func.
    """
    if transforms_active():
        return
    with torch.no_grad():
        try:
            function(*args)
        except _ERRORS as error:
            raise error from None


def transforms_active() -> bool:
    """Whether a transform of torch.func is active, in which torch's functions always raise."""
    return bool(torch._C._are_functorch_transforms_active())


def are_valid(batch_sizes: Tensor, data: Tensor) -> bool:
    """Whether torch's functions can be called with these batch_sizes.

    Some others make them read out of bounds.
    """
    if (
        batch_sizes.device.type != "cpu"
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
    ):
        return False
    sizes = batch_sizes.tolist()
    return (
        bool(sizes)
        and sizes == sorted(sizes, reverse=True)
        and sizes[-1] >= 0
        and sum(sizes) == len(data)
    )
