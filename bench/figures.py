"""What is read off bench/cpu.py's results, for the terminal, README.md and the picture."""

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


def label(row: Row) -> str:
    """What is computed in a row, less what is the same in most."""
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
    words += [f"{row['beside']} processes beside"] if row.get("beside") else []
    return " ".join(words)


def ours(row: Row) -> float | None:
    """Median seconds a call of fastrnn's."""
    seconds = row.get("contestants", {}).get("fastrnn", {}).get("seconds")
    return statistics.median(seconds) if seconds else None


def ratio(row: Row, peer: str) -> dict[str, float] | None:
    """The peer's time over ours: median, low and high (the quartiles)."""
    return row.get("ratio", {}).get(peer)


def beside_torch(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Over rows, the ratios to torch; None if there are none.

    Returns:
        rows, and of these slower: with a ratio below 1, and beyond: with all of its middle half
        below 1; median and lowest of the ratios.
    """
    ratios = [found for row in rows if (found := ratio(row, "torch"))]
    if not ratios:
        return None
    medians = [each["median"] for each in ratios]
    return {
        "rows": len(ratios),
        "slower": sum(median < 1 for median in medians),
        "beyond": sum(each["high"] < 1 for each in ratios),
        "median": statistics.median(medians),
        "lowest": min(medians),
    }
