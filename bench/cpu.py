"""Times fastrnn on the CPU against torch.nn, ONNX Runtime, OpenVINO, JAX and TensorFlow.

    python bench/cpu.py --quick
    python bench/cpu.py --json bench/results/cpu.json --picture bench/results/cpu.png --resume
    python bench/cpu.py --json bench/results/cpu.json --resume --again
    python bench/cpu.py --isa avx2 --only inference --json bench/results/avx2.json

Every row is a process of its own, in which blocks of the contestants' calls alternate (timing.py).
A speedup is the other's time divided by fastrnn's: above 1 fastrnn is faster. The share is the
layer's rate divided by the best rate of torch.mm in that row. Packages that are not installed are
left out. bench/memory.py measures memory.

`--isa avx2` measures AVX2 on a wider CPU too (build with FASTRNN_ISAS=all): all contestants are
limited to it by environment variables, those that can't be are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from cases import GROUPS, SAMPLE_BOUNDS, SAMPLE_ROWS, SAMPLE_SEED, Case, all_cases, quick_cases
from figures import Row, duration, label, ours, ratio, speedups
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timing import AVX2, cores, run

import fastrnn
from fastrnn.info import cpu_model

# A row is undisturbed if sgemm reached at least EVEN of the row's best rate in every round, and if
# that best is at least UNDISTURBED of the best of all rows.
EVEN, UNDISTURBED = 0.8, 0.85
PACKAGES = [
    *("torch", "onnx", "onnxruntime", "openvino", "jax", "jaxlib", "tensorflow", "tensorflow-cpu"),
    *("keras", "numpy"),
]
NOTES = {
    "ratio": "time of the other / time of fastrnn, by round: median and quartiles",
    "share": "operations / seconds of fastrnn / best rate of float32 torch.mm in the same row",
    "operations": "2 G H (inputs + H) a row, step, layer and direction; three times in training",
    "sample": f"{SAMPLE_ROWS} rows drawn with seed {SAMPLE_SEED}; drawn again where a forward pass "
    "has more operations than "
    + ", ".join(f"{bound:.0e} ({mode})" for mode, bound in SAMPLE_BOUNDS.items()),
}


def memory() -> str:
    """Such as "24651236 kB"."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("MemTotal"))


def caches() -> dict[str, str]:
    """The sizes of the first CPU's caches, such as {"L1 Data": "32K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def machine() -> dict[str, Any]:
    built = fastrnn.build_info()
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "cores": len(cores()),
        "caches": caches(),
        "memory": memory(),
        "os": f"{release}, Linux {platform.release()}",
        "isa": built["isa"],
        "widest isa": built["isa_supported"][-1],
    }


def versions() -> dict[str, str]:
    """The versions of all packages of PACKAGES that are installed."""
    found = {"python": platform.python_version(), "fastrnn": fastrnn.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the file atomically, so that an interrupted run leaves a complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One row per line.
    head = json.dumps({**results, "rows": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    partial = path.with_suffix(".partial")
    partial.write_text(f"{head}[\n{rows}\n]\n}}\n")
    partial.replace(path)


def earlier(path: Path, here: dict[str, Any]) -> dict[str, Row]:
    """The rows of a file of results by key, without those that failed.

    Raises:
        SystemExit: if the file was made on another machine or with other packages.
    """
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    for name, value in here.items():
        if results[name] != value:
            raise SystemExit(f"{path} can't be continued: it was made with another {name}")
    return {row["key"]: row for row in results["rows"] if "error" not in row}


def undisturbed(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows in which sgemm was about as fast in every round, and as fast as in the best row.

    This alone shows whether other load slowed the machine down; the contestants' times don't count.
    """
    best: dict[int, float] = {}
    for row in rows.values():
        best[row["threads"]] = max(best.get(row["threads"], 0), *row["peak"])
    return {
        key: row
        for key, row in rows.items()
        if min(row["peak"]) >= EVEN * max(row["peak"])
        and max(row["peak"]) >= UNDISTURBED * best[row["threads"]]
    }


def peak_of(rows: Iterable[Row]) -> dict[str, float]:
    """Median, lowest and highest rate of sgemm in the rows with two threads, in operations/s."""
    rates = [statistics.median(row["peak"]) for row in rows if "peak" in row and row["threads"] > 1]
    if not rates:
        return {}
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


# --- what is printed ------------------------------------------------------------------------------


