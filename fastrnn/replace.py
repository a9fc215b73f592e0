"""fastrnn in models and code that were written for torch.nn: accelerate(), restore(), patch().

What can't be swapped is left alone and named, with the reason, at WARNING in the log ``fastrnn``.
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

from fastrnn import forwards, marked, modules

__all__ = ["Patch", "accelerate", "patch", "restore"]

_Module = TypeVar("_Module", bound=nn.Module)
_Class = type[nn.Module]
_Init = Callable[..., None]

_logger = logging.getLogger("fastrnn")

_FAST = modules.FAST
_TORCH: dict[_Class, _Class] = {fast: slow for slow, fast in _FAST.items()}
_THEIRS: tuple[_Class, ...] = tuple(_FAST)
_OURS: tuple[_Class, ...] = tuple(_TORCH)

_joined: dict[_Class, _Class] = {}  # a user's subclass -> the same on fastrnn's class, made here


class _KeptError(Exception):
    """Why a module keeps its class."""


def accelerate(model: _Module, *, keep_types: bool = False, recompute: bool = False) -> _Module:
    """Turn every torch.nn RNN, LSTM, GRU and cell in ``model`` into fastrnn's; return ``model``.

    In place, and only a module's class changes: parameters, buffers, hooks, training flag and every
    reference to the module from elsewhere (optimizers, shared submodules) stay what they were. A
    second call changes nothing.

    A subclass that keeps torch's ``forward``, or overrides it and calls ``super().forward``, is
    fast then too, and its modules stay instances of it. Left alone and reported are subclasses
    whose ``forward`` does not call it, those with a ``__call__``, rules of pickling or of class
    creation of their own (a metaclass other than ABCMeta), and modules whose ``forward`` was
    replaced on the instance. Scripted and quantized modules are none of torch.nn's classes, and
    modules in a plain list are not the model's: neither is touched.

    ``keep_types=True`` leaves the classes as well: ``type(module) is torch.nn.LSTM`` holds, for
    tools that look for the exact type, and the module has an attribute ``_fastrnn`` by which
    torch's class calls fastrnn. The first use in a process adds that to the methods of torch's six
    classes, for good; other modules are computed as before. A subclass keeps its class, whatever
    rules it has, and may call ``torch.nn.LSTM.forward(self, ...)`` by that name. Another process
    that unpickles such a module runs torch's code until it calls this function or :func:`patch`
    with ``keep_types=True`` too.
    Layers that are fastrnn's already stay as they are: :func:`restore` them first.

    ``recompute=True`` turns that option on in every RNN, LSTM and GRU of the model that is then
    fastrnn's, those of users' subclasses too; cells have no such option.

    Raises TypeError where ``model`` is not a torch.nn.Module.
    """
    _swap(model, _keep_type if keep_types else _change_type)
    if recompute:
        for module in model.modules():
            if isinstance(module, nn.RNNBase) and marked.is_ours(module):
                setattr(module, modules.RECOMPUTE, True)
    return model


def restore(model: _Module) -> _Module:
    """Turn every fastrnn module in ``model`` back into torch.nn's, in place; return ``model``.

    The way back from :func:`accelerate`, and it also takes layers that were built as fastrnn's and
    those that kept their types. A subclass written on fastrnn's class has no torch class to go back
    to: left alone and reported.

    Raises TypeError where ``model`` is not a torch.nn.Module.
    """
    return _swap(model, _restore)


def patch(*, keep_types: bool = False) -> "Patch":
    """Let ``torch.nn.LSTM(...)`` and the five others, written anywhere, build fastrnn's from now.

    For good::

        fastrnn.patch()

    or for a block::

        with fastrnn.patch():
            model = library.make_model()

    The constructors of torch's classes are patched and no name is replaced: a ``from torch.nn
    import LSTM`` done earlier builds fastrnn's as well, ``isinstance(m, nn.LSTM)`` holds for old
    and new layers, ``class MyLSTM(nn.LSTM)`` and old pickles work. Subclasses fare as with
    :func:`accelerate`; a class that is left alone is reported once. Layers built before, copied or
    unpickled keep their class: :func:`accelerate` is for those. What was built under a patch stays
    fastrnn's when it ends.

    With ``keep_types=True`` a layer built is of torch's class, as code that compares
    ``type(m)`` expects, and computed by fastrnn; :func:`accelerate` says how.

    A patch holds for the whole process: other threads that build layers meanwhile get fastrnn's
    too. Patches, each from a call of its own, may nest and end in any order; ``keep_types`` is that
    of the newest. torch's constructors are back when the last has ended.
    """
    return Patch(keep_types)


class Patch:
    """What :func:`patch` returns: in effect until :meth:`undo` or the end of its ``with`` block."""

    _lock = threading.Lock()
    _active: ClassVar[tuple["Patch", ...]] = ()
    _inits: ClassVar[dict[_Class, tuple[_Init, _Init]]] = {}  # torch's and ours

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
                    # Where somebody has wrapped ours since, it stays below theirs, idle by _active.
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
        _tell_of_types()


def _keep_type(module: nn.Module) -> None:
    if _needs_work(module):
        _check_forwards(type(module), by_name=True)
        marked.mark(module)


def _restore(module: nn.Module) -> None:
    marked.unmark(module)
    module.__class__ = _torch_class(module)


def _needs_work(module: nn.Module) -> bool:
    if marked.is_marked(module):
        marked.install()  # it may come from another process
    if marked.is_ours(module):
        return False
    if "forward" in vars(module):
        raise _KeptError("has a forward set on the instance")
    return True


@functools.cache  # once a process
def _tell_of_types() -> None:
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
    # torch.nn.utils.parametrize gave this module a class of its own, which holds the properties and
    # has the class before as its base. Deep copies of the module share it: leave it, make another.
    if len(cls.__bases__) != 1:
        raise _KeptError("was parametrized and then given another class")
    before = cls.__bases__[0]
    after = convert(before)
    if after is before:
        return cls
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    # torch's is among them only where the class before had none.
    if getattr(before, "__deepcopy__", modules.deep_copy) is modules.deep_copy:
        namespace["__deepcopy__"] = modules.deep_copy
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
    """Check that the user's forwards call the next and the last torch's, or torch's ``by_name``."""
    base = _base(cls)
    for c in cls.__mro__[: cls.__mro__.index(base)]:
        forward = vars(c).get("forward")
        if forward is None or forwards.calls_super(forward):
            continue
        if not forwards.calls_by_name(forward, base.__name__):
            raise _KeptError("overrides forward and does not call super().forward")
        if not by_name:
            raise _KeptError(
                f"overrides forward and calls {base.__name__}.forward and not super().forward: "
                "keep_types=True makes it fast"
            )
        return


