"""Writes the figures of README.md from the files in bench/results.

python bench/readme.py [--check]     --check: only say whether it would change anything
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def memory() -> str:
    """The table of bench/results/memory.json."""
    results = json.loads((ROOT / "bench/results/memory.json").read_text())
    sizes = ", ".join(f"{name} = {size}" for name, size in results["sizes"].items())
    lines = [
        f"  | MB, {sizes} (torch {results['torch']}) | peak, torch | peak, fastrnn "
        "| kept for backward, torch | fastrnn |",
        "  |---|---|---|---|---|",
    ]
    for row in results["bytes"]:
        values = [row[m][kind] / 2**20 for kind in ["peak", "saved"] for m in ["torch", "fastrnn"]]
        cells = " | ".join(f"{value:.0f}" for value in values)
        lines.append(f"  | {row['cell']} {row['dtype']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if README.md is not up to date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    pattern = r"(?<=<!-- memory -->\n).*?(?=  <!-- end of memory -->)"
    new, count = re.subn(pattern, lambda _: f"{memory()}\n", old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit("README.md has no place for the table of memory")
    if args.check and new != old:
        raise SystemExit("README.md is not what bench/results say: run bench/readme.py")
    path.write_text(new)


if __name__ == "__main__":
    main()
