"""fastrnn in models and code that were written for torch.nn: accelerate(), restore(), patch().

Modules that can't be converted are left unchanged, and reported with the reason as a warning in the
log ``fastrnn``.
"""

import abc
import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from fastrnn import marked, modules, super_calls
from fastrnn.copies import deep_copy, with_class

__all__ = ["Patch", "accelerate", "patch", "restore"]

_Module = TypeVar("_Module", bound=nn.Module)
_Class = type[nn.Module]
_Init = Callable[..., None]

_logger = logging.getLogger("fastrnn")

_FAST = modules.FAST
_TORCH: dict[_Class, _Class] = {fast: slow for slow, fast in _FAST.items()}
_THEIRS: tuple[_Class, ...] = tuple(_FAST)
_OURS: tuple[_Class, ...] = tuple(_TORCH)

_joined: dict[_Class, _Class] = {}  # a user's subclass -> its subclass made by _join


class _KeptError(Exception):
    """The reason why a module keeps its class."""


def accelerate(model: _Module, *, keep_types: bool = False, recompute: bool = False) -> _Module:
    """Convert every RNN, LSTM, GRU and cell of torch.nn in ``model`` to fastrnn's, in place.

    Only the class of a module changes. Parameters, buffers, hooks, the training flag and all
    references to the module (from optimizers, from shared submodules) stay the same. A second call
    changes nothing.

    A user's subclass is converted too if it has torch's ``forward`` or one that calls
    ``super().forward``; its modules stay instances of it. These modules are left unchanged and
    reported in the log ``fastrnn``: those of subclasses whose ``forward`` does not call
    ``super().forward``, or that define ``__call__``, their own pickling or ``__init_subclass__``,
    or have a metaclass other than ABCMeta; and those with a ``forward`` set on the instance.
    Scripted and quantized modules are not of torch.nn's classes, and modules in a plain list do not
    belong to the model: both are left unchanged.

    Args:
        model: a module that contains recurrent layers, or is one.
        keep_types: whether to keep the classes too, for tools that compare the exact type:
            ``type(module) is torch.nn.LSTM`` still holds. The module gets an attribute
            ``_fastrnn``, and the first use in a process patches the methods of torch's six classes
            for the rest of the process, to call fastrnn for modules with this attribute. Any
            subclass keeps its class, and its ``forward`` may also call
            ``torch.nn.LSTM.forward(self, ...)``. A process that unpickles such a module runs
            torch's code until it calls this function, or :func:`patch`, with ``keep_types=True``.
            Layers that are fastrnn's already are not changed: :func:`restore` them first.
        recompute: whether to set the option ``recompute`` of every RNN, LSTM and GRU in the model
            that fastrnn computes after the call. Cells have no such option.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a torch.nn.Module.
    """
    _swap(model, _keep_type if keep_types else _change_type)
    if recompute:
        for module in model.modules():
            if isinstance(module, nn.RNNBase) and marked.is_ours(module):
                setattr(module, modules.RECOMPUTE, True)
    return model


def restore(model: _Module) -> _Module:
    """Convert every module of fastrnn in ``model`` to torch.nn's, in place.

    This undoes :func:`accelerate`, and converts layers that were built as fastrnn's. Modules of a
    subclass of fastrnn's class have no class of torch's: they are left unchanged and reported in
    the log ``fastrnn``.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a torch.nn.Module.
    """
    return _swap(model, _restore)


