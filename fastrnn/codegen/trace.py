"""The expressions of a step, from a call of its Python function with placeholders for tensors."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from .errors import CellError
from .expressions import Graph, Node, ordered
from .functions import FUNCTIONS, Refused
from .placeholders import TracedGates, Value, described

MOST_GATES = 4  # the kernels': csrc/cells/cell.h
_SHOWN = [name for name in FUNCTIONS if name not in ("add", "sub", "mul", "div", "neg", "pow")]
ALLOWED = (
    f"allowed are + - * / and ** 2, numbers, comparisons (< <= > >=) as conditions of torch.where, "
    f"and {', '.join(_SHOWN)}, each as torch's function or a tensor's method"
)
_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


@dataclass(frozen=True)
class Step:
    """One step of a cell, as expressions of one hidden unit."""

    name: str
    function: Callable[..., Any]
    gates: tuple[str, ...]
    states: tuple[str, ...]  # the parameters' names: h, or h and c
    graph: Graph
    results: tuple[Node, ...]  # the new states

    def input(self, name: str, gate: int = 0) -> Node:
        """x or r of a gate, or h_prev or c_prev."""
        return self.graph.node(name, value=gate)

    @property
    def previous(self) -> tuple[Node, ...]:
        return tuple(self.input(name) for name in ("h_prev", "c_prev")[: len(self.states)])


def trace(function: Callable[..., Any], gates: Sequence[str], name: str) -> Step:
    """The expressions that `function` computes.

    Raises:
        CellError: if it does what a kernel can't.
    """
    tracer = Tracer(name, function)
    names, states = tracer.check_gates(gates), tracer.states()
    graph = tracer.graph
    values = [
        TracedGates(names, [Value(tracer, graph.node(of, value=g)) for g in range(len(names))], of)
        for of in "xr"
    ]
    previous = [Value(tracer, graph.node(of)) for of in ("h_prev", "c_prev")[: len(states)]]
    try:
        returned = function(*values, *previous)
    except CellError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if tracer.is_users(f)]
        raise tracer.error(
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            ALLOWED,
            line=lines[-1] if lines else None,
        ) from error
    results = tracer.results(returned, states)
    used = {(node.op, node.value) for node in ordered(results)}
    for gate, gate_name in enumerate(names):
        if not {("x", gate), ("r", gate)} & used:
            tracer.fail(
                f"the gate {gate_name!r} is not used",
                f"use x.{gate_name} or r.{gate_name}, or take it out of gates",
            )
    return Step(name, function, names, states, graph, results)


class Tracer:
    """Makes the nodes of one function, and its errors."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function, self.graph = name, function, Graph()
        self.file = function.__code__.co_filename

    def is_users(self, frame: traceback.FrameSummary) -> bool:
        return frame.filename == self.file

    def error(self, found: str, remedy: str, line: int | None = None) -> CellError:
        """What was found, on the user's line that now runs or that of the function."""
        file, first = self.file, self.function.__code__.co_firstlineno
        frame: FrameType | None = sys._getframe()
        while frame and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            frame = frame.f_back
        running = frame
        while running and running.f_code is not self.function.__code__:
            running = running.f_back
        if line is None and frame and running:
            file, line = frame.f_code.co_filename, frame.f_lineno
        return CellError(f"cell {self.name!r}, {file}, line {line or first}: {found}; {remedy}")

    def fail(self, found: str, remedy: str = ALLOWED) -> NoReturn:
        raise self.error(found, remedy)

    def check_gates(self, gates: Sequence[str]) -> tuple[str, ...]:
        remedy = f'pass 1 to {MOST_GATES} different names, such as gates=("f", "g", "o")'
        if isinstance(gates, str) or not all(isinstance(gate, str) for gate in gates):
            self.fail(f"gates is {gates!r}", remedy)
        names = tuple(gates)
        if not 1 <= len(names) <= MOST_GATES or len(set(names)) < len(names):
            self.fail(f"gates is {names!r}", remedy)
        for gate in names:
            if not gate.isidentifier() or gate.startswith("_"):
                self.fail(f"the gate {gate!r} can't be an attribute of x and r", remedy)
        return names

    def states(self) -> tuple[str, ...]:
        """The names of the function's third and fourth parameters."""
        parameters = list(inspect.signature(self.function).parameters.values())
        plain = all(
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            for p in parameters
        )
        if not plain or len(parameters) not in (3, 4):
            self.fail(
                f"its parameters are {inspect.signature(self.function)}",
                "define it as (x, r, h) or (x, r, h, c), without defaults",
            )
        return tuple(p.name for p in parameters[2:])

    def results(self, returned: Any, states: tuple[str, ...]) -> tuple[Node, ...]:
        expected = f"return the new {' and '.join(states)}"
        values = returned if isinstance(returned, tuple) and len(states) > 1 else (returned,)
        if len(values) != len(states):
            self.fail(f"it returns {described(returned)}, expected {len(states)}", expected)
        for value in values:
            if not isinstance(value, Value):
                self.fail(f"it returns {described(value)}", expected)
        return tuple(self.operand(value) for value in values)

    def operand(self, value: Any) -> Node:
        """A value or number as a node that isn't a condition."""
        if isinstance(value, Value):
            if value.node.is_condition:
                self.fail(
                    "a comparison is used as a value", "use it as the condition of torch.where"
                )
            return value.node
        return self.graph.number(self.number(value))

    def number(self, value: Any) -> float:
        if not isinstance(value, Real):
            self.fail(
                f"{described(value)} in an expression",
                f"write it with x, r, the states and Python's numbers: {ALLOWED}",
            )
        if not abs(float(value)) <= torch.finfo(torch.float32).max:
            self.fail(f"the number {value}", "numbers must be finite in float32")
        return float(value)

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Value:
        """torch's function of that name."""
        function = FUNCTIONS[name]
        kwargs = {key: value for key, value in kwargs.items() if (key, value) != ("inplace", False)}
        try:
            bound = inspect.signature(function.make).bind(*args, **kwargs)
        except TypeError as error:
            self.fail(f"{name}: {error}", f"{name} takes {inspect.signature(function.make)}")
        for i, (key, value) in enumerate(bound.arguments.items()):
            if name == "where" and i == 0:
                if not (isinstance(value, Value) and value.node.is_condition):
                    self.fail(
                        "the condition of torch.where is no comparison",
                        "compare two values: torch.where(x.f > 0, ..., ...)",
                    )
                bound.arguments[key] = value.node
            elif isinstance(value, Value):
                bound.arguments[key] = self.operand(value)
            elif i < function.values:
                self.fail(f"{name} of {described(value)}", f"{name} takes values, as in torch")
            elif isinstance(value, torch.Tensor):
                self.number(value)
            elif isinstance(value, Real):
                bound.arguments[key] = self.number(value)
        try:
            return Value(self, function.make(*bound.args, **bound.kwargs))
        except Refused as error:
            self.fail(error.found, error.remedy)
