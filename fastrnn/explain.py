"""How a layer would be computed: the path, the partition of the work, and why."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import _C
from fastrnn.arguments import bind_layer, parse_cell, parse_layer
from fastrnn.define import why_no_kernels
from fastrnn.heads import first_head
from fastrnn.marked import is_ours
from fastrnn.modules import FAST, _rebind
from fastrnn.network import Network
from fastrnn.own_modules import Layer, Step, states_together
from fastrnn.registered import TORCH_CELLS


def explain(module: nn.Module, input: Any, hx: Any = None) -> None:
    """Print how a call of a layer or cell would be computed, layer by layer, forward and backward.

    Nothing is computed. On the CPU: the instruction set, the threads and how the work is
    partitioned among them, the register tile of a step's matrix product and the layout of its
    operands, and workspace memory. On CUDA: the path (stepwise or persistent) and why, blocks,
    threads, registers and shared memory.

    Args:
        module: a layer or cell of fastrnn or of a cell of one's own, or one of torch that
            ``keep_types=True`` made fast.
        input, hx: the arguments of the call.

    Raises:
        TypeError: if the module is not computed by fastrnn.
        ValueError, RuntimeError: as the call itself would.
    """
    if isinstance(module, (Layer, Step)):
        print(_text_of_own(module, input, hx))
        return
    if not is_ours(module):
        raise TypeError(
            f"expected a layer or cell of fastrnn, got {type(module).__name__}; "
            "fastrnn.accelerate makes torch's layers ours"
        )
    cls = next(cls for cls in FAST if isinstance(module, cls))
    forward = _rebind(inspect.unwrap(cls.forward), _VF=_RECORDER)
    try:
        with torch.no_grad():
            forward(module, input, hx)
    except _Found as found:
        print(found)


class _Found(Exception):  # noqa: N818  (no error: it leaves torch's forward)
    pass


def _text(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> str:
    facts = _C.explain(network, input, h0, c0, weights, batch_sizes)
    lines = []
    for number, passes in enumerate(facts):
        for name, found in zip(["forward", "backward"], passes, strict=True):
            lines.append(f"{network.cell}, layer {number}, {name}")
            lines += [f"  {fact}: {value}" for fact, value in found.items()]
    return "\n".join(lines)


def _text_of_own(module: Layer | Step, input: Any, hx: Any) -> str:
    """The text for a layer or step of a cell of one's own."""
    with torch.no_grad():
        if isinstance(module, Layer):
            x, batch_sizes, (h0, *c0) = module.arguments(input, hx)
            weights: Sequence[Any] = module._flat_weights
        else:
            x, (h0, *c0) = module.arguments(input, hx)
            batch_sizes, weights = None, module.weights
        network = module.network()
        missing = why_no_kernels(network.cell, x.dtype, x.device.type)
        if missing is not None:
            return f"{network.cell} {missing}: its definition runs step by step"
        title = ""
        if module.definition.recurrent == "heads":
            title = f"each of {module.heads} heads of the first layer:\n"
            network, x, (h0, *c0), weights = first_head(module, x, [h0, *c0])
        return title + _text(network, x, h0, states_together(c0), weights, batch_sizes)


def _layer(cell: str) -> Callable[..., None]:
    def record(*args: Any, **kwargs: Any) -> None:
        arguments = bind_layer(cell, args, kwargs)
        network, input, (h0, *c0) = parse_layer(cell, arguments)
        weights, batch_sizes = arguments["params"], arguments.get("batch_sizes")
        raise _Found(_text(network, input, h0, c0[0] if c0 else None, weights, batch_sizes))

    return record


def _cell(cell: str) -> Callable[..., None]:
    def record(input: Tensor, hx: Any, *weights: Any) -> None:
        network, params = parse_cell(cell, *weights)
        x, h0, *c0 = (
            s.unsqueeze(0) for s in ([input, hx] if isinstance(hx, Tensor) else [input, *hx])
        )
        raise _Found(_text(network, x, h0, c0[0] if c0 else None, params, None))

    return record


# The functions that torch's forward code calls, by name.
_RECORDER = types.SimpleNamespace(
    **{cell: _layer(cell) for cell in TORCH_CELLS},
    **{f"{cell}_cell": _cell(cell) for cell in TORCH_CELLS},
)
