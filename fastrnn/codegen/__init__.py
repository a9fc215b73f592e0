"""C++ cells from Python functions of one step.

A step is a function of x = W_ih x_t + b_ih and r = W_hh h_{t-1} + b_hh, which have a value for each
gate, and of one to four states. It returns the new states::

    def coupled_lstm(x, r, h, c):
        f, o = torch.sigmoid(x.f + r.f), torch.sigmoid(x.o + r.o)
        c = f * c + (1 - f) * torch.tanh(x.g + r.g)
        return o * torch.tanh(c), c

    generated = generate(coupled_lstm, gates=("f", "g", "o"))

`Generated.header` is what csrc/cells has of the cells written by hand: the step, its derivative,
and what forward saves for it. The function runs with tensors too, where x and r are `Gates`.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .backward import Backward, differentiate
from .errors import CellError
from .gates import Gates
from .gradcheck import check
from .header import NAMESPACE, allows_projection, struct_name, write
from .trace import Step, trace

__all__ = ["CellError", "Gates", "Generated", "generate"]


@dataclass(frozen=True)
class Generated:
    """A cell's C++ header, and what it declares."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]  # the parameters' names: h, and up to three others, such as c
    vectors: tuple[str, ...]  # the keyword-only parameters' names
    struct: str  # the C++ type, with its namespace
    header: str
    saved: int
    grads: int
    has_c: bool
    allows_projection: bool
    step: Step = field(repr=False, compare=False)
    backward: Backward = field(repr=False, compare=False)

    def check(self) -> None:
        """Compares the formulas with autograd's results of the Python function, in milliseconds.

        Raises:
            CellError: if they differ; it names the result.
        """
        check(self.step, self.backward)


def generate(
    function: Callable[..., Any],
    *,
    gates: Sequence[str],
    name: str | None = None,
    diagonal: bool = False,
) -> Generated:
    """The cell that a Python function defines.

    Args:
        function: one step, as ``(x, r, h) -> h`` or ``(x, r, h, c) -> (h, c)``, with up to four
            states, and keyword-only parameters for vectors of one value a unit.
        gates: the gates' names, in the order of their rows in weight_ih and weight_hh.
        name: the cell's; by default that of the function.
        diagonal: whether W_hh is a vector a gate, so that r = w h_{t-1} + b_hh unit by unit.

    Raises:
        CellError: if the function does what a kernel can't.
    """
    if not inspect.isfunction(function):
        raise CellError(f"cell {name!r}: {function!r} is no function; define the step with def")
    name = function.__name__ if name is None else name
    # Underscores at its ends, or only there, would not be in the struct's name.
    if not name.isidentifier() or not name.isascii() or not name[0].isalpha():
        raise CellError(
            f"cell {name!r}: the name must start with a letter and have only letters, digits and "
            "underscores; pass name="
        )
    if keyword.iskeyword(name):
        raise CellError(f"cell {name!r}: the name is a keyword; pass another as name=")
    step = trace(function, gates, name, diagonal)
    backward = differentiate(step)
    return Generated(
        name=name,
        gates=step.gates,
        states=step.states,
        vectors=step.vectors,
        struct=f"{NAMESPACE}::{struct_name(name)}",
        header=write(step, backward),
        saved=len(backward.saved),
        grads=len(backward.grads),
        has_c=len(step.results) > 1,
        allows_projection=allows_projection(step, backward),
        step=step,
        backward=backward,
    )
