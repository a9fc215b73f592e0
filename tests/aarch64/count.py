"""Counts the instructions of the inner loop of register tiles, in what run.py has compiled.

    python tests/aarch64/count.py

The loop is the one with the most multiply-adds among those of a tile that have no loop inside. All
its instructions count: multiply-adds, loads, prefetches, addresses and the branch.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

OBJECTS = Path(__file__).resolve().parents[2] / "build/aarch64/fastrnn/build/cpu"
#: type -> (sets, operands, the file of its kernels, values of k in a vector's multiply-add)
TYPES = {
    "float32": (["generic", "neon"], "Plain<float>", "kernels_float32", 4),
    "float64": (["generic", "neon"], "Plain<double>", "kernels_float64", 2),
    "bfloat16": (["neon_bf16"], "BFloat16Pairs", "kernels_bfloat16", 8),
}
#: Rows of the largest tile of 4 vectors, an LSTM's panel.
ROWS = {"generic": 3, "neon": 6, "neon_bf16": 6}


def tile_loop(isa: str, operands: str, file: str, vectors: int, pair: int, rows: int) -> list[str]:
    """The instructions of the inner loop of a tile."""
    object_file = OBJECTS / isa / "cpu" / f"{file}.cpp.o"
    command = ["aarch64-linux-gnu-objdump", "--disassemble", "--demangle", "--no-show-raw-insn"]
    text = subprocess.run(
        [*command, str(object_file)], capture_output=True, text=True, check=True
    ).stdout
    name = f"tile<fastrnn::{isa}::{operands}, {vectors}, {pair}, {rows}, false>"
    body = re.search(rf"<void fastrnn::{isa}::{re.escape(name)}.*?>:\n(.*?)\n\n", text, re.DOTALL)
    if not body:
        raise SystemExit(f"{object_file} has no {name}")
    lines = [
        (int(line.group(1), 16), line.group(2))
        for line in re.finditer(r"^ *([0-9a-f]+):\t(.*)$", body.group(1), re.MULTILINE)
    ]
    spans = []
    for address, instruction in lines:
        branch = re.match(r"(?:b\S*|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <", instruction)
        if branch and int(branch.group(1), 16) < address:
            spans.append((int(branch.group(1), 16), address))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [[text for at, text in lines if first <= at <= last] for first, last in inner]
    return max(loops, key=lambda loop: sum(map(multiplies, loop)))


def multiplies(instruction: str) -> bool:
    return instruction.startswith(("fmla", "bfdot"))


def main() -> None:
    print("| dtype | set | tile | instructions | multiply-adds | instructions / multiply-add |")
    print("|---|---|---|---|---|---|")
    for dtype, (sets, operands, file, values) in TYPES.items():
        for vectors, pair in [(4, 1), (4, 2)]:
            for isa in sets:
                rows = ROWS[isa] if pair == 1 else 1
                loop = tile_loop(isa, operands, file, vectors, pair, rows)
                products = values * sum(map(multiplies, loop))
                plural = "s" if rows > 1 else ""
                shape = f"{rows} row{plural} x {vectors * pair} vectors"
                print(
                    f"| {dtype} | `{isa}` | {shape} | {len(loop)} | {products} "
                    f"| {len(loop) / products:.2f} |"
                )


if __name__ == "__main__":
    main()
