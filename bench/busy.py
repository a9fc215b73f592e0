"""Times layers while other processes keep the cores busy.

    python bench/busy.py [--json bench/results/busy.json]

With 0, 1, 2 and 4 other processes, each a plain loop or a loop of torch's matrix products on one
thread, fastrnn runs on two threads and two cores, and so do torch and ONNX Runtime; and fastrnn
with torch.set_num_threads(1). Blocks of their calls alternate, and every call is timed: a table
shows median calls. fastrnn's should take at most 1.25 times as long as with one thread under the
same load, and with one other process at most twice as long as on the quiet machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case
from contestants import contestants
from cpu import machine, save, versions
from figures import duration, label
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import BUSY, cores, others

from fastrnn.timing import FEWEST, PAUSE, order, quartiles, short

THREADS = 2
CASES = [
    Case("busy", "LSTM", "inference", 100, 1, 128, 128, peers=("torch", "ONNX Runtime")),
    Case("busy", "GRU", "inference", 60, 2, 200, 200, peers=("torch", "ONNX Runtime")),
    Case("busy", "LSTM", "training", 10, 64, 1, 64, layers=2),  # as in examples/forecast.py
    Case("busy", "LSTM", "training", 80, 16, 160, 160),
]
PRODUCTS = """
import torch
a = torch.randn(512, 512)
print("busy", flush=True)
while True: torch.mm(a, a)
"""
PROGRAMS = {"loops": BUSY, "products": PRODUCTS}
COUNTS = [1, 2, 4]
LOADS = [("loops", 0), *((name, count) for name in PROGRAMS for count in COUNTS)]
BLOCK = 0.3  # seconds of a block: some hundred calls of a small layer
ONE = "fastrnn, one thread"


def calls_of(case: Case) -> dict[str, Callable[[], object]]:
    """The calls by contestant, whose results were compared with torch's in float64."""
    torch.set_num_threads(THREADS)
    found = {name: call for name, call in contestants(case) if not isinstance(call, str)}
    return {"fastrnn": found["fastrnn"], ONE: found["fastrnn"], **found}


def block(call: Callable[[], object]) -> list[float]:
    """The seconds of each call of a block, of at least FEWEST."""
    call()
    found: list[float] = []
    began = now = time.perf_counter()
    while now - began < BLOCK or len(found) < FEWEST:
        before, _ = now, call()
        now = time.perf_counter()
        found.append(now - before)
    return found


def measure(case: Case, program: str, count: int, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    with torch.inference_mode(case.mode != "training"):
        calls = calls_of(case)
        with others(count, PROGRAMS[program]):
            for number in range(rounds):
                for name in order(list(calls), number):
                    torch.set_num_threads(1 if name == ONE else THREADS)
                    time.sleep(PAUSE)
                    seconds.setdefault(name, []).extend(block(calls[name]))
    times = {
        name: {**quartiles(found), "mean": short(statistics.mean(found)), "calls": len(found)}
        for name, found in seconds.items()
    }
    return {**case.to_json(), "program": program, "beside": count, "contestants": times}


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one case, the first of which is that of the quiet machine."""
    names = list(rows[0]["contestants"])
    shown = Table(title=f"{label({**rows[0], 'beside': 0})}: median call")
    shown.add_column("other processes")
    for name in [*names, "to one thread", "to quiet"]:
        shown.add_column(name, justify="right")
    for row in rows:
        median = {name: found["median"] for name, found in row["contestants"].items()}
        ratios = [median["fastrnn"] / other for other in (median[ONE], quiet(rows))]
        load = f"{row['beside']} {row['program']}" if row["beside"] else "none"
        shown.add_row(load, *map(duration, median.values()), *(f"{r:.2f}" for r in ratios))
    return shown


def quiet(rows: list[dict[str, Any]]) -> float:
    """fastrnn's median call on the quiet machine, in the rows of one case."""
    return next(row["contestants"]["fastrnn"]["median"] for row in rows if not row["beside"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each contestant (5)")
    args = parser.parse_args()
    os.sched_setaffinity(0, cores()[:THREADS])  # the other processes inherit it
    rows = [(case, *load) for case in CASES for load in LOADS]
    console = Console(stderr=True)
    found = [measure(*row, args.rounds) for row in track(rows, console=console)]
    for first in range(0, len(found), len(LOADS)):
        Console().print(table(found[first : first + len(LOADS)]))
    if args.json:
        save(args.json, {"machine": machine(), "versions": versions(), "rows": found})


if __name__ == "__main__":
    main()
