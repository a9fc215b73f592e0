"""Expressions of one hidden unit: a graph in which equal expressions are one node."""

from __future__ import annotations

from collections.abc import Iterable

COMPARISONS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_COMMUTATIVE = {"+", "*"}


class Graph:
    """The nodes of one cell.

    Nodes are numbered as they are made, so that the numbers of a node's arguments are smaller than
    its own.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], Node] = {}

    def node(self, op: str, *args: Node, value: float = 0) -> Node:
        """The node of that operation. The arguments' order matters only where it can't be changed.

        Args:
            op: a name in `functions.PRIMITIVES`, "number", or that of an input.
            value: of a number; the gate of an input.
        """
        indices = [a.index for a in args]
        key = (op, value, *(sorted(indices) if op in _COMMUTATIVE else indices))
        if key not in self._nodes:
            self._nodes[key] = Node(self, op, args, value, len(self._nodes))
        return self._nodes[key]

    def number(self, value: float) -> Node:
        return self.node("number", value=float(value))

    def where(self, condition: Node, yes: Node | float, no: Node | float) -> Node:
        a, b = condition.args
        yes, no = condition.lift(yes), condition.lift(no)
        if yes is no:
            return yes
        if a.is_number and b.is_number:
            return yes if COMPARISONS[condition.op](a.value, b.value) else no
        return self.node("where", condition, yes, no)


class Node:
    """An input, a number, or an operation on other nodes. Operators simplify what they make."""

    __slots__ = ("args", "graph", "index", "op", "value")

    def __init__(
        self, graph: Graph, op: str, args: tuple[Node, ...], value: float, index: int
    ) -> None:
        self.graph, self.op, self.args, self.value, self.index = graph, op, args, value, index

    @property
    def is_number(self) -> bool:
        return self.op == "number"

    @property
    def is_zero(self) -> bool:
        return self.is_number and self.value == 0

    @property
    def is_condition(self) -> bool:
        return self.op in COMPARISONS

    def lift(self, value: Node | float) -> Node:
        """A number as a node."""
        return value if isinstance(value, Node) else self.graph.number(value)

    def call(self, op: str) -> Node:
        """A function of this node alone, such as "tanh"."""
        return self.graph.node(op, self)

    def compare(self, op: str, other: Node | float) -> Node:
        return self.graph.node(op, self, self.lift(other))

    def __add__(self, other: Node | float) -> Node:
        b = self.lift(other)
        if self.is_number and b.is_number:
            return self.graph.number(self.value + b.value)
        if self.is_zero or b.is_zero:
            return b if self.is_zero else self
        if b.op == "neg":
            return self - b.args[0]
        if b.is_number and b.value < 0:
            return self - -b.value
        if self.op == "neg":
            return b - self.args[0]
        return self.graph.node("+", self, b)

    def __radd__(self, other: float) -> Node:
        return self.lift(other) + self

    def __sub__(self, other: Node | float) -> Node:
        b = self.lift(other)
        if self.is_number and b.is_number:
            return self.graph.number(self.value - b.value)
        if b.is_zero:
            return self
        if self.is_zero:
            return -b
        if b.op == "neg":
            return self + b.args[0]
        if b.is_number and b.value < 0:
            return self + -b.value
        return self.graph.node("-", self, b)

    def __rsub__(self, other: float) -> Node:
        return self.lift(other) - self

    def __mul__(self, other: Node | float) -> Node:
        b = self.lift(other)
        if self.is_number and b.is_number:
            return self.graph.number(self.value * b.value)
        for a, other_one in ((self, b), (b, self)):
            if a.is_zero:
                return a
            if a.is_number and abs(a.value) == 1:
                return other_one if a.value == 1 else -other_one
        if self.op == "neg":
            return -(self.args[0] * b)
        if b.op == "neg":
            return -(self * b.args[0])
        return self.graph.node("*", self, b)

    def __rmul__(self, other: float) -> Node:
        return self.lift(other) * self

    def __truediv__(self, other: Node | float) -> Node:
        b = self.lift(other)
        if self.is_number and b.is_number and b.value != 0:
            return self.graph.number(self.value / b.value)
        if self.is_zero or (b.is_number and b.value == 1):
            return self
        if self.op == "neg":
            return -(self.args[0] / b)
        return self.graph.node("/", self, b)

    def __rtruediv__(self, other: float) -> Node:
        return self.lift(other) / self

    def __neg__(self) -> Node:
        if self.is_number:
            return self.graph.number(-self.value)
        if self.op == "neg":
            return self.args[0]
        if self.op == "-":
            return self.args[1] - self.args[0]
        return self.graph.node("neg", self)


def ordered(roots: Iterable[Node], known: Iterable[Node] = ()) -> list[Node]:
    """The nodes that roots are computed from, and they themselves, arguments first.

    The arguments of `known` ones are left out.
    """
    known = set(known)
    found: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in known:
                waiting += node.args
    return sorted(found, key=lambda node: node.index)