def patch(*, keep_types: bool = False) -> "Patch":
    """Make ``torch.nn.LSTM(...)`` and the five other classes build fastrnn's layers.

    For the rest of the process::

        fastrnn.patch()

    or in a block::

        with fastrnn.patch():
            model = library.make_model()

    This patches the constructors of torch's classes and replaces no name: ``LSTM`` from an earlier
    ``from torch.nn import LSTM`` builds fastrnn's layers too, ``isinstance(m, nn.LSTM)`` holds for
    old and new layers, and ``class MyLSTM(nn.LSTM)`` and old pickles work. Subclasses are converted
    as by :func:`accelerate`, and a class that is left unchanged is reported once. Layers that were
    built before, copied or unpickled keep their class: use :func:`accelerate`. Layers that were
    built under a patch stay fastrnn's after it ends.

    A patch applies to all threads of the process. Several patches may nest, and end in any order;
    the newest one's ``keep_types`` counts. torch's constructors are restored when the last patch
    ends.

    Args:
        keep_types: whether a new layer is of torch's class, as :func:`accelerate` describes.

    Returns:
        The patch, a context manager with a method ``undo()``.
    """
    return Patch(keep_types)


class Patch:
    """A patch by :func:`patch`, in effect until :meth:`undo` or the end of its ``with`` block."""

    _lock = threading.Lock()
    _active: ClassVar[tuple["Patch", ...]] = ()
    _inits: ClassVar[dict[_Class, tuple[_Init, _Init]]] = {}  # torch's and the patched

    def __init__(self, keep_types: bool = False) -> None:
        self.keep_types = keep_types
        self._apply()

    def _apply(self) -> None:
        if self.keep_types:
            marked.install()
        with Patch._lock:
            if self in Patch._active:
                return
            if not Patch._active:
                for cls in _THEIRS:
                    init: _Init = cls.__init__
                    Patch._inits[cls] = init, _building_fast(init)
                    cls.__init__ = Patch._inits[cls][1]  # type: ignore[method-assign]
            Patch._active += (self,)

    def undo(self) -> None:
        """End this patch; a second call changes nothing."""
        with Patch._lock:
            if self not in Patch._active:
                return
            Patch._active = tuple(p for p in Patch._active if p is not self)
            if not Patch._active:
                for cls, (theirs, ours) in Patch._inits.items():
                    # If other code has wrapped ours, it stays: without _active it does nothing.
                    if vars(cls)["__init__"] is ours:
                        cls.__init__ = theirs  # type: ignore[method-assign]

    def __enter__(self) -> "Patch":
        self._apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def _building_fast(init: _Init) -> _Init:
    @functools.wraps(init)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        active = Patch._active
        if active:
            try:
                (_keep_type if active[-1].keep_types else _change_type)(self)
            except _KeptError as why:
                _report_class(type(self), why)

    return build


_reported: weakref.WeakSet[_Class] = weakref.WeakSet()


def _report_class(cls: _Class, why: _KeptError) -> None:
    if cls not in _reported:
        _reported.add(cls)
        _logger.warning("%s is left alone: it %s", cls.__qualname__, why)


def _swap(model: _Module, change: Callable[[nn.Module], None]) -> _Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, _THEIRS):
            try:
                change(module)
            except _KeptError as why:
                where = f"'{name}'" if name else "the model"
                kind = type(module).__qualname__
                _logger.warning("%s (%s) is left alone: it %s", where, kind, why)
    return model


def _change_type(module: nn.Module) -> None:
    if _needs_work(module):
        module.__class__ = _fast_class(module)
        _log_changed_types()


def _keep_type(module: nn.Module) -> None:
    if _needs_work(module):
        _check_forwards(type(module), by_name=True)
        marked.mark(module)


def _restore(module: nn.Module) -> None:
    marked.unmark(module)
    module.__class__ = _torch_class(module)


def _needs_work(module: nn.Module) -> bool:
    if marked.is_marked(module):
        marked.install()  # it may have been unpickled
    if marked.is_ours(module):
        return False
    if "forward" in vars(module):
        raise _KeptError("has a forward set on the instance")
    return True


@functools.cache  # once per process
def _log_changed_types() -> None:
    _logger.info(
        "layers change their classes from torch.nn's to fastrnn's, subclasses of them: code that "
        "compares type(layer) with torch.nn's no longer sees them; keep_types=True keeps the types"
    )


def _fast_class(module: nn.Module) -> _Class:
    return _convert(module, _fast_base)


def _torch_class(module: nn.Module) -> _Class:
    return _convert(module, _torch_base)


