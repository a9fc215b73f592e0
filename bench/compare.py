"""Shows which rows of two results of bench/cpu.py differ by more than the noise.

    python bench/compare.py old.json new.json

A time is measured in matrix products: it is multiplied by the rate of sgemm in its row, so that a
slower machine alone changes nothing. torch's time, whose code is the same in both, is the control:
where it changed the same way, the cause is rather the machine, and the row is dim.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from figures import Row, label
from rich.console import Console
from rich.table import Table

from fastrnn.timing import quartiles

LEAST = 0.03  # smaller changes are not shown, however clear they are


def in_products(row: Row, name: str) -> dict[str, float] | None:
    """Quartiles of a contestant's seconds per call times the median rate of sgemm in its row."""
    seconds = row.get("contestants", {}).get(name, {}).get("seconds")
    if not seconds:
        return None
    rate = statistics.median(row["peak"])
    return quartiles([value * rate for value in seconds])


def change(old: Row, new: Row, name: str) -> tuple[float, bool] | None:
    """new / old of a contestant's time, and whether it changed; None without a time in a row."""
    before, after = in_products(old, name), in_products(new, name)
    if not before or not after:
        return None
    ratio = after["median"] / before["median"]
    apart = after["low"] > before["high"] or after["high"] < before["low"]
    return ratio, apart and abs(ratio - 1) > LEAST


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[Row, float, float | None]]:
    """The rows in both whose time changed: the row, new / old of fastrnn's time and of torch's."""
    before = {row["key"]: row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        if row["key"] not in before:
            continue
        ours = change(before[row["key"]], row, "fastrnn")
        control = change(before[row["key"]], row, "torch")
        if ours and ours[1]:
            found.append((row, ours[0], control[0] if control else None))
    return sorted(found, key=lambda each: each[1])


def alike(ours: float, control: float | None) -> bool:
    """Whether torch's time changed in the same direction as fastrnn's."""
    return control is not None and abs(control - 1) > LEAST and (control < 1) == (ours < 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    console = Console()
    for name in ["machine", "versions"]:
        if old[name] != new[name]:
            console.print(f"[red]They were made with another {name}.[/]")
    table = Table(title="time, new / old")
    for name in ["group", "row"]:
        table.add_column(name)
    for name in ["fastrnn", "torch"]:
        table.add_column(name, justify="right")
    moved = compare(old, new)
    for row, ours, control in moved:
        shown = "" if control is None else f"{control:.2f}"
        style = "dim" if alike(ours, control) else "green" if ours < 1 else "red"
        table.add_row(row["group"], label(row), f"[{style}]{ours:.2f}[/]", shown)
    if moved:
        console.print(table)
    keys = [{row["key"] for row in results["rows"]} for results in (old, new)]
    faster = sum(ours < 1 for _, ours, _ in moved)
    machine = sum(alike(ours, control) for _, ours, control in moved)
    console.print(
        f"{len(keys[0] & keys[1])} rows in both: {faster} faster, {len(moved) - faster} slower "
        f"({machine} of these as torch), the others within the noise or {LEAST:.0%}. "
        f"{len(keys[0] ^ keys[1])} rows in one only."
    )


if __name__ == "__main__":
    main()
