"""The gradients of a step, and which of forward's values they are computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .expressions import Node, ordered
from .functions import PRIMITIVES
from .trace import Step

# What a value costs that backward reads: one that forward saves is also written. To compute one
# again costs Primitive.cost: most functions are a quarter of a saved value.
_SAVED, _OUTPUT, _FREE = 200, 100, 0


@dataclass(frozen=True)
class Backward:
    """The gradients of a step, and what it declares to the kernels (csrc/cells/cell.h)."""

    dx: tuple[Node, ...]  # by gate
    dr: tuple[Node, ...]
    d_states: tuple[Node, ...]  # of the previous states, not through W_hh
    d_vectors: tuple[Node, ...]
    saved: tuple[Node, ...]
    needs_h: bool
    needs_h_prev: bool
    passes_h: bool
    grads: tuple[Node, ...]
    x_grad: tuple[int, ...]

    def known(self, step: Step) -> dict[Node, str]:
        """What the function `backward` is given, by its name in C++."""
        known = dict(zip(step.gradients, names_of("dh", "dc", step), strict=True))
        known |= {node: f"w[{i}]" for i, node in enumerate(step.weights)}
        if self.needs_h_prev:
            known[step.input("h_prev")] = "h_prev"
        known |= {node: f"saved[{i}]" for i, node in enumerate(self.saved)}
        if self.needs_h:
            known[step.results[0]] = "h"
        _, *c_prev = names_of("h_prev", "c_prev", step)
        _, *c = names_of("h", "c", step)
        known |= dict(zip(step.previous[1:], c_prev, strict=True))
        return known | dict(zip(step.results[1:], c, strict=True))


def names_of(h: str, c: str, step: Step) -> list[str]:
    """What C++ calls these values of each state."""
    others = range(len(step.states) - 1)
    return [h, *(f"{c}[{i}]" if step.takes_arrays else c for i in others)]


def differentiate(step: Step) -> Backward:
    """The backward of a step."""
    gradient_of = _gradients(step)
    gates = range(len(step.gates))
    dx = tuple(gradient_of(step.input("x", gate)) for gate in gates)
    dr = tuple(gradient_of(step.input("r", gate)) for gate in gates)
    d_states = tuple(gradient_of(state) for state in step.previous)
    d_vectors = tuple(gradient_of(vector) for vector in step.weights)
    costs = _costs(step)
    kept = _kept([*dx, *dr, *d_states, *d_vectors], costs)
    saved = tuple(node for node in kept if node not in costs)
    h, h_prev = step.results[0], step.input("h_prev")
    needs_h_prev = h_prev in kept and costs[h_prev] == _OUTPUT
    needs_h = h in kept and costs[h] == _OUTPUT and h is not h_prev
    # A step may read h_prev without a gradient, in a condition.
    passes_h = not d_states[0].is_zero or h_prev in ordered(step.results)
    if len(step.results) > 1 and not (needs_h or needs_h_prev or passes_h):
        # A projection may follow, for which h is computed from what is saved. Where it can't be,
        # declaring that backward needs h rules projections out.
        needs_h = not _computable(h, {*saved, *step.weights, *step.results[1:]})
    grads, x_grad = _in_order(dx, dr)
    return Backward(
        dx, dr, d_states, d_vectors, saved, needs_h, needs_h_prev, passes_h, grads, x_grad
    )


def _gradients(step: Step) -> Callable[[Node], Node]:
    """The gradient of each node, by reverse differentiation."""
    found: dict[Node, Node] = {}

    def add(node: Node, gradient: Node | None) -> None:
        if gradient is not None:
            found[node] = found[node] + gradient if node in found else gradient

    for result, given in zip(step.results, step.gradients, strict=True):
        add(result, given)
    for node in reversed(ordered(step.results)):
        if node in found and node.args:
            of_arguments = PRIMITIVES[node.op].derivative(node, found[node])
            for argument, gradient in zip(node.args, of_arguments, strict=True):
                add(argument, gradient)
    return lambda node: found.get(node, step.graph.number(0))


def _costs(step: Step) -> dict[Node, int]:
    """What the values cost that are there without being saved."""
    costs = {step.results[0]: _OUTPUT, step.input("h_prev"): _OUTPUT}
    return costs | dict.fromkeys((*step.previous[1:], *step.results[1:], *step.weights), _FREE)


def _kept(gradients: Sequence[Node], costs: dict[Node, int]) -> list[Node]:
    """The values of forward that backward reads.

    A node of backward is computed with dh or dc, or from forward's values alone. Those of the
    latter that the former read are wanted. What is kept is a minimum cut between the inputs and
    them: the edge through a kept node is cut, and the edge from the inputs to one that is computed
    again.
    """
    import networkx  # takes a while, and only this needs it

    nodes = ordered(gradients)
    after: set[Node] = set()
    for node in nodes:
        if node.op in ("dh", "dc") or any(a in after for a in node.args):
            after.add(node)
    wanted = {a for node in after for a in node.args if a not in after and not a.is_number}
    if not wanted:
        return []
    network = networkx.DiGraph()
    network.add_nodes_from(["inputs", "wanted"])
    for node in ordered(wanted):
        if node.is_number:
            continue
        # A condition is a mask of lanes, which can't be saved. No capacity is an infinite one.
        capacity = {} if node.is_condition else {"capacity": costs.get(node, _SAVED)}
        network.add_edge((node, "in"), (node, "out"), **capacity)
        for argument in node.args:
            if not argument.is_number:
                network.add_edge((argument, "out"), (node, "in"))
        again = {"capacity": PRIMITIVES[node.op].cost} if node.args else {}
        network.add_edge("inputs", (node, "in"), **again)
        if node in wanted:
            network.add_edge((node, "out"), "wanted")
    _, (_, near) = networkx.minimum_cut(network, "inputs", "wanted")
    return [n for n in nodes if (n, "out") in near and (n, "in") not in near]


def _computable(node: Node, known: set[Node]) -> bool:
    return all(n in known or n.args or n.is_number for n in ordered([node], known))


def _in_order(
    dx: tuple[Node, ...], dr: tuple[Node, ...]
) -> tuple[tuple[Node, ...], tuple[int, ...]]:
    """The gradients in the kernels' order, and the index of each gate's of x.

    The last are r's, by gate, and the first x's. As many of r's first as are gradients of x too are
    in both.
    """
    shared: list[int] = []  # the gates of x
    for gate, gradient in enumerate(dr):
        same = [g for g, other in enumerate(dx) if other is gradient and g not in shared]
        if not same:
            break
        shared.append(gate if gate in same else same[0])
    alone = [g for g in range(len(dx)) if g not in shared]
    order = alone + shared
    return (*(dx[g] for g in alone), *dr), tuple(order.index(g) for g in range(len(dx)))
