"""Whether a user's forward calls torch's, by its bytecode: source is not always available."""

from __future__ import annotations

import dis
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

# Instructions that do not identify what is called. Python 3.11 has the most of them.
_IGNORED = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL"}

# super().forward and super(Class, self).forward. The class must be named: fastrnn subclasses users'
# classes, and in a class with a subclass super(type(self), self).forward calls itself.
_SUPER = re.compile(
    r"LOAD_GLOBAL:super "
    r"(LOAD_(GLOBAL|DEREF|CLASSDEREF):\S+ (LOAD_ATTR:\S+ )*LOAD_\w+:\S+ )?"
    r"(CALL(_FUNCTION)?:\d LOAD_(METHOD|ATTR)|LOAD_SUPER_\w+):forward "
)


def calls_super(forward: Any) -> bool:
    """Whether ``forward``, or what it wraps, or a function in it, uses super().forward."""
    return any(_SUPER.search(text) for text in _texts(forward))


def calls_by_name(forward: Any, name: str) -> bool:
    """Whether it uses the forward of a class by its ``name``, as in nn.LSTM.forward(self, x)."""
    by_name = re.compile(rf"LOAD_\w+:{name} LOAD_(METHOD|ATTR):forward ")
    return any(by_name.search(text) for text in _texts(forward))


def _texts(forward: Any) -> Iterator[str]:
    """The instructions of a function and of those in it, as "NAME:argument NAME:argument "."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    todo = [code] if isinstance(code, types.CodeType) else []
    while todo:
        code = todo.pop()
        steps = (step for step in dis.get_instructions(code) if step.opname not in _IGNORED)
        yield "".join(f"{step.opname}:{step.argval} " for step in steps)
        todo += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
