"""torch.onnx.export gives fastrnn's layers as ONNX's own LSTM, GRU and RNN nodes.

The exporter that goes by torch.export, which is the default, asks the registry of onnxscript for
the translation of an operator. This module adds that of `torch.ops.fastrnn.forward`; it is imported
when the registry is, which torch does at the first export, and needs onnxscript.

A node is one layer in both directions. Others before it bring its weights from torch's order of
gates into ONNX's: ONNX Runtime does that once, when it loads the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import onnxscript
from onnxscript import evaluator, ir
from onnxscript.function_libs.torch_lib.registration import torch_op

_Value = Any  # an ir.Value: onnxscript reads the annotations of `forward`, and has none for it
op: Any = onnxscript.opset18  # whose types leave out that a list of numbers is a constant


class _Node(NamedTuple):
    """ONNX's node of a cell."""

    name: str
    gates: tuple[int, ...]  # which of torch's is ONNX's first, second...


_NODES = {
    "lstm": _Node("LSTM", (0, 3, 1, 2)),  # i, f, g, o in torch; i, o, f, g in ONNX
    "gru": _Node("GRU", (1, 0, 2)),  # r, z, n; z, r, n
    "rnn_tanh": _Node("RNN", (0,)),
    "rnn_relu": _Node("RNN", (0,)),
}

_UNROLLED = (
    "a model that calls fastrnn.reference.run instead is exported step by step, for a fixed T"
)


@torch_op("fastrnn::forward", trace_only=True)
def forward(
    cell: str,
    input: _Value,
    h0: _Value,
    c0: _Value | None,
    weights: Sequence[_Value],
    batch_sizes: _Value | None,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    train: bool,
    keep: bool,
    recompute: bool = False,
) -> list[_Value]:
    """output, h_n and, of an LSTM, c_n: the operator's results but those for its backward.

    Raises NotImplementedError where ONNX's nodes have no such network.
    """
    if cell not in _NODES:
        raise NotImplementedError(
            f"fastrnn: ONNX has no node for the cell '{cell}', expected one of: "
            f"{', '.join(_NODES)}; {_UNROLLED}"
        )
    node = _NODES[cell]
    D = 2 if bidirectional else 1
    count = len(weights) // (num_layers * D)
    if count % 2:
        raise NotImplementedError(
            f"fastrnn: ONNX's LSTM has no projection, expected proj_size=0, got "
            f"{weights[1].shape[1]}; {_UNROLLED}"
        )
    if batch_sizes is not None:
        raise NotImplementedError(
            f"fastrnn: ONNX's {node.name} takes no PackedSequence, expected a padded tensor; else "
            "fastrnn.restore(model), which torch.onnx.export(dynamo=False) takes"
        )
    if train and dropout > 0 and num_layers > 1:
        raise NotImplementedError(
            f"fastrnn: ONNX's {node.name} has no dropout, got dropout={dropout} in training mode; "
            "call model.eval() before the export"
        )
    if input.dtype == ir.DataType.BFLOAT16:
        opset = evaluator.default().opset.version  # type: ignore[attr-defined]  # torch's evaluator
        if opset < 22:
            raise NotImplementedError(
                f"fastrnn: ONNX's {node.name} takes bfloat16 from opset 22 on, got opset {opset}; "
                "give torch.onnx.export opset_version=22"
            )
    states = [h0] if c0 is None else [h0, c0]
    H = weights[1].shape[1]
    attributes = {"hidden_size": H, "direction": "bidirectional" if bidirectional else "forward"}
    if cell == "gru":
        attributes["linear_before_reset"] = 1  # the reset gate after the product, as in torch
    if cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * D
    x = input
    last = []
    for first in range(0, num_layers * D, D):
        # W_ih and W_hh of both directions, then the biases if there are any
        given = weights[first * count : (first + D) * count]
        W, R, *biases = (_of_node(given[i::count], node.gates) for i in range(count))
        y, *of_layer = getattr(op, node.name)(
            x, W, R, op.Concat(*biases, axis=1) if biases else None,
            None,  # the lengths of sequences
            *(op.Slice(state, [first], [first + D], [0]) for state in states),
            **attributes,
        )  # fmt: skip
        last.append(of_layer)
        # [T, D, B, H] to [T, B, D*H]: a zero stands for the size that is there.
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, D * H])
    return [x, *(op.Concat(*of_state, axis=0) for of_state in zip(*last, strict=True))]


def _of_node(weights: Sequence[_Value], gates: tuple[int, ...]) -> _Value:
    """A weight [G*H, ...] or bias [G*H] of each direction as one [D, G*H, ...], in ONNX's order."""
    stacked = op.Concat(*(op.Unsqueeze(w, [0]) for w in weights), axis=0)
    if len(gates) == 1:
        return stacked
    parts = op.Split(stacked, num_outputs=len(gates), axis=1)
    return op.Concat(*(parts[gate] for gate in gates), axis=1)
