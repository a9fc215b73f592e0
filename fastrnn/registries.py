"""The operators in torch's registries: what tools know of torch's own operators they know of ours.

- torch.utils.flop_counter: how many operations the products of a call are, for FlopCounterMode.

Each registry is told when it is imported, by whoever needs it; fastrnn imports none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastrnn.ops import CELLS
from fastrnn.when_imported import when_imported

_Shape = Sequence[int]


def install() -> None:
    """Register the operators, now or when the registries are imported."""
    when_imported("torch.utils.flop_counter", _register_flops)


# ---- operations ----------------------------------------------------------------------------------


class _Direction(NamedTuple):
    """A direction of a layer: multiply-adds for each row, and whose gradients are wanted."""

    input: int  # of W_ih x
    state: int  # of W_hh h
    projection: int  # of W_hr (o * tanh(c)), or 0
    weights: Sequence[bool]  # W_ih, W_hh, the biases, W_hr
    h0: bool
    c0: bool

    def is_wanted(self) -> bool:
        return any(self.weights) or self.h0 or self.c0

    def forward(self, rows: int) -> int:
        return rows * (self.input + self.state + self.projection)

    def backward(self, rows: int, batch: int, below: bool) -> int:
        """Of the gradients of what is wanted, and of the layer's input if `below` is true.

        Each product has two, of its weights and of its other factor.
        """
        first = batch * (not self.h0)  # rows where h is a constant
        products = rows * self.input * (self.weights[0] + below)
        products += (rows * self.weights[1] + rows - first) * self.state
        if self.projection:
            only = not (below or any(self.weights[:-1]) or self.h0 or self.c0)  # W_hr
            products += (rows * self.weights[-1] + rows - only * batch) * self.projection
        return products


def _directions(
    cell: str,
    h0: _Shape,
    c0: _Shape | None,
    weights: Sequence[_Shape],
    num_layers: int,
    bidirectional: bool,
    wanted: Sequence[bool],
) -> list[list[_Direction]]:
    """Of each layer, for the shapes of one model or of several."""
    D, G, R = 2 if bidirectional else 1, CELLS[cell]["gates"], h0[-1]
    H = R if c0 is None else c0[-1]
    count = len(weights) // (num_layers * D)
    return [
        [
            _Direction(
                input=G * H * weights[k][-1],
                state=G * H * R,
                projection=R * H if R != H else 0,
                weights=wanted[3 + k : 3 + k + count],
                h0=wanted[1],
                c0=wanted[2] and c0 is not None,
            )
            for k in range(layer * D * count, (layer + 1) * D * count, count)
        ]
        for layer in range(num_layers)
    ]


def _rows(input: _Shape) -> int:
    """Of all models together."""
    return math.prod(input[:-1])


def _forward_flops(
    cell: str,
    input: _Shape,
    h0: _Shape,
    c0: _Shape | None,
    weights: Sequence[_Shape],
    batch_sizes: _Shape | None,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Two for each multiply-add of a product of matrices, as torch counts; others are left out."""
    none = [False] * (3 + len(weights))
    layers = _directions(cell, h0, c0, weights, num_layers, bidirectional, none)
    return 2 * sum(d.forward(_rows(input)) for layer in layers for d in layer)


def _backward_flops(
    cell: str,
    grad_output: _Shape | None,
    grad_h_n: _Shape | None,
    grad_c_n: _Shape | None,
    input: _Shape,
    h0: _Shape,
    c0: _Shape | None,
    weights: Sequence[_Shape],
    batch_sizes: _Shape | None,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    hidden: _Shape,
    saved: _Shape,
    c: _Shape,
    dropout_mask: _Shape,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """The same, of what the wanted gradients need; with nothing saved the forward counts again."""
    rows, batch = _rows(input), _rows(h0) // (num_layers * (2 if bidirectional else 1))
    products = 0
    below = wanted[0]
    for layer in _directions(cell, h0, c0, weights, num_layers, bidirectional, wanted):
        for d in layer:
            if below or d.is_wanted():
                products += d.backward(rows, batch, below)
                products += d.forward(rows) if len(saved) == 1 else 0
        below = below or any(d.is_wanted() for d in layer)
    return 2 * products


def _register_flops(registry: ModuleType) -> None:
    registry.register_flop_formula(torch.ops.fastrnn.forward)(_forward_flops)
    registry.register_flop_formula(torch.ops.fastrnn.backward)(_backward_flops)