def _convert(module: nn.Module, convert: Callable[[_Class], _Class]) -> _Class:
    cls = type(module)
    if not parametrize.is_parametrized(module):
        return convert(cls)
    # torch.nn.utils.parametrize gave this module its own class, a subclass of its previous class
    # with properties. Deep copies of the module share it: leave it unchanged and make another.
    if len(cls.__bases__) != 1:
        raise _KeptError("was parametrized and then given another class")
    before = cls.__bases__[0]
    after = convert(before)
    if after is before:
        return cls
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    # parametrize adds a __deepcopy__ only if the previous class has none.
    if getattr(before, "__deepcopy__", deep_copy) is deep_copy:
        namespace["__deepcopy__"] = deep_copy
    return type(cls.__name__, (after,), namespace)


def _fast_base(cls: _Class) -> _Class:
    if issubclass(cls, _OURS):
        return cls
    return _FAST[cls] if cls in _FAST else _join(cls)


def _torch_base(cls: _Class) -> _Class:
    if not issubclass(cls, _OURS):
        return cls
    if cls in _TORCH:
        return _TORCH[cls]
    users: _Class = cls.__bases__[0]
    if _joined.get(users) is not cls:
        raise _KeptError("is of a class written on fastrnn's")
    return users


def _base(cls: _Class) -> _Class:
    return next(slow for slow in _THEIRS if issubclass(cls, slow))


def _check_forwards(cls: _Class, by_name: bool = False) -> None:
    """Check that users' forwards call super().forward or, if ``by_name``, torch's by its name."""
    base = _base(cls)
    for c in cls.__mro__[: cls.__mro__.index(base)]:
        forward = vars(c).get("forward")
        if forward is None or super_calls.calls_super(forward):
            continue
        if not super_calls.calls_by_name(forward, base.__name__):
            raise _KeptError("overrides forward and does not call super().forward")
        if not by_name:
            raise _KeptError(
                f"overrides forward and calls {base.__name__}.forward and not super().forward: "
                "keep_types=True makes it fast"
            )
        return


class _WithoutOptions:
    """Hides the attributes of fastrnn's classes that users' subclasses must not inherit."""

    class _Absent:
        def __init__(self, name: str) -> None:
            self._name = name

        def __get__(self, module: nn.Module | None, cls: _Class) -> Any:
            # For an instance, nn.Module then looks in its parameters, buffers and submodules.
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self._name!r}")

    recompute = _Absent("recompute")


def _join(cls: _Class) -> _Class:
    """Return a subclass of the user's ``cls`` in which fastrnn's class comes before torch's."""
    if cls in _joined:
        return _joined[cls]
    _check_forwards(cls)
    base = _base(cls)
    before = [vars(c) for c in cls.__mro__[: cls.__mro__.index(base)]]
    # The first need not call forward; the others could tell the class made here from cls.
    for name in ("__call__", "__reduce__", "__reduce_ex__", "__init_subclass__"):
        if any(name in names for names in before):
            raise _KeptError(f"overrides {name}")
    if type(cls) not in (type, abc.ABCMeta):
        raise _KeptError(f"has the metaclass {type(cls).__name__}")

    def reduce(self: nn.Module, protocol: int) -> Any:
        made = object.__reduce_ex__(self, max(protocol, 2))
        if type(self) is not joined or not isinstance(made, tuple):
            return made
        # pickle stores a class by its name, and this name is the user's class.
        return _unpickled, (cls, *made[1][1:]), *made[2:]

    namespace = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": reduce,
        "__prepare_scriptable__": lambda self: with_class(self, cls),
    }
    joined: _Class = type(cls.__name__, (cls, _WithoutOptions, _FAST[base]), namespace)
    return _joined.setdefault(cls, joined)


def _unpickled(cls: _Class, *args: Any) -> nn.Module:
    """Return an empty module of the user's class ``cls``, fast if that is (still) possible."""
    with contextlib.suppress(_KeptError):
        cls = _fast_base(cls)
    return cls.__new__(cls, *args)
