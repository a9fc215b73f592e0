"""fastrnn: LSTM, GRU and RNN layers that drop in for torch.nn's, computed by fused kernels.

    import fastrnn
    layer = fastrnn.LSTM(32, 64, num_layers=2)   # in the place of torch.nn.LSTM
    fastrnn.accelerate(model)                    # or: every recurrent layer of a model, in place

Importing it registers the operators `torch.ops.fastrnn.forward` and `.backward`, has torch.compile
take fastrnn's layers into its graphs (fastrnn/dynamo.py says how, and how not to), has torch.onnx
export them as ONNX's own (fastrnn/onnx.py), enters the operators in the registries of torch's tools
(fastrnn/registries.py) and in torch.ao's table of dynamic quantization (fastrnn/quantization.py),
learns of DTensor when that is imported (fastrnn/distributed.py), and calls
`torch.set_num_threads(1)` in each child that is forked from a process with threads. It changes
nothing else.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from importlib import metadata
from typing import Any

# Before torch: in a subinterpreter its own import hangs, or ends the process.
if (
    len(
        {
            ctypes.PYFUNCTYPE(ctypes.c_void_p)((f"PyInterpreterState_{which}", ctypes.pythonapi))()
            for which in ("Get", "Main")
        }
    )
    > 1
):
    raise ImportError(
        "fastrnn can't be imported in a subinterpreter, as torch can't: import it in the main one"
    )

import torch

from fastrnn import _C as _C
from fastrnn import distributed, dynamo, functional, quantization, reference, registries
from fastrnn.explain import explain
from fastrnn.functional import fallbacks
from fastrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastrnn.ops import CELLS
from fastrnn.replace import accelerate, patch, restore
from fastrnn.when_imported import when_imported

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "accelerate",
    "build_info",
    "dynamo",
    "explain",
    "fallbacks",
    "functional",
    "patch",
    "reference",
    "restore",
]

dynamo.install()
registries.install()
quantization.install()
distributed.install()
# Before anything is computed in a forked child, which has none of its parent's threads.
os.register_at_fork(after_in_child=_C.without_lost_threads)
# The registry that torch.onnx.export reads, of a package that need not be there.
when_imported(
    "onnxscript.function_libs.torch_lib.registration",
    lambda _: importlib.import_module("fastrnn.onnx"),
)

__version__ = metadata.version("fastrnn")


def build_info() -> dict[str, Any]:
    """What was built and what is in use.

    Returns:
        version; torch (built against) and torch_running; isa (in use), isa_compiled, isa_supported
        (of those, what this CPU has); openmp (its version as a date, or None); compiler;
        cuda_archs, and cuda: "built", or why there is none.
    """
    built = _C.build_info()
    built["cuda_archs"] = [arch for arch in built["cuda_archs"].split(";") if arch]
    return {"version": __version__, "torch_running": torch.__version__, **built}
