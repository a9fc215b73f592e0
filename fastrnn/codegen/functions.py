"""What a step may compute with: each operation's derivative, C++ text and torch function.

`PRIMITIVES` are the operations of the graph. `FUNCTIONS` are the names by which a step calls them,
as torch.name(...), torch.nn.functional.name(...) or a tensor's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .expressions import COMPARISONS, Node


class Refused(Exception):  # noqa: N818
    """A call that can't be compiled: what was found, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found, self.remedy = found, remedy


# The gradients of an operation's arguments, from the operation and the gradient of its value. None
# is no gradient.
Derivative = Callable[[Node, Node], tuple["Node | None", ...]]


@dataclass(frozen=True)
class Primitive:
    """An operation of the graph."""

    derivative: Derivative
    text: str  # in C++, with F for Math<V>
    evaluate: Callable[..., Any]  # with tensors
    level: int = 3  # how strongly the text binds: a comparison 0, a sum 1, a product 2
    cost: int = 1  # to compute it again in backward; backward.py has those of saved values


@dataclass(frozen=True)
class Function:
    """A function that a step calls, with torch's names of its parameters."""

    make: Callable[..., Node]
    values: int = 1  # so many of its first arguments are values; the others may be numbers


PRIMITIVES: dict[str, Primitive] = {
    "+": Primitive(lambda n, g: (g, g), "{0} + {1}", lambda a, b: a + b, 1),
    "-": Primitive(lambda n, g: (g, -g), "{0} - {1}", lambda a, b: a - b, 1),
    "*": Primitive(lambda n, g: (g * n.args[1], g * n.args[0]), "{0} * {1}", lambda a, b: a * b, 2),
    "/": Primitive(lambda n, g: _quotient(n, g), "{0} / {1}", lambda a, b: a / b, 2),
    "neg": Primitive(lambda n, g: (-g,), "-{0}", lambda a: -a, 2),
    "where": Primitive(
        lambda n, g: (None, n.graph.where(n.args[0], g, 0), n.graph.where(n.args[0], 0, g)),
        "F::choose({0}, {1}, {2})",
        torch.where,
    ),
}
for _name, _compare in COMPARISONS.items():
    PRIMITIVES[_name] = Primitive(lambda n, g: (None, None), f"{{0}} {_name} {{1}}", _compare, 0)

PRIMITIVES["softplus"] = Primitive(
    lambda n, g: (g * n.args[0].call("sigmoid"),),
    "::fastrnn::softplus({0})",
    torch.nn.functional.softplus,
    cost=100,
)

FUNCTIONS: dict[str, Function] = {}


def _quotient(n: Node, g: Node) -> tuple[Node, Node]:
    by_a = g / n.args[1]
    return by_a, -(by_a * n)


def _unary(
    name: str,
    derivative: Callable[[Node, Node], Node],
    text: str | None = None,
    cost: int = 50,
) -> None:
    """A primitive with one argument, of the same name in torch."""
    PRIMITIVES[name] = Primitive(
        lambda n, g: (derivative(n, g),),
        text or f"F::{name}({{0}})",
        getattr(torch, name),
        cost=cost,
    )
    FUNCTIONS[name] = Function(lambda input: input.call(name))


# The derivatives are by the function's own value where that is possible: it need not be computed
# again, and a cell that returns it saves nothing.
_unary("sigmoid", lambda n, g: g * n * (1 - n))
_unary("tanh", lambda n, g: g * (1 - n * n))
_unary("exp", lambda n, g: g * n)
_unary("log", lambda n, g: g / n.args[0])
_unary("log1p", lambda n, g: g / (1 + n.args[0]))
_unary("sqrt", lambda n, g: g / (2 * n))
_unary(
    "erf",
    lambda n, g: g * (2 / math.sqrt(math.pi)) * (-(n.args[0] * n.args[0])).call("exp"),
    cost=300,  # a call of the C library for each unit: it is better saved
)
_unary("abs", lambda n, g: _times_sign(n.args[0], g), cost=1)
# In this order NaN passes through.
_unary(
    "relu",
    lambda n, g: n.graph.where(n.compare("<=", 0), 0, g),
    "F::choose({0} <= 0, V{{}}, {0})",
    cost=1,
)


