"""Draws results of bench/cpu.py: the speedups and the share of the peak, by hidden size.

python bench/picture.py bench/results/grid.json bench/results/cpu.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from cases import CELLS
from figures import PEERS, ratio

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCHES = [1, 16]


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture: per batch size a row of panels, one per cell and one of the shares."""
    figure, panels = plt.subplots(2, 4, figsize=(13, 6), sharex=True, layout="constrained")
    for B, line in zip(BATCHES, panels, strict=True):
        for panel in line[1:3]:
            panel.sharey(line[0])
        rows = [row for row in results["rows"] if row["B"] == B]
        for cell, panel in zip(CELLS, line, strict=False):
            chosen = [row for row in rows if (row["group"], row["cell"]) == ("inference", cell)]
            ratios(panel, chosen)
            panel.set_title(f"{cell}, B = {B}")
        line[0].set_ylabel("speedup")
        shares(line[3], rows)
        line[3].set_title(f"share of sgemm's rate, B = {B}")
    handles = {}
    for panel in panels[:, :3].flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower left", ncols=len(handles)
        )
    for panel in panels[1]:
        panel.set_xlabel("H")
    machine, versions = results["machine"], results["versions"]
    figure.suptitle(
        f"Inference, T = 100, I = H, float32, two threads: {machine['cpu']}, {machine['isa']}, "
        f"torch {versions['torch']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def ratios(panel: Any, rows: list[dict[str, Any]]) -> None:
    """One line per peer, with the quartiles as a band."""
    for number, peer in enumerate(PEERS):
        found = [(row["H"], ratio(row, peer)) for row in rows if ratio(row, peer)]
        if found:
            sizes = [size for size, _ in found]
            low, median, high = (
                [each[name] for _, each in found] for name in ("low", "median", "high")
            )
            panel.plot(sizes, median, "o-", color=f"C{number}", label=peer, markersize=4)
            panel.fill_between(sizes, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    panel.axhline(1, color="black", linewidth=1)
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    by_size(panel)


def shares(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Two lines per cell: inference and training."""
    for number, cell in enumerate(CELLS):
        for mode, style in [("inference", "o-"), ("training", "s:")]:
            chosen = [row for row in rows if (row["group"], row["cell"]) == (mode, cell)]
            found = [(row["H"], row["share"]) for row in chosen if "share" in row]
            if found:
                name = cell if mode == "inference" else f"{cell}, training"
                color = f"C{len(PEERS) + number}"
                panel.plot(*zip(*found, strict=True), style, color=color, label=name, markersize=4)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    by_size(panel)
    if panel.lines:
        panel.legend(fontsize="x-small")


def by_size(panel: Any) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.picture)


if __name__ == "__main__":
    main()
