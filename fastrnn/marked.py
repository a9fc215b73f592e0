"""Layers of torch.nn's own classes that are computed by fastrnn: what keep_types=True makes.

Such a layer has a mark, an attribute of the instance, which goes with it into copies, pickles and
replicas and means nothing to a process without fastrnn. At the first use, torch's six classes get
methods that look for the mark: where it is, they call fastrnn's, else torch's own. They stay for
the rest of the process, since a marked layer can outlive whatever marked it.
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
    """Have ``module``, of a class of torch's or a user's on it, computed by fastrnn."""
    install()
    vars(module)[MARK] = True


def unmark(module: nn.Module) -> None:
    """Leave it to torch again."""
    vars(module).pop(MARK, None)


def is_marked(module: nn.Module) -> bool:
    """Whether it has the mark, which counts in processes that have called :func:`install`."""
    return MARK in vars(module)


def is_ours(module: object) -> bool:
    """Whether a module's forward is fastrnn's, by its class or by the mark."""
    if isinstance(module, _OURS):
        return True
    return _installed and isinstance(module, _THEIRS) and is_marked(module)


def install() -> None:
    """Give torch's classes the methods that look for the mark, once."""
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

    def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if mark in self.__dict__:
            return getattr(ours, name)(self, *args, **kwargs)
        return theirs(self, *args, **kwargs)

    # torch.jit.script compiles the source of what is wrapped, with the globals of what wraps it.
    made = types.FunctionType(chosen.__code__, theirs.__globals__, closure=chosen.__closure__)
    functools.update_wrapper(made, theirs)
    return made
