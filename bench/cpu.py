"""Times fastrnn on the CPU beside torch.nn, ONNX Runtime, OpenVINO, JAX and TensorFlow.

    python bench/cpu.py --quick
    python bench/cpu.py --json bench/results/cpu.json --picture bench/results/cpu.png --resume

Every row is a process of its own, in which the contestants take turns (timing.py); a ratio is the
time of the other over that of fastrnn, so above 1 fastrnn is faster. Share is what of the rate of
torch.mm's best in that row the layer reached. What is not installed is left out. Memory is
measured by bench/memory.py.
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timing import cores, run

import fastrnn

PACKAGES = [
    *("torch", "onnx", "onnxruntime", "openvino", "jax", "jaxlib", "tensorflow", "tensorflow-cpu"),
    *("keras", "numpy"),
]
NOTES = {
    "ratio": "time of the other / time of fastrnn, by round: median and quartiles",
    "share": "operations / seconds of fastrnn / rate of float32 torch.mm in the same row",
    "operations": "2 G H (inputs + H) a row, step, layer and direction; three times in training",
    "sample": f"{SAMPLE_ROWS} rows drawn with seed {SAMPLE_SEED}; drawn again where a forward pass "
    "has more operations than "
    + ", ".join(f"{bound:.0e} ({mode})" for mode, bound in SAMPLE_BOUNDS.items()),
}


def field(path: str, name: str) -> str:
    """The value of the first line `name: value` in a file of /proc; "unknown" if there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
    return values[0] if values else "unknown"


def caches() -> dict[str, str]:
    """Sizes of the first CPU's caches by level, as {"L1 Data": "32K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def machine() -> dict[str, Any]:
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    return {
        "cpu": field("/proc/cpuinfo", "model name"),
        "cpus": os.cpu_count(),
        "cores": len(cores()),
        "caches": caches(),
        "memory": field("/proc/meminfo", "MemTotal"),
        "os": f"{release}, Linux {platform.release()}",
        "isa": fastrnn.build_info()["isa"],
    }


def versions() -> dict[str, str]:
    """Of all packages that are installed here."""
    found = {"python": platform.python_version(), "fastrnn": fastrnn.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the file at once, so that one left by an interrupted run can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def earlier(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows by key of a file of results, but those that failed."""
    if not path or not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {row["key"]: row for row in rows if "error" not in row}


def peak_of(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Over the rows with two threads: median, lowest and highest rate of sgemm, in operations/s."""
    rates = [statistics.median(row["peak"]) for row in rows if "peak" in row and row["threads"] > 1]
    if not rates:
        return {}
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


# --- what is printed ------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def label(row: dict[str, Any]) -> str:
    """What is computed in a row, less what is the same in most."""
    words = [row["cell"], row["mode"]]
    words += [f"{name}={row[name]}" for name in ("T", "B", "H")]
    words += [f"I={row['I']}"] if row["I"] != row["H"] else []
    words += [f"{row['layers']} layers"] if row["layers"] > 1 else []
    words += ["two directions"] if row["directions"] > 1 else []
    words += [row["dtype"]] if row["dtype"] != "float32" else []
    words += ["packed"] if row["packed"] else []
    words += ["one thread"] if row["threads"] == 1 else []
    return " ".join(words)


def table(group: str, rows: list[dict[str, Any]]) -> Table:
    """The rows of one group: our time, the share of the peak, and each peer's ratio."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    shown = Table(title=group)
    shown.add_column("row")
    for name in ["fastrnn", "share", *peers]:
        shown.add_column(name, justify="right")
    for row in rows:
        if "error" in row:
            shown.add_row(label(row), row["error"])
            continue
        own = row["contestants"]["fastrnn"]
        cells = [own.get("reason") or duration(statistics.median(own["seconds"]))]
        cells.append(f"{row['share']:.0%}" if "share" in row else "")
        for peer in peers:
            ratio = row.get("ratio", {}).get(peer)
            reason = row["contestants"].get(peer, {}).get("reason", "")
            if not ratio:
                # What is merely not there leaves its column empty.
                cells.append("" if "not installed" in reason else reason)
                continue
            style = "red" if ratio["high"] < 1 else "green" if ratio["low"] > 1 else ""
            text = f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"
            cells.append(f"[{style}]{text}[/]" if style else text)
        shown.add_row(label(row), *cells)
    return shown


def summary(rows: list[dict[str, Any]]) -> Table:
    """By group, the ratios to torch."""
    shown = Table(title="time of torch / time of fastrnn")
    for name in ["group", "rows", "median", "lowest", "slower", "beyond the noise"]:
        shown.add_column(name, justify="right")
    for group in GROUPS:
        ratios = [
            row["ratio"]["torch"]
            for row in rows
            if row["group"] == group and "torch" in row.get("ratio", {})
        ]
        if ratios:
            medians = [ratio["median"] for ratio in ratios]
            shown.add_row(
                *(group, str(len(ratios))),
                *(f"{statistics.median(medians):.2f}", f"{min(medians):.2f}"),
                *(str(sum(m < 1 for m in medians)), str(sum(r["high"] < 1 for r in ratios))),
            )
    return shown


# --- the run --------------------------------------------------------------------------------------


def measure(
    cases: list[Case], rounds: int, path: Path | None, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Runs all rows that are not in `known`, and saves after each."""
    results = {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "options": {"rounds": rounds},
        "notes": NOTES,
        "peak": {},
        "rows": [],
    }
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            row = known.get(case.key)
            if row is None:
                progress.update(task, description=label(case.to_json()))
                row = run(case, rounds)
            results["rows"].append(row)
            progress.advance(task)
            if path:
                results["peak"] = peak_of(results["rows"])
                save(path, results)
    results["peak"] = peak_of(results["rows"])
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some of the rows: under 3 minutes")
    parser.add_argument(
        "--only", action="append", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument("--rounds", type=int, help="at most so many; 7, or 5 if quick")
    parser.add_argument("--json", type=Path, help="where to write the results, row by row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has")
    parser.add_argument("--picture", type=Path, help="where to write a picture of the grid")
    args = parser.parse_args(arguments)
    if args.resume and not args.json:
        parser.error("--resume needs --json")
    args.rounds = args.rounds or (5 if args.quick else 7)
    return args


def main() -> None:
    args = parse()
    cases = quick_cases() if args.quick else all_cases()
    if args.only:
        cases = [case for case in cases if case.group in args.only]
    known = earlier(args.json) if args.resume else {}
    results = measure(cases, args.rounds, args.json, known)
    console = Console()
    for group in GROUPS:
        rows = [row for row in results["rows"] if row["group"] == group]
        if rows:
            console.print(table(group, rows))
    console.print(summary(results["rows"]))
    if results["peak"]:
        low, high = results["peak"]["min"] / 1e9, results["peak"]["max"] / 1e9
        console.print(
            f"{results['machine']['cpu']}, sgemm at {low:.0f} to {high:.0f} GFLOP/s. "
            "Ratios above 1: fastrnn is faster; in brackets the quartiles."
        )
    if args.picture:
        from picture import draw

        draw(results, args.picture)


if __name__ == "__main__":
    main()