def _times_sign(a: Node, g: Node) -> Node:
    where = a.graph.where
    return where(a.compare(">", 0), g, where(a.compare("<", 0), -g, 0))


def _function(values: int = 1) -> Callable[[Callable[..., Node]], Callable[..., Node]]:
    def add_to_table(make: Callable[..., Node]) -> Callable[..., Node]:
        FUNCTIONS[make.__name__] = Function(make, values)
        return make

    return add_to_table


# The functions below are expressions of others, and so are their derivatives.


@_function()
def add(input: Node, other: Node | float) -> Node:
    return input + other


@_function()
def sub(input: Node, other: Node | float) -> Node:
    return input - other


@_function()
def mul(input: Node, other: Node | float) -> Node:
    return input * other


@_function()
def div(input: Node, other: Node | float) -> Node:
    return input / other


@_function()
def neg(input: Node) -> Node:
    return -input


@_function()
def square(input: Node) -> Node:
    return input * input


@_function()
def pow(input: Node, exponent: Node | float) -> Node:
    if isinstance(exponent, Node) or exponent != 2:
        raise Refused("a power other than ** 2", "write it as a product, such as h * h * h")
    return input * input


@_function()
def rsqrt(input: Node) -> Node:
    return 1 / input.call("sqrt")


@_function(values=0)
def where(condition: Node, input: Node | float, other: Node | float) -> Node:
    return condition.graph.where(condition, input, other)


@_function(values=2)
def maximum(input: Node, other: Node) -> Node:
    return _larger(input, other, "<", ">")


@_function(values=2)
def minimum(input: Node, other: Node) -> Node:
    return _larger(input, other, ">", "<")


def _larger(a: Node, b: Node, smaller: str, larger: str) -> Node:
    # The mean of equal values is the value, passes NaN on, and gives each half of the gradient.
    where = a.graph.where
    mean = 0.5 * a + 0.5 * b
    return where(a.compare(smaller, b), b, where(a.compare(larger, b), a, mean))


@_function()
def clamp(input: Node, min: Node | float | None = None, max: Node | float | None = None) -> Node:
    if isinstance(min, Node) or isinstance(max, Node) or (min is None and max is None):
        raise Refused(
            "clamp without numbers as min or max", "for values use torch.maximum and torch.minimum"
        )
    if min is not None and max is not None and min > max:
        raise Refused(f"clamp with min {min} > max {max}", "exchange them")
    below, above = ("<", ">") if _clamp_has_gradient_at_limits() else ("<=", ">=")
    result = input
    if max is not None:
        result = input.graph.where(input.compare(above, max), max, result)
    if min is not None:
        result = input.graph.where(input.compare(below, min), min, result)
    return result


@cache
def _clamp_has_gradient_at_limits() -> bool:
    """Of this torch: 2.13 has, 2.14 has not."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        (gradient,) = torch.autograd.grad(x.clamp(min=0).sum(), x)
    return bool(gradient)


@_function()
def softplus(input: Node, beta: Node | float = 1, threshold: float = 20) -> Node:
    if isinstance(beta, Node) or beta <= 0 or threshold != 20:
        raise Refused("softplus with another threshold or beta", "use beta > 0 and threshold=20")
    return (beta * input).call("softplus") / beta


@_function()
def logsigmoid(input: Node) -> Node:
    return -softplus(-input)


@_function()
def silu(input: Node) -> Node:
    return input * input.call("sigmoid")


@_function()
def gelu(input: Node, approximate: str = "none") -> Node:
    if approximate == "none":
        return 0.5 * input * (1 + (math.sqrt(0.5) * input).call("erf"))
    if approximate == "tanh":
        cubic = input + 0.044715 * (input * input * input)
        return 0.5 * input * (1 + (math.sqrt(2 / math.pi) * cubic).call("tanh"))
    raise Refused(f"gelu with approximate={approximate!r}", "use 'none' or 'tanh'")
