"""The operators in torch's registry of FLOP formulas.

- torch.utils.flop_counter: the number of floating-point operations, for FlopCounterMode.

A registry is filled when some other code imports it: fastrnn imports none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastrnn import ops
from fastrnn.network import Network, bind
from fastrnn.registered import CELLS
from fastrnn.when_imported import when_imported

_Shape = Sequence[int]


def install() -> None:
    """Register the operators now, or when the registries are imported."""
    when_imported("torch.utils.flop_counter", _register_flops)


# ---- operations ----------------------------------------------------------------------------------


class _Direction(NamedTuple):
    """A direction of a layer: multiply-adds per row, and which gradients are wanted."""

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
        """The multiply-adds of the wanted gradients, and of the layer's input's if `below`.

        A product has two gradients: of its weights and of its other factor.
        """
        first = batch * (not self.h0)  # rows whose h_{t-1} is a constant
        products = rows * self.input * (self.weights[0] + below)
        products += (rows * self.weights[1] + rows - first) * self.state
        if self.projection:
            only_w_hr = not (below or any(self.weights[:-1]) or self.h0 or self.c0)
            products += (rows * self.weights[-1] + rows - only_w_hr * batch) * self.projection
        return products


def _layers(
    network: Network,
    h0: _Shape,
    c0: _Shape | None,
    weights: Sequence[_Shape],
    wanted: Sequence[bool],
) -> list[list[_Direction]]:
    """The directions of each layer, for the shapes of one model or of several."""
    L, D, cell = network.num_layers, network.directions, CELLS[network.cell]
    G, R = cell["gates"], h0[-1]
    H = R if c0 is None else c0[-1] // (cell["states"] - 1)
    count = len(weights) // (L * D)
    return [
        [
            _Direction(
                input=G * H * weights[k][-1],
                state=0 if cell["diagonal"] else G * H * R,
                projection=R * H if R != H else 0,
                weights=wanted[3 + k : 3 + k + count],
                h0=wanted[1],
                c0=wanted[2] and c0 is not None,
            )
            for k in range(layer * D * count, (layer + 1) * D * count, count)
        ]
        for layer in range(L)
    ]


def _rows(input: _Shape) -> int:
    """The rows of all steps, and of all models."""
    return math.prod(input[:-1])


# The formulas are called with shapes in the place of tensors.


def _forward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two for each multiply-add of a matrix product, as torch counts; the rest is left out."""
    network, shapes = bind(ops.forward, args, kwargs)
    h0, c0, weights = shapes["h0"], shapes["c0"], shapes["weights"]
    rows = _rows(shapes["input"])
    layers = _layers(network, h0, c0, weights, [False] * (3 + len(weights)))
    return 2 * sum(direction.forward(rows) for layer in layers for direction in layer)


def _backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """As for forward, of what the wanted gradients need, and of forward again to recompute."""
    network, shapes = bind(ops.backward, args, kwargs)
    h0, c0, weights, wanted = (shapes[name] for name in ("h0", "c0", "weights", "wanted"))
    rows, batch = _rows(shapes["input"]), _rows(h0) // (network.num_layers * network.directions)
    recompute = len(shapes["saved"]) == 1  # empty
    products = 0
    below = wanted[0]
    for layer in _layers(network, h0, c0, weights, wanted):
        for direction in layer:
            if below or direction.is_wanted():
                products += direction.backward(rows, batch, below)
                products += direction.forward(rows) if recompute else 0
        below = below or any(direction.is_wanted() for direction in layer)
    return 2 * products


def _register_flops(registry: ModuleType) -> None:
    registry.register_flop_formula(torch.ops.fastrnn.forward)(_forward_flops)
    registry.register_flop_formula(torch.ops.fastrnn.backward)(_backward_flops)
