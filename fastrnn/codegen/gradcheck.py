"""A gradient check of generated formulas, with torch in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .backward import Backward
from .errors import CellError
from .expressions import Node, ordered
from .functions import PRIMITIVES
from .gates import Gates
from .trace import Step

_UNITS = 48
_TOLERANCE = 1e-7


@torch.inference_mode(False)
def check(step: Step, backward: Backward) -> None:
    """Compares a step's forward and backward, as the kernels call them, with its function.

    Raises:
        CellError: if any result differs.
    """
    inputs = _random_inputs(step)
    values = evaluate([*step.results, *backward.saved], inputs)
    expected = _by_autograd(step, inputs)
    results = dict(zip(step.states, (values[node] for node in step.results), strict=True))
    for name, found in results.items():
        _compare(step, f"the new {name}", found, expected[name])

    # Backward sees only what the kernels give it.
    given = inputs | values
    known = {node: given[node] for node in backward.known(step)}
    gates = len(step.gates)
    try:
        roots = [*backward.grads, *backward.d_states, *backward.d_vectors]
        gradients = evaluate(roots, known)
    except KeyError as error:
        raise _error(step, f"its backward reads {error.args[0]}, which is not saved") from None
    for g, gate in enumerate(step.gates):
        for of, index in (("x", backward.x_grad[g]), ("r", len(backward.grads) - gates + g)):
            name = f"{of}.{gate}"
            _compare(
                step, f"the gradient of {name}", gradients[backward.grads[index]], expected[name]
            )
    names = [*step.states, *step.vectors]
    for name, node in zip(names, [*backward.d_states, *backward.d_vectors], strict=True):
        _compare(step, f"the gradient of {name}", gradients[node], expected[f"d {name}"])


def evaluate(roots: Iterable[Node], known: dict[Node, Tensor]) -> dict[Node, Tensor]:
    """The values of nodes.

    Raises:
        KeyError: with its name, if an input is missing.
    """
    values = dict(known)
    for node in ordered(roots, known):
        if node in values:
            continue
        if node.is_number:
            values[node] = torch.tensor(node.value, dtype=torch.float64, device="cpu")
        elif node.args:
            values[node] = PRIMITIVES[node.op].evaluate(*(values[a] for a in node.args))
        else:
            raise KeyError(f"{node.op}[{int(node.value)}]" if node.op in ("x", "r") else node.op)
    return values


def _random_inputs(step: Step) -> dict[Node, Tensor]:
    """Random units; some have equal or opposite values, or zeros, where functions have kinks."""
    gates = range(len(step.gates))
    nodes = [step.input(of, g) for of in ("x", "r") for g in gates]
    nodes += [*step.previous, *step.weights, *step.gradients]
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for node in nodes:
        value = torch.randn(_UNITS, generator=generator, dtype=torch.float64, device="cpu")
        value[: _UNITS // 3] *= 3
        if node.op not in ("dh", "dc"):
            value[-1] = 0
            value[-2] = -1 if node.op == "r" else 1
            value[-6:-2] = torch.randint(-1, 2, [4], generator=generator, device="cpu").double()
        inputs[node] = value
    return inputs


def _by_autograd(step: Step, inputs: dict[Node, Tensor]) -> dict[str, Tensor]:
    """The results of the step's function and their gradients, by name."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, node: Node) -> Tensor:
        leaves[name] = inputs[node].clone().requires_grad_()
        return leaves[name]

    with torch.enable_grad():
        arguments = [
            Gates(
                step.gates,
                [leaf(f"{of}.{gate}", step.input(of, g)) for g, gate in enumerate(step.gates)],
            )
            for of in ("x", "r")
        ]
        previous = [
            leaf(f"d {name}", node) for name, node in zip(step.states, step.previous, strict=True)
        ]
        vectors = {
            name: leaf(f"d {name}", node)
            for name, node in zip(step.vectors, step.weights, strict=True)
        }
        returned = step.function(*arguments, *previous, **vectors)
        results = returned if isinstance(returned, tuple) else (returned,)
        sums = [
            (result * inputs[d]).sum() for result, d in zip(results, step.gradients, strict=True)
        ]
        # Some results may have no gradient, but autograd wants one that has.
        total = torch.stack([*sums, *(0 * leaf.sum() for leaf in leaves.values())]).sum()
        gradients = torch.autograd.grad(total, [*leaves.values()])
    expected = dict(zip(leaves, gradients, strict=True))
    for name, result in zip(step.states, results, strict=True):
        expected[name] = result.detach()
    return expected


def _compare(step: Step, name: str, found: Tensor, expected: Tensor) -> None:
    """Where the expected value is finite: elsewhere simplified formulas may rightly differ."""
    finite = expected.isfinite()
    difference = (found.expand_as(expected) - expected).abs()
    wrong = finite & ~(difference <= _TOLERANCE * (0.1 + expected.abs()))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise _error(
            step,
            f"{name} differs from autograd's: {found.expand_as(expected)[at]:.9g} instead of "
            f"{expected[at]:.9g}",
        )


def _error(step: Step, found: str) -> CellError:
    code = step.function.__code__
    return CellError(
        f"cell {step.name!r}, {code.co_filename}, line {code.co_firstlineno}: {found}; check that "
        "the function computes the same in each call, or report a bug of fastrnn"
    )
