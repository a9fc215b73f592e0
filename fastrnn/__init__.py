"""fastrnn: LSTM, GRU and RNN layers that drop in for torch.nn's, computed by fused kernels.

    import fastrnn
    layer = fastrnn.LSTM(32, 64, num_layers=2)   # instead of torch.nn.LSTM
    fastrnn.accelerate(model)                    # or every recurrent layer of a model, in place

Importing fastrnn has these effects on the process, and no others:

- It registers the operators `torch.ops.fastrnn.forward` and `.backward`.
- torch.compile takes fastrnn's layers into its graphs (fastrnn/dynamo.py).
- torch.onnx exports them as ONNX's own operators (fastrnn/onnx.py).
- torch's FlopCounterMode counts them (fastrnn/flop_counter.py).
- torch.ao's dynamic quantization quantizes them (fastrnn/quantization.py).
- They take DTensors, once torch.distributed.tensor is imported (fastrnn/distributed.py).
- A child that is forked from a process with threads calls `torch.set_num_threads(1)`.
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

try:
    from fastrnn import _C as _C
except ImportError as error:
    from fastrnn.__main__ import without_extension

    without_extension(str(error))
    raise

from fastrnn import (
    all_states,
    distributed,
    dynamo,
    fake,
    flop_counter,
    functional,
    quantization,
    reference,
    segments,
)
from fastrnn.define import cell
from fastrnn.explain import explain
from fastrnn.fallback import fallbacks
from fastrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastrnn.registered import CELLS
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
    "all_states",
    "build_info",
    "cell",
    "cells",
    "dynamo",
    "explain",
    "fallbacks",
    "functional",
    "patch",
    "reference",
    "restore",
    "segments",
]

fake.install()
dynamo.install()
flop_counter.install()
quantization.install()
distributed.install()
# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_C.without_lost_threads)
# The registry that torch.onnx.export reads, of an optional package.
when_imported(
    "onnxscript.function_libs.torch_lib.registration",
    lambda _: importlib.import_module("fastrnn.onnx"),
)

__version__ = metadata.version("fastrnn")


def __getattr__(name: str) -> Any:
    """`fastrnn.cells`, whose functions are traced when it is first used."""
    if name == "cells":
        return importlib.import_module("fastrnn.cells")
    raise AttributeError(f"module 'fastrnn' has no attribute {name!r}")


def build_info() -> dict[str, Any]:
    """What was built and what is in use.

    Returns:
        A dict of version; torch (built against) and torch_running; isa (in use), isa_compiled,
        isa_supported (compiled, and supported by this CPU); openmp (its version as a date, or
        None); compiler; cuda_archs; and cuda: "built", or why there are no CUDA kernels.
    """
    built = _C.build_info()
    built["cuda_archs"] = [arch for arch in built["cuda_archs"].split(";") if arch]
    return {"version": __version__, "torch_running": torch.__version__, **built}
