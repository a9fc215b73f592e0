"""What is read from bench/cpu.py's results, for the terminal, the pages and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

# As the rows name them, and in the order of the columns.
PEERS = ["torch", "ONNX Runtime", "OpenVINO", "JAX", "TensorFlow"]


def duration(seconds: float) -> str:
    """Such as "12 µs" or "3.4 ms"."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def speedup_table(title: str, kind: str, others: list[str], rows: list[Row]) -> Any:
    """A table for the terminal: fastrnn's time, and its speedups with their quartiles.

    kind: the name of what a row is of, such as "cell".
    """
    from rich.table import Table  # tests read figures where rich is missing

    table = Table(title=title)
    for name in ["row", "fastrnn", *others]:
        table.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        ratios = [row["ratio"].get(name) for name in others]
        table.add_row(
            f"{row[kind]} {row['mode']} B={row['B']} H={row['H']}",
            duration(statistics.median(row["seconds"]["fastrnn"])),
            *(f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" if r else "" for r in ratios),
        )
    return table


def label(row: Row) -> str:
    """What is computed in a row, without what is the same in most."""
    words = [row["cell"], row["mode"]]
    words += [f"{name}={row[name]}" for name in ("T", "B", "H")]
    words += [f"I={row['I']}"] if row["I"] != row["H"] else []
    words += [f"{row['layers']} layers"] if row["layers"] > 1 else []
    words += ["two directions"] if row["directions"] > 1 else []
    words += [row["dtype"]] if row["dtype"] != "float32" else []
    words += ["packed"] if row["packed"] else []
    words += [f"projected to {row['projection']}"] if row.get("projection") else []
    words += ["recompute"] if row.get("recompute") else []
    words += [f"{row['threads']} threads"] if row["threads"] != 2 else []
    words += [f"{row['beside']} other processes"] if row.get("beside") else []
    return " ".join(words)


def ours(row: Row) -> float | None:
    """Median seconds per call of fastrnn."""
    seconds = row.get("contestants", {}).get("fastrnn", {}).get("seconds")
    return statistics.median(seconds) if seconds else None


def ratio(row: Row, peer: str) -> dict[str, float] | None:
    """The speedup over a peer, its time / fastrnn's: median, low and high (the quartiles)."""
    return row.get("ratio", {}).get(peer)


def speedups(rows: Iterable[Row], peer: str = "torch") -> dict[str, Any] | None:
    """The speedups over a peer in these rows; None if no row has one.

    Returns:
        rows, how many have one; slower, how many of these are below 1, and beyond, how many are
        below 1 with both quartiles; median and lowest.
    """
    found = [speedup for row in rows if (speedup := ratio(row, peer))]
    if not found:
        return None
    medians = [speedup["median"] for speedup in found]
    return {
        "rows": len(found),
        "slower": sum(median < 1 for median in medians),
        "beyond": sum(speedup["high"] < 1 for speedup in found),
        "median": statistics.median(medians),
        "lowest": min(medians),
    }
