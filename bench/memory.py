"""The memory of a training step of torch.nn's layers and fastrnn's, each in its own process.

    python bench/memory.py [--json bench/results/memory.json]

It measures by how much one forward and backward pass raises the peak of the resident set, and how
many bytes autograd saves in between, without parameters and the input. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import fastrnn

T, B, I, H = 200, 64, 256, 512
CELLS = ["LSTM", "GRU", "RNN"]
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the tensors that a forward pass saves for backward, each storage once."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = layer(x)
    for tensor in (x, *layer.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storages.values())


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(module: str, cell: str, dtype: str) -> dict[str, int]:
    """Peak and saved bytes of one training step; run in a fresh process."""
    layer = getattr({"torch": nn, "fastrnn": fastrnn}[module], cell)(I, H)
    layer = layer.to(getattr(torch, dtype))
    x = torch.randn(T, B, I).to(getattr(torch, dtype))
    layer(x[:2, :1])[0].sum().backward()  # allocates what is allocated only once
    layer.zero_grad()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    layer(x)[0].sum().backward()
    peak = status("VmHWM") - before
    return {"peak": peak, "saved": saved_bytes(layer, x)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return

    table = Table(title=f"One training step, T={T} B={B} I={I} H={H}: MB")
    for name in ["layer", "dtype", "peak torch", "peak fastrnn", "saved torch", "saved fastrnn"]:
        table.add_column(name, justify="right")
    rows = []
    cases = [(cell, dtype) for cell in CELLS for dtype in DTYPES]
    for cell, dtype in track(cases, description="measuring"):
        row = {"cell": cell, "dtype": dtype}
        for module in ["torch", "fastrnn"]:
            command = [sys.executable, "-W", "ignore", __file__, "--one", module, cell, dtype]
            row[module] = json.loads(
                subprocess.run(command, capture_output=True, check=True).stdout
            )
        rows.append(row)
        sizes = [row[m][kind] for kind in ["peak", "saved"] for m in ["torch", "fastrnn"]]
        table.add_row(cell, dtype, *(f"{size / 2**20:.0f}" for size in sizes))
    Console().print(table)
    if args.json:
        sizes = {"T": T, "B": B, "I": I, "H": H}
        text = json.dumps({"torch": torch.__version__, "sizes": sizes, "bytes": rows}, indent=1)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
