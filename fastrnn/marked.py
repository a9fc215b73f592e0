"""Layers of torch.nn's own classes that are computed by fastrnn, for keep_types=True.

Such a layer has a mark, an attribute of the instance. Copies, pickles and replicas have it too, and
it has no effect in a process without fastrnn. At the first use, torch's six classes get methods
that call fastrnn's method if the instance is marked, else torch's. They stay for the rest of the
process, since a marked layer can outlive the call that marked it.
"""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

from torch import nn

from fastrnn.modules import FAST

MARK = "_fastrnn"

_OURS: tuple[type[nn.Module], ...] = tuple(FAST.values())
_THEIRS: tuple[type[nn.Module], ...] = tuple(FAST)

_lock = threading.Lock()
_installed = False


def mark(module: nn.Module) -> None:
    """Make fastrnn compute ``module``, of torch's class or of a user's subclass."""
    install()
    vars(module)[MARK] = True


def unmark(module: nn.Module) -> None:
    """Make torch compute it again."""
    vars(module).pop(MARK, None)


def is_marked(module: nn.Module) -> bool:
    """Whether it has the mark, which has an effect once :func:`install` was called."""
    return MARK in vars(module)


def is_ours(module: object) -> bool:
    """Whether fastrnn computes a module, by its class or by the mark."""
    if isinstance(module, _OURS):
        return True
    return _installed and isinstance(module, _THEIRS) and is_marked(module)


def install() -> None:
    """Give torch's classes the methods that check the mark, once."""
    global _installed
    with _lock:
        if not _installed:
            for theirs, ours in FAST.items():
                for name, method in vars(ours).items():
                    if isinstance(method, types.FunctionType) and not name.startswith("__"):
                        setattr(theirs, name, _by_mark(getattr(theirs, name), ours, name))
            _installed = True


def _by_mark(theirs: Any, ours: type[nn.Module], name: str) -> types.FunctionType:
    mark = MARK

    def by_mark(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if mark in self.__dict__:
            return getattr(ours, name)(self, *args, **kwargs)
        return theirs(self, *args, **kwargs)

    # torch.jit.script compiles the source of the wrapped function with the globals of the wrapper.
    made = types.FunctionType(by_mark.__code__, theirs.__globals__, closure=by_mark.__closure__)
    functools.update_wrapper(made, theirs)
    return made
