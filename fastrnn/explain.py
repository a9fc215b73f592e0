"""How a layer would be computed: the path, how the work is cut, and why."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import _C, functional
from fastrnn.autograd import Network
from fastrnn.marked import is_ours
from fastrnn.modules import FAST, _on_fastrnn


def explain(module: nn.Module, input: Any, hx: Any = None) -> None:
    """Print how a call of a layer or cell would be computed, layer by layer, forward and backward.

    Nothing is computed. On the CPU: the instruction set, the threads and what each has a part of,
    the tile of a step's product, what it reads, and scratch memory. On CUDA: the path (stepwise or
    persistent) and why, blocks, threads, registers and shared memory.

    Args:
        module: a layer or cell of fastrnn's, or of torch's under ``keep_types=True``.
        input, hx: what it would be called with.

    Raises:
        TypeError: if the module is none of fastrnn's.
        ValueError, RuntimeError: as the call itself would.
    """
    if not is_ours(module):
        raise TypeError(
            f"expected a layer or cell of fastrnn, got {type(module).__name__}; "
            "fastrnn.accelerate makes torch's layers ours"
        )
    cls = next(cls for cls in FAST if isinstance(module, cls))
    forward = _on_fastrnn(inspect.unwrap(cls.forward), _VF=_RECORDER)
    try:
        with torch.no_grad():
            forward(module, input, hx)
    except _Found as found:
        print(found)


class _Found(Exception):  # noqa: N818  (no error: torch's forward is left by it)
    pass


def _text(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> str:
    n = network
    facts = _C.explain(
        n.cell,
        input,
        h0,
        c0,
        weights,
        batch_sizes,
        (n.has_biases, n.num_layers, n.bidirectional, n.dropout),
    )
    lines = []
    for number, passes in enumerate(facts):
        for name, found in zip(["forward", "backward"], passes, strict=True):
            lines.append(f"{network.cell}, layer {number}, {name}")
            lines += [f"  {fact}: {value}" for fact, value in found.items()]
    return "\n".join(lines)


def _of_layer(cell: str) -> Callable[..., None]:
    def record(*args: Any, **kwargs: Any) -> None:
        given = functional.named(cell, args, kwargs)
        network, input, (h0, *c0) = functional.network_of(cell, given)
        weights, batch_sizes = given["params"], given.get("batch_sizes")
        raise _Found(_text(network, input, h0, c0[0] if c0 else None, weights, batch_sizes))

    return record


def _of_cell(cell: str) -> Callable[..., None]:
    def record(input: Tensor, hx: Any, *weights: Any) -> None:
        network, params = functional.network_of_cell(cell, *weights)
        x, h0, *c0 = (
            s.unsqueeze(0) for s in ([input, hx] if isinstance(hx, Tensor) else [input, *hx])
        )
        raise _Found(_text(network, x, h0, c0[0] if c0 else None, params, None))

    return record


_NAMES = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
_RECORDER = types.SimpleNamespace(
    **{cell: _of_layer(cell) for cell in _NAMES},
    **{f"{cell}_cell": _of_cell(cell) for cell in _NAMES},
)
