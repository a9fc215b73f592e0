"""The cells of this process, and those that torch.nn and ONNX have."""

from __future__ import annotations

from fastrnn import _C

CELLS: dict[str, dict[str, int]] = _C.cells()
"""The cells that there are kernels for, by name.

For each: gates, states (2 for a cell with c), saved, allows_projection.
"""

TORCH_CELLS: dict[str, str] = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
"""torch's cells: the name of the function in torch -> that of the class in torch.nn.

ONNX's operators have the names of the classes.
"""

ONNX_GATES: dict[str, tuple[int, ...]] = {
    "LSTM": (0, 3, 1, 2),  # torch: i, f, g, o; ONNX: i, o, f, g
    "GRU": (1, 0, 2),  # torch: r, z, n; ONNX: z, r, n
    "RNN": (0,),
}
"""ONNX's operators -> the order of their gates, as indices into torch's order."""
