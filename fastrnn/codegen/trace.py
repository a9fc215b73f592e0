"""The expressions of a step, from a call of its Python function with placeholders for tensors."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from .errors import CellError
from .expressions import Graph, Node, ordered
from .functions import FUNCTIONS, Refused
from .placeholders import TracedGates, Value, described

MOST_GATES, MOST_STATES, MOST_VECTORS = 4, 4, 8  # the kernels': csrc/cells/cell.h
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
    states: tuple[str, ...]  # the parameters' names: h, and up to three others, such as c
    vectors: tuple[str, ...]  # the keyword-only parameters' names
    diagonal: bool  # whether W_hh is a vector a gate
    graph: Graph
    results: tuple[Node, ...]  # the new states

    def input(self, name: str, index: int = 0) -> Node:
        """x or r of a gate, h_prev, c_prev of a state after h, w of a vector; dh, dc."""
        return self.graph.node(name, value=index)

    def of_states(self, h: str, c: str) -> tuple[Node, ...]:
        """The inputs of that name of each state."""
        return (self.input(h), *(self.input(c, i) for i in range(len(self.states) - 1)))

    @property
    def previous(self) -> tuple[Node, ...]:
        return self.of_states("h_prev", "c_prev")

    @property
    def gradients(self) -> tuple[Node, ...]:
        """Those of the new states."""
        return self.of_states("dh", "dc")

    @property
    def weights(self) -> tuple[Node, ...]:
        """The vectors' values."""
        return tuple(self.input("w", i) for i in range(len(self.vectors)))

    @property
    def takes_arrays(self) -> bool:
        """Whether the functions in C++ take arrays of states and vectors: csrc/cells/cell.h."""
        return len(self.states) > 2 or bool(self.vectors)


def trace(
    function: Callable[..., Any], gates: Sequence[str], name: str, diagonal: bool = False
) -> Step:
    """The expressions that `function` computes.

    Raises:
        CellError: if it does what a kernel can't.
    """
    tracer = Tracer(name, function)
    names, (states, vectors) = tracer.check_gates(gates), tracer.parameters()
    graph = tracer.graph
    step = Step(name, function, names, states, vectors, diagonal, graph, ())
    values = [
        TracedGates(names, [Value(tracer, graph.node(of, value=g)) for g in range(len(names))], of)
        for of in "xr"
    ]
    previous = [Value(tracer, node) for node in step.previous]
    weights = {
        vector: Value(tracer, node) for vector, node in zip(vectors, step.weights, strict=True)
    }
    try:
        returned = function(*values, *previous, **weights)
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
    for i, vector in enumerate(vectors):
        if ("w", i) not in used:
            tracer.fail(f"the vector {vector!r} is not used", "use it, or take it out")
    return replace(step, results=results)


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

    def parameters(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the states, the function's parameters from the third on; and of the vectors,
        its keyword-only ones."""
        parameters = list(inspect.signature(self.function).parameters.values())
        vectors = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        states = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ][2:]
        plain = len(states) + 2 + len(vectors) == len(parameters) and all(
            p.default is p.empty for p in parameters
        )
        if not plain or not 1 <= len(states) <= MOST_STATES or len(vectors) > MOST_VECTORS:
            self.fail(
                f"its parameters are {inspect.signature(self.function)}",
                f"define it as (x, r, h) or (x, r, h, c), with up to {MOST_STATES} states and, "
                f"after *, up to {MOST_VECTORS} vectors, without defaults",
            )
        for vector in vectors:
            if vector.startswith(("weight_", "bias_")):
                self.fail(f"the vector {vector!r} has a name of torch's parameters", "rename it")
        return tuple(states), tuple(vectors)

    def results(self, returned: Any, states: tuple[str, ...]) -> tuple[Node, ...]:
        listed = " and ".join([", ".join(states[:-1]), states[-1]] if states[1:] else states)
        expected = f"return the new {listed}"
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