class _Unnamed:
    """Attributes of fastrnn's classes that users' subclasses do not inherit."""

    class _Absent:
        def __init__(self, name: str) -> None:
            self._name = name

        def __get__(self, module: nn.Module | None, cls: _Class) -> Any:
            # Of an instance, nn.Module looks on among its parameters, buffers and submodules.
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self._name!r}")

    recompute = _Absent("recompute")


def _join(cls: _Class) -> _Class:
    """Return a subclass of the user's ``cls`` in which fastrnn's class comes before torch's."""
    if cls in _joined:
        return _joined[cls]
    _check_forwards(cls)
    base = _base(cls)
    before = [vars(c) for c in cls.__mro__[: cls.__mro__.index(base)]]
    # The first may not call forward at all; the rest could tell the class made here from cls.
    for name in ("__call__", "__reduce__", "__reduce_ex__", "__init_subclass__"):
        if any(name in names for names in before):
            raise _KeptError(f"overrides {name}")
    if type(cls) not in (type, abc.ABCMeta):
        raise _KeptError(f"has the metaclass {type(cls).__name__}")

    def reduce(self: nn.Module, protocol: int) -> Any:
        made = object.__reduce_ex__(self, max(protocol, 2))
        if type(self) is not joined or not isinstance(made, tuple):
            return made
        # pickle finds a class by its name, and by this name it finds the user's.
        return _unpickled, (cls, *made[1][1:]), *made[2:]

    namespace = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": reduce,
        "__prepare_scriptable__": lambda self: modules.as_torchs(self, cls),
    }
    joined: _Class = type(cls.__name__, (cls, _Unnamed, _FAST[base]), namespace)
    return _joined.setdefault(cls, joined)


def _unpickled(cls: _Class, *args: Any) -> nn.Module:
    """Return a blank module of the user's class ``cls``, fast where that is (still) possible."""
    with contextlib.suppress(_KeptError):
        cls = _fast_base(cls)
    return cls.__new__(cls, *args)
