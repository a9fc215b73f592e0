"""What a step's function is called with to trace it, instead of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.nn import functional as F

from .expressions import Node
from .functions import FUNCTIONS
from .gates import Gates

if TYPE_CHECKING:
    from .trace import Tracer

_FUNCTION_NAMES: dict[Any, str] = {
    getattr(module, name): name
    for module in (torch, F, torch.Tensor)
    for name in FUNCTIONS
    if hasattr(module, name)
}


def described(value: Any) -> str:
    """A value as errors name it."""
    if isinstance(value, Value):
        return "a value"
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, TracedGates):
        return f"all gates of {value._of}"
    if isinstance(value, torch.Tensor):
        return "a tensor"
    return f"{type(value).__name__} {value!r}"[:80]


def _refuse(operator: str) -> Callable[..., Any]:
    def method(self: Value, *_: Any) -> NoReturn:
        self.tracer.fail(f"{operator} can't be compiled")

    return method


class Value:
    """A placeholder for a tensor: what is done with it becomes nodes of the tracer's graph."""

    __slots__ = ("node", "tracer")
    __array_ufunc__ = None  # so that numpy's numbers leave an operator to this class

    def __init__(self, tracer: Tracer, node: Node) -> None:
        self.tracer, self.node = tracer, node

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Value:
        kwargs = kwargs or {}
        tracer = next(
            value.tracer
            for given in (*args, *kwargs.values())
            for value in (given if isinstance(given, (tuple, list)) else [given])
            if isinstance(value, Value)
        )
        name = _FUNCTION_NAMES.get(function)
        if name is None:
            tracer.fail(f"torch's {getattr(function, '__name__', function)} can't be compiled")
        return tracer.call(name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS:
            self.tracer.fail(f"a tensor's .{name} can't be compiled")
        if name == "where" or not hasattr(torch.Tensor, name):
            module = "torch" if hasattr(torch, name) else "torch.nn.functional"
            self.tracer.fail(f"{name} is called as a method", f"call {module}.{name}(...)")
        return lambda *args, **kwargs: self.tracer.call(name, (self, *args), kwargs)

    def __add__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a * b)

    def __rmul__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a / b)

    def __rtruediv__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: b / a)

    def __lt__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a.compare("<", b))

    def __le__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a.compare("<=", b))

    def __gt__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a.compare(">", b))

    def __ge__(self, other: Any) -> Value:
        return self._binary(other, lambda a, b: a.compare(">=", b))

    def __neg__(self) -> Value:
        return Value(self.tracer, -self.tracer.operand(self))

    def __abs__(self) -> Value:
        return self.tracer.call("abs", (self,), {})

    def __pow__(self, exponent: Any) -> Value:
        return self.tracer.call("pow", (self, exponent), {})

    def _binary(self, other: Any, make: Callable[[Node, Node], Node]) -> Value:
        tracer = self.tracer
        return Value(tracer, make(tracer.operand(self), tracer.operand(other)))

    def _control_flow(self, *_: Any) -> NoReturn:
        self.tracer.fail(
            "Python needs a value's number here (if, and, or, not, float(), a loop)",
            "use torch.where(condition, a, b), which computes both and selects",
        )

    __bool__ = __float__ = __int__ = __index__ = __complex__ = _control_flow
    __iter__ = __len__ = __getitem__ = __contains__ = _control_flow

    __eq__, __ne__ = _refuse("=="), _refuse("!=")
    __mod__ = __rmod__ = _refuse("%")
    __floordiv__ = __rfloordiv__ = _refuse("//")
    __matmul__ = __rmatmul__ = _refuse("@")
    __rpow__ = _refuse("a number ** a tensor")
    __and__ = __rand__ = _refuse("&")
    __or__ = __ror__ = _refuse("|")
    __xor__ = __rxor__ = _refuse("^")
    __invert__, __round__ = _refuse("~"), _refuse("round()")
    __hash__ = object.__hash__

    def _in_place(self, *_: Any) -> NoReturn:
        self.tracer.fail(
            "an operation in place", "write c = c + ..., since c += ... changes the caller's tensor"
        )

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __setitem__ = _in_place


class TracedGates(Gates[Value]):
    """Placeholders of all gates of x or r."""

    def __init__(self, names: Sequence[str], values: Sequence[Value], of: str) -> None:
        super().__init__(names, values)
        self._of = of

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._names:
            self._fail(f"{self._of} has no gate {name!r}")
        return super().__getattr__(name)

    def __getitem__(self, index: int) -> Value:
        if not isinstance(index, int) or not -len(self) <= index < len(self):
            self._fail(f"{self._of} has no gate {index!r}")
        return super().__getitem__(index)

    def _fail(self, found: str) -> NoReturn:
        of, first = self._of, self._names[0]
        self._values[0].tracer.fail(
            found,
            f"its gates are {', '.join(self._names)}: take one, as {of}.{first} or {of}[0]",
        )

    def _as_one(self, *_: Any) -> NoReturn:
        self._fail(f"{self._of} is used as one value")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _as_one
    __rtruediv__ = __neg__ = __pow__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _as_one

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> NoReturn:
        gates = next(v for v in (*args, *(kwargs or {}).values()) if isinstance(v, TracedGates))
        gates._as_one()
