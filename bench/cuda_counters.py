"""Counts the launches, bytes and operations of a call of a layer on a virtual GPU.

    python bench/cuda_counters.py --quick
    python bench/cuda_counters.py --json bench/results/cuda_counters.json --compare PROGRAM

The virtual GPU runs the kernels and counts; it knows nothing of time. Calls of ATen, products and
copies are counted with the bytes of their operands. The loads by which a block waits at a grid
barrier are counted separately (cuda_polls.cpp): their number depends on the schedule.

PROGRAM is another implementation of a float32 layer, called as `PROGRAM cell T B H pass` on the
virtual GPU. It runs that pass of a training step, and prints the bytes of the operands of its calls
of cuBLAS.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cases import gates

ROOT = Path(__file__).parent.parent
VGPU = ROOT / "tests/vgpu/vgpu"
T = 20
CELLS = ["LSTM", "GRU"]
# tf32: float32 with products rounded to TF32, as in torch's layers by default.
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
PATHS = ["stepwise", "persistent"]
PASSES = ["forward", "backward"]
# Calls of ATen that launch nothing.
VIEWS = {"aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::detach"}

Row = dict[str, Any]


def layers(quick: bool) -> Iterator[Row]:
    """The layers that are counted, each in one process, on both paths and in both passes."""
    for H, B, cell, dtype in itertools.product([64, 256], [1, 8, 32], CELLS, BYTES):
        if not quick or (H == 64 and B == 8 and dtype != "bfloat16"):
            yield {"cell": cell, "T": T, "B": B, "H": H, "dtype": dtype}


# --- on the virtual GPU ---------------------------------------------------------------------------


def counted(call: Callable[[], object]) -> Row:
    """The counters of `call` on the virtual GPU that this process runs on."""
    import torch

    program = ctypes.CDLL(None)
    program.vg_counters_json.restype = ctypes.c_char_p
    program.cuda_polls.restype = program.cuda_product_bytes.restype = ctypes.c_uint64
    bridge = sys.modules["vgpu.torch_bridge"]
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()  # bytes

    def count_call(name: str, args: tuple[Any, ...]) -> None:
        flat = [b for a in args for b in (a if isinstance(a, (list, tuple)) else [a])]
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        calls[name] += 1
        moved[name] += sum(t.nbytes for t in tensors)
        # A result that is not among the arguments and may be large.
        if name == "aten::cat":
            moved[name] += sum(t.nbytes for t in tensors)

    def now() -> tuple[dict[str, Row], Counter[str], int]:
        found = json.loads(program.vg_counters_json())
        host = Counter(found["host"]) + Counter(bridge.copied)
        host["product_bytes"] = program.cuda_product_bytes()
        return found["kernels"], host, program.cuda_polls()

    before, host_before, polls_before = now()
    original, bridge.count_call = bridge.count_call, count_call
    try:
        call()
    finally:
        bridge.count_call = original
    kernels, host, polls = now()
    for name, kernel in kernels.items():
        for key, value in before.get(name, {}).items():
            if isinstance(value, int) and not key.startswith("last_"):
                kernel[key] -= value
    host.subtract(host_before)
    aten = {name: n for name, n in calls.items() if name not in VIEWS}
    return {
        **summary(kernels, host, polls - polls_before),
        "product_bytes": host["product_bytes"],
        "copies": host["memcpy_calls"],
        "copied": host["memcpy_d2d_bytes"],
        "aten": sum(aten.values()),
        "aten_bytes": sum(moved[name] for name in aten),
        "aten_calls": aten,
    }


def summary(kernels: dict[str, Row], host: Counter[str], polls: int) -> Row:
    """The counters of a pass, summed over its kernels."""
    used = [kernel for kernel in kernels.values() if kernel["launches"]]

    def total(*keys: str) -> int:
        return sum(kernel[key] for kernel in used for key in keys)

    x, y, z = used[-1]["last_grid"]
    waits = ("device_synchronize_calls", "stream_synchronize_calls")
    return {
        "launches": total("launches"),
        "products": host["cublas_gemm_calls"],
        "memsets": host["memset_calls"],
        "blocks": x * y * z,
        "atomics": total("global_atomics"),
        "polls": polls,
        "load_bytes": total("gld_bytes") - 4 * polls,
        "load_sectors": total("gld_sectors") - polls,
        "store_bytes": total("gst_bytes"),
        "store_sectors": total("gst_sectors"),
        "least_load_bytes": total("distinct_read_bytes"),
        "least_store_bytes": total("distinct_write_bytes"),
        "wavefronts": total("sld_wavefronts", "sst_wavefronts"),
        "ideal_wavefronts": total("sld_ideal", "sst_ideal"),
        "float_operations": total("fp32"),
        "tensor_operations": total("tensor"),
        "local_accesses": total("local_ld", "local_st"),
        "copied_to_host": host["memcpy_d2h_bytes"],
        "copied_to_device": host["memcpy_h2d_bytes"],
        "waits": sum(host[name] for name in waits),
    }


def count_layer(row: Row) -> list[Row]:
    """The rows of both paths and both passes."""
    import torch

    import fastrnn

    torch.backends.cudnn.allow_tf32 = row["dtype"] == "tf32"
    dtype = getattr(torch, row["dtype"].replace("tf32", "float32"))
    torch.manual_seed(0)
    layer = getattr(fastrnn, row["cell"])(row["H"], row["H"]).to("cuda", dtype)

    def passes(steps: int) -> list[Row]:
        x = torch.randn(steps, row["B"], row["H"], dtype=dtype, device="cuda", requires_grad=True)
        grad = torch.randn_like(x)
        layer.zero_grad()
        outputs: list[torch.Tensor] = []
        return [
            counted(lambda: outputs.append(layer(x)[0])),
            counted(lambda: outputs[0].backward(grad)),
        ]

    found = []
    for path in PATHS:
        os.environ["FASTRNN_CUDA_PATH"] = path
        passes(2)  # warm-up
        for name, two, three, counts in zip(PASSES, passes(2), passes(3), passes(T), strict=True):
            # Independent of the number of steps: the weights and the initial states.
            once = 3 * two["load_bytes"] - 2 * three["load_bytes"]
            found.append({**row, "path": path, "pass": name, **counts, "loaded_once": once})
    return found


# --- the run --------------------------------------------------------------------------------------


def run(vgpu: Path, command: list[str]) -> tuple[Row, str]:
    """Runs a program on the virtual GPU; returns its counters and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counters.json"
        result = subprocess.run(
            [str(vgpu), "run", "--counters", str(file), "--", *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")
        return json.loads(file.read_text()), result.stdout


def ours(vgpu: Path, polls: Path, row: Row) -> list[Row]:
    python = [sys.executable, __file__, "--layer", json.dumps(row)]
    _, printed = run(vgpu, ["sh", "-c", f'LD_PRELOAD={polls}:$LD_PRELOAD exec "$@"', "sh", *python])
    return json.loads(next(line for line in printed.splitlines() if line.startswith("[")))


def theirs(vgpu: Path, program: str, row: Row) -> list[Row]:
    found = []
    for name in PASSES:
        arguments = [row["cell"], *(str(row[key]) for key in "TBH"), name]
        counters, printed = run(vgpu, [program, *arguments])
        host = Counter(counters["host"])
        counts = summary(counters["kernels"], host, polls=0)
        # It only copies its arguments, which are not counted.
        counts |= {"product_bytes": int(printed.split()[0]), "copies": 0, "copied": 0}
        found.append({**row, "path": "beside", "pass": name, **counts, "aten": 0, "aten_bytes": 0})
    return found


def ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def derive(rows: list[Row]) -> None:
    """Adds to the rows of one layer what is derived from their counts."""
    cell_operations = {
        row["pass"]: row["float_operations"] for row in rows if row["path"] == "stepwise"
    }
    for row in rows:
        row["load_efficiency"] = ratio(row["load_bytes"], 32 * row["load_sectors"])
        row["store_efficiency"] = ratio(row["store_bytes"], 32 * row["store_sectors"])
        row["shared_conflicts"] = ratio(row["wavefronts"], row["ideal_wavefronts"])
        kinds = ("launches", "memsets", "copies", "products", "aten")
        row["all_launches"] = sum(row[key] for key in kinds)
        operands = row["product_bytes"] + row["aten_bytes"] + 2 * row["copied"]
        row["all_bytes"] = 32 * (row["load_sectors"] + row["store_sectors"]) + operands
        row["least_bytes"] = row["least_load_bytes"] + row["least_store_bytes"] + operands
        if row["path"] != "persistent":
            continue
        G, H = gates(row["cell"]), row["H"]
        # Each block arrives at each barrier once.
        row["barriers"] = row["atomics"] // row["blocks"]
        row["weights_read"] = ratio(row["loaded_once"], G * H**2 * BYTES[row["dtype"]])
        # The cell's operations are those of the stepwise kernel; the rest are the product's.
        product = row["tensor_operations"]
        if row["dtype"] == "float32":
            product = row["float_operations"] - cell_operations[row["pass"]]
        row["operations"] = ratio(product, 2 * T * row["B"] * G * H**2)


# --- what is shown --------------------------------------------------------------------------------

# The columns of the table: keys of a row.
COLUMNS = {
    "path": "path", "pass": "pass", "launches": "kernels", "products": "products", "aten": "ATen",
    "all_launches": "launches", "barriers": "barriers", "least_bytes": "kB",
    "all_bytes": "kB requested",
    "load_efficiency": "load", "store_efficiency": "store", "shared_conflicts": "shared",
    "weights_read": "W_hh", "operations": "operations", "copied_to_host": "to host",
    "waits": "waits",
}  # fmt: skip


def table(rows: list[Row]) -> Any:
    from rich.table import Table

    shown = Table(title=f"one call of a layer, T = {T}, I = H")
    shown.add_column("layer")
    for name in COLUMNS.values():
        shown.add_column(name, justify="right")
    for row in rows:
        cells = []
        for key in COLUMNS:
            value = row[key] // 1000 if key.endswith("_bytes") else row.get(key)
            empty = "" if value is None else str(value)
            cells.append(f"{value:.2f}" if isinstance(value, float) else empty)
        shown.add_row(f"{row['cell']} {row['dtype']} B={row['B']} H={row['H']}", *cells)
    return shown


LEGEND = """\
launches: kernels, memsets, copies, products and calls of ATen. kB: what a launch touches, once, and
the operands of copies, products and calls of ATen. kB requested: every sector of every
request of the kernels, some of which a cache serves, and those operands. load, store: bytes / bytes
of sectors. shared: wavefronts / least. W_hh: how often it was read, with the initial states.
operations: those of its product and sums / least. No times: this GPU is virtual."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some of the rows")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--compare", help="a program to compare with, see the source")
    parser.add_argument("--vgpu", type=Path, default=VGPU, help=f"the virtual GPU; {VGPU}")
    parser.add_argument("--jobs", type=int, default=2, help="layers at a time")
    parser.add_argument("--layer", type=json.loads, help=argparse.SUPPRESS)  # from ours()
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.layer:
        print(json.dumps(count_layer(args.layer)), flush=True)
        # Without Python's finalization: torch's threads may still run operators that the virtual
        # GPU implements in Python, and it crashes now and then.
        os._exit(0)
    from cpu import save, versions
    from rich.console import Console
    from rich.progress import Progress

    if not args.vgpu.exists():
        print(f"cuda_counters.py: there is no virtual GPU at {args.vgpu}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": versions()}
    results["rows"] = []
    chosen = list(layers(args.quick))
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(args.jobs) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        polls = Path(folder) / "polls.so"
        subprocess.run(
            ["g++", "-O1", "-shared", "-fPIC", f"-I{args.vgpu.parent / 'runtime'}",
             str(ROOT / "bench/cuda_polls.cpp"), "-o", str(polls), "-ldl"],
            check=True,
        )  # fmt: skip

        def count(row: Row) -> list[Row]:
            found = ours(args.vgpu, polls, row)
            if args.compare and row["dtype"] == "float32":
                found += theirs(args.vgpu, args.compare, row)
            derive(found)
            return found

        task = progress.add_task("counting", total=len(chosen))
        for found in pool.map(count, chosen):
            results["rows"] += found
            progress.advance(task)
            if args.json:
                save(args.json, results)
    Console(width=None if sys.stdout.isatty() else 180).print(table(results["rows"]))
    print(LEGEND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