def table(group: str, rows: list[Row]) -> Table:
    """The rows of one group: fastrnn's time and share, and the speedup over each peer."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    has_share = any("share" in row for row in rows)
    shown = Table(title=group)
    shown.add_column("row")
    for name in ["fastrnn", *(["share"] if has_share else []), *peers]:
        shown.add_column(name, justify="right")
    for row in rows:
        if "error" in row:
            shown.add_row(label(row), escape(row["error"]))
            continue
        own = ours(row)
        cells = [duration(own) if own else escape(row["contestants"]["fastrnn"]["reason"])]
        if has_share:
            cells.append(f"{row['share']:.0%}" if "share" in row else "")
        for peer in peers:
            found = ratio(row, peer)
            if found:
                low, median, high = (found[name] for name in ("low", "median", "high"))
                style = "red" if high < 1 else "green" if low > 1 else "default"
                cells.append(f"[{style}]{median:.2f} ({low:.2f}-{high:.2f})[/]")
            else:
                reason = row["contestants"].get(peer, {}).get("reason", "")
                # A package that is not installed leaves its column empty.
                cells.append("" if "not installed" in reason else escape(reason))
        shown.add_row(label(row), *cells)
    return shown


def summary(rows: list[Row]) -> Table:
    """The speedups over torch by group."""
    shown = Table(title="speedup over torch")
    for name in ["group", "rows", "median", "lowest", "slower", "slower beyond the noise"]:
        shown.add_column(name, justify="right")
    for group in GROUPS:
        found = speedups(row for row in rows if row["group"] == group)
        if found:
            counts = [str(found[name]) for name in ("slower", "beyond")]
            ratios = [f"{found[name]:.2f}" for name in ("median", "lowest")]
            shown.add_row(group, str(found["rows"]), *ratios, *counts)
    return shown


# --- the run --------------------------------------------------------------------------------------


def measure(
    cases: list[Case], rounds: int, path: Path | None, resume: bool, again: bool
) -> dict[str, Any]:
    """Runs the rows, and saves after each.

    `resume` keeps the rows that the file has; with `again` only those that were not disturbed.
    """
    here = {"machine": machine(), "versions": versions()}
    known = earlier(path, here) if path and resume else {}
    if again:
        known = undisturbed(known)
    date = datetime.date.today().isoformat()
    rows: list[Row] = []
    results = {**here, "date": date, "options": {"rounds": rounds}, "notes": NOTES}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            row = known.get(case.key)
            if row is None:
                progress.update(task, description=label(case.to_json()))
                row = run(case, rounds)
            rows.append(row)
            results |= {"peak": peak_of(rows), "rows": rows}
            progress.advance(task)
            if path:
                save(path, results)
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some of the rows: under 3 minutes")
    parser.add_argument(
        "--only", action="append", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument("--isa", choices=["avx2"], help="limit all contestants to it")
    parser.add_argument("--rounds", type=int, help="at most this many; 7, or 5 if quick")
    parser.add_argument("--json", type=Path, help="where to write the results, row by row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has")
    parser.add_argument(
        "--again", action="store_true", help="except those during which the machine was disturbed"
    )
    parser.add_argument("--picture", type=Path, help="where to write a picture of the grid")
    args = parser.parse_args(arguments)
    if args.resume and not args.json:
        parser.error("--resume needs --json")
    if args.again and not args.resume:
        parser.error("--again needs --resume")
    args.rounds = args.rounds or (5 if args.quick else 7)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.isa:
        os.environ.update(AVX2)  # read at the first call of a kernel, and by the rows' processes
    cases = quick_cases() if args.quick else all_cases()
    if args.only:
        cases = [case for case in cases if case.group in args.only]
    results = measure(cases, args.rounds, args.json, args.resume, args.again)
    console = Console()
    for group in GROUPS:
        rows = [row for row in results["rows"] if row["group"] == group]
        if rows:
            console.print(table(group, rows))
    console.print(summary(results["rows"]))
    if results["peak"]:
        low, high = (results["peak"][name] / 1e9 for name in ("min", "max"))
        console.print(
            f"{results['machine']['cpu']}, sgemm at {low:.0f} to {high:.0f} GFLOP/s. "
            "Speedups above 1: fastrnn is faster; in brackets the quartiles."
        )
    if args.picture:
        from picture import draw

        draw(results, args.picture)


if __name__ == "__main__":
    main()
