"""Draws how the time of a call grows with T, B, H and threads, from results of bench/cpu.py.

    python bench/growth.py bench/results/cpu.json bench/results

writes growth_T.png and the figures of the others into the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from cases import GROWTH_AXES, GROWTH_BASE
from figures import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# The expected exponent of the time. Every step costs the same, and so does every row; W_hh and W_ih
# have H * H values per gate. Threads partition the work, up to the number of cores.
EXPECTED = {"T": 1, "B": 1, "H": 2, "threads": -1}


def series(rows: list[Row], cell: str, axis: str, contestant: str) -> list[tuple[int, float]]:
    """The sizes of an axis and the median seconds per call, with the other sizes of GROWTH_BASE."""
    found = []
    for row in rows:
        here = {name: row[name] for name in GROWTH_BASE}
        seconds = row.get("contestants", {}).get(contestant, {}).get("seconds")
        if row["cell"] == cell and seconds and here | {axis: GROWTH_BASE[axis]} == GROWTH_BASE:
            found.append((row[axis], statistics.median(seconds)))
    return sorted(found)


def guide(axis: str, points: list[tuple[int, float]], cores: int) -> list[tuple[int, float]]:
    """The expected line, through the point of the largest size, or of the fewest threads."""
    at, seconds = points[0] if axis == "threads" else points[-1]

    def expected(size: int) -> float:
        size = min(size, cores) if axis == "threads" else size
        return seconds * (size / at) ** EXPECTED[axis]

    return [(size, expected(size)) for size, _ in points]


def draw(results: dict[str, Any], axis: str, path: Path) -> None:
    rows = [row for row in results["rows"] if row["group"] == "growth"]
    figure, panel = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for number, cell in enumerate(["LSTM", "GRU"]):
        for contestant, style in [("fastrnn", "o-"), ("torch", "s--")]:
            points = series(rows, cell, axis, contestant)
            if not points:
                continue
            name, color = f"{cell}, {contestant}", f"C{number}"
            panel.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=4)
            if contestant == "fastrnn":
                line = guide(axis, points, results["machine"]["cores"])
                slope = f"slope {EXPECTED[axis]}" + (", to the cores" if axis == "threads" else "")
                panel.plot(
                    *zip(*line, strict=True), ":", color="grey", label=None if number else slope
                )
    panel.set_xscale("log", base=2 if axis != "T" else 10)
    panel.set_yscale("log")
    panel.set_xticks(GROWTH_AXES[axis], minor=False)
    panel.minorticks_off()
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(axis)
    panel.set_ylabel("seconds per call")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    others = ", ".join(f"{name} = {value}" for name, value in GROWTH_BASE.items() if name != axis)
    panel.set_title(f"Inference, {others}\n{results['machine']['cpu']}", fontsize="medium")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    results = json.loads(args.results.read_text())
    args.folder.mkdir(parents=True, exist_ok=True)
    for axis in GROWTH_AXES:
        draw(results, axis, args.folder / f"growth_{axis}.png")


if __name__ == "__main__":
    main()
