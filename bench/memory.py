"""The memory of a call of torch.nn's layers and fastrnn's, each in its own process.

    python bench/memory.py [--json bench/results/memory.json]
    python bench/memory.py --lopsided [--json bench/results/memory_lopsided.json]

It measures by how much a training step, or with --lopsided also an inference, raises the peak of
the resident set, and how many bytes autograd saves in between, without parameters and the input.
--lopsided: float32 layers of the sizes of that group of bench/cpu.py. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from cases import CELLS, Case, lopsided
from cpu import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import fastrnn

DTYPES = ["float32", "float64", "bfloat16", "float16"]


def usual() -> list[Case]:
    """A training step of each cell and dtype."""
    sizes = {"T": 200, "B": 64, "I": 256, "H": 512}
    return [
        Case("memory", cell, "training", dtype=dtype, **sizes) for cell in CELLS for dtype in DTYPES
    ]


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


def measure(module: str, case: Case) -> dict[str, int]:
    """Peak and saved bytes of one call; run in a fresh process."""
    dtype = getattr(torch, case.dtype)
    make = getattr({"torch": nn, "fastrnn": fastrnn}[module], case.cell)
    layer = make(case.I, case.H, case.layers).to(dtype)
    x = torch.randn(case.T, case.B, case.I).to(dtype)
    layer(x[:2, :1])[0].sum().backward()  # allocates what is allocated only once
    layer.zero_grad()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if case.mode == "inference":
        with torch.inference_mode():
            layer(x)
        return {"peak": max(0, status("VmHWM") - before)}
    layer(x)[0].sum().backward()
    peak = status("VmHWM") - before
    return {"peak": peak, "saved": saved_bytes(layer, x)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--lopsided", action="store_true", help="large and lopsided layers")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Case.from_json(json.loads(args.one[1])))))
        return

    table = Table(title="One call: MB")
    for name in ["call", "peak torch", "peak fastrnn", "saved torch", "saved fastrnn"]:
        table.add_column(name, justify="left" if name == "call" else "right")
    rows = []
    cases = list(lopsided()) if args.lopsided else usual()
    for case in track(cases, description="measuring"):
        row = case.to_json()
        for module in ["torch", "fastrnn"]:
            one = [module, json.dumps(case.to_json())]
            command = [sys.executable, "-W", "ignore", __file__, "--one", *one]
            row[module] = json.loads(
                subprocess.run(command, capture_output=True, check=True).stdout
            )
        rows.append(row)
        sizes = [row[m].get(kind) for kind in ["peak", "saved"] for m in ["torch", "fastrnn"]]
        table.add_row(case.key, *("" if s is None else f"{s / 2**20:.0f}" for s in sizes))
    Console().print(table)
    if args.json:
        save(args.json, {"versions": {"torch": torch.__version__}, "rows": rows})


if __name__ == "__main__":
    main()
