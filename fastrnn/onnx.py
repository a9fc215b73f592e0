"""torch.onnx.export exports fastrnn's layers as ONNX's LSTM, GRU and RNN nodes.

torch's default exporter, based on torch.export, looks up the translation of an operator in the
registry of onnxscript. This module registers that of `torch.ops.fastrnn.forward`. It needs
onnxscript, and is imported when the registry is: torch imports that at the first export.

A node is one layer with all its directions. The nodes before it reorder its weights from torch's
order of gates into ONNX's: ONNX Runtime folds them once, when it loads the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxscript
import torch
from onnxscript import evaluator, ir
from onnxscript.function_libs.torch_lib.registration import torch_op

from fastrnn import ops
from fastrnn.network import Network, bind, signature
from fastrnn.registered import ONNX_GATES, TORCH_CELLS

_Value = Any  # an ir.Value
op: Any = onnxscript.opset18  # its annotations do not allow lists of numbers as constants


# The options that nodes have, and `recompute`, which does not change the results.
_OPTIONS = {"cell", "has_biases", "num_layers", "bidirectional", "dropout", "train", "recompute"}

_UNROLLED = (
    "a model that calls fastrnn.reference.run instead is exported step by step, for a fixed T"
)


def forward(*args: Any, **kwargs: Any) -> list[_Value]:
    """output, h_n and, of an LSTM, c_n: the operator's results except those for its backward.

    Raises:
        NotImplementedError: where ONNX's operators have no such network.
    """
    network, arguments = bind(ops.forward, args, kwargs)
    del arguments["keep"]
    return _layers(network, **arguments)


# onnxscript reads a function's signature and annotations. Parameters of type Any are values.
forward.__signature__ = signature(ops.forward)  # type: ignore[attr-defined]
forward.__annotations__ = {
    name: parameter.annotation for name, parameter in signature(ops.forward).parameters.items()
}
torch_op("fastrnn::forward", trace_only=True)(forward)


def segments(*args: Any, **kwargs: Any) -> list[_Value]:
    """Raises: resets= and lengths= are packed data on a CPU."""
    raise NotImplementedError(
        "fastrnn: ONNX's LSTM, GRU and RNN have no resets and lengths, expected a call without; "
        f"{_UNROLLED}"
    )


segments.__signature__ = signature(torch.ops.fastrnn.segments.default)  # type: ignore[attr-defined]
segments.__annotations__ = {
    name: parameter.annotation
    for name, parameter in signature(torch.ops.fastrnn.segments.default).parameters.items()
}
torch_op("fastrnn::segments", trace_only=True)(segments)


def _layers(
    network: Network,
    input: _Value,
    h0: _Value,
    c0: _Value | None,
    weights: Sequence[_Value],
    batch_sizes: _Value | None,
) -> list[_Value]:
    cell = network.cell
    if cell not in TORCH_CELLS:
        raise NotImplementedError(
            f"fastrnn: ONNX has no node for the cell '{cell}', expected one of: "
            f"{', '.join(TORCH_CELLS)}; {_UNROLLED}"
        )
    operator = TORCH_CELLS[cell]
    L, D = network.num_layers, network.directions
    count = len(weights) // (L * D)
    if count % 2:
        raise NotImplementedError(
            f"fastrnn: ONNX's LSTM has no projection, expected proj_size=0, got "
            f"{weights[1].shape[1]}; {_UNROLLED}"
        )
    if batch_sizes is not None and batch_sizes.shape is not None and len(batch_sizes.shape) > 1:
        raise NotImplementedError(
            f"fastrnn: ONNX's {operator} has no resets, expected resets=None; {_UNROLLED}"
        )
    if batch_sizes is not None:
        raise NotImplementedError(
            f"fastrnn: ONNX's {operator} takes no PackedSequence, expected a padded tensor; else "
            "fastrnn.restore(model), which torch.onnx.export(dynamo=False) takes"
        )
    if network.drops:
        raise NotImplementedError(
            f"fastrnn: ONNX's {operator} has no dropout, got dropout={network.dropout} in training "
            "mode; call model.eval() before the export"
        )
    for name, value in network._asdict().items():
        if name not in _OPTIONS and value != Network._field_defaults[name]:
            raise NotImplementedError(
                f"fastrnn: ONNX's {operator} has no option {name}, got {name}={value}; {_UNROLLED}"
            )
    if input.dtype == ir.DataType.BFLOAT16:
        opset = evaluator.default().opset.version  # type: ignore[attr-defined]  # torch's evaluator
        if opset < 22:
            raise NotImplementedError(
                f"fastrnn: ONNX's {operator} takes bfloat16 from opset 22 on, got opset {opset}; "
                "give torch.onnx.export opset_version=22"
            )
    states = [h0] if c0 is None else [h0, c0]
    H = weights[1].shape[1]
    attributes = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    if cell == "gru":
        attributes["linear_before_reset"] = 1  # the reset gate after the product, as in torch
    if cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * D
    x = input
    last = []
    for first in range(0, L * D, D):
        # W_ih and W_hh of both directions, then the biases if there are any
        of_layer = weights[first * count : (first + D) * count]
        W, R, *biases = (
            _in_onnx_order(of_layer[i::count], ONNX_GATES[operator]) for i in range(count)
        )
        y, *last_states = getattr(op, operator)(
            x, W, R, op.Concat(*biases, axis=1) if biases else None,
            None,  # the lengths of sequences
            *(op.Slice(state, [first], [first + D], [0]) for state in states),
            **attributes,
        )  # fmt: skip
        last.append(last_states)
        # [T, D, B, H] to [T, B, D*H]: a zero keeps the size of a dimension.
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, D * H])
    return [x, *(op.Concat(*layers, axis=0) for layers in zip(*last, strict=True))]


def _in_onnx_order(weights: Sequence[_Value], gates: tuple[int, ...]) -> _Value:
    """A weight [G*H, ...] or bias [G*H] of each direction as one [D, G*H, ...], by ONNX's gates."""
    stacked = op.Concat(*(op.Unsqueeze(w, [0]) for w in weights), axis=0)
    if len(gates) == 1:
        return stacked
    parts = op.Split(stacked, num_outputs=len(gates), axis=1)
    return op.Concat(*(parts[gate] for gate in gates), axis=1)
