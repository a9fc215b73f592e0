"""Checks what ptxas reports about the CUDA kernels: registers, spills, instructions.

    python tests/check_ptxas.py [--archs 80 90]

Compiles csrc/cuda/*.cu and fails if
- a kernel spills registers or has a local array;
- a block of a persistent kernel needs more registers than a multiprocessor has: all blocks of such
  a kernel must be resident at once;
- a persistent kernel for a 16-bit type or TF32 has no tensor core instruction;
- a persistent kernel has no 16-byte load for the operands of its products.

Needs nvcc, and cuobjdump in PATH or from the triton that comes with torch. Needs no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

CUDA = Path(__file__).parents[1] / "csrc/cuda"
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v"]
FILE = 65536  # registers per multiprocessor, since compute capability 3.5
# most_threads in csrc/cuda/persistent_kernel.h
THREADS = {"float": 256, "Tf32": 256, "__half": 512, "__nv_bfloat16": 512}
COLUMN_THREADS = 512  # column_threads in csrc/cuda/tiling.h
# The maximum of one_block_threads in csrc/cuda/one_block_kernel.h, by a cell's number of gates.
SMALL = {"Lstm": (192, 256), "Gru": (256, 256), "Rnn": (384, 512)}  # TF32, 16 bits


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    spilled: int

    @property
    def is_persistent(self) -> bool:
        """Whether one launch runs all steps."""
        return "persistent_" in self.name or "one_block_" in self.name

    @property
    def threads(self) -> int:
        """Threads in the largest block of a persistent kernel."""
        if "_columns<" in self.name:
            return COLUMN_THREADS
        if "one_block_" not in self.name:
            return THREADS[self.multiplied]
        cell = next(cell for cell in SMALL if f"::{cell}" in self.name)
        return SMALL[cell][self.multiplied != "Tf32"]

    @property
    def multiplied(self) -> str:
        """The operand type of a persistent kernel's products."""
        found = re.search(r", (?:\w+::)*(\w+)>\(", self.name)
        assert found, self.name
        return found.group(1)


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if not found:
        raise SystemExit("no cuobjdump in PATH or in triton: install the CUDA toolkit's")
    return found


def compiled(source: Path, arch: str, folder: Path) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels of a file for an architecture, and each one's SASS, by name."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    report = output(["nvcc", *FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)])
    report = subprocess.run(["c++filt"], input=report, capture_output=True, text=True).stdout
    kernels = []
    for block in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(.*?)' for", block)
        numbers = [
            re.search(pattern, block)
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill st")
        ]
        if not name or not all(numbers):
            raise SystemExit(f"ptxas's report on {source.name} is not understood:\n{block}")
        kernels.append(Kernel(arch, name.group(1), *(int(n.group(1)) for n in numbers if n)))
    sass = output([cuobjdump(), "-sass", str(cubin)])
    sass = subprocess.run(["c++filt"], input=sass, capture_output=True, text=True).stdout
    parts = sass.split("Function : ")[1:]
    return kernels, {part.partition("\n")[0].strip(): part for part in parts}


def faults(kernel: Kernel, instructions: str) -> list[str]:
    found = []
    if kernel.spilled or re.search(r"\b(STL|LDL)\b", instructions):
        found.append("spills registers")
    if kernel.is_persistent:
        if kernel.registers * kernel.threads > FILE:
            found.append(f"{kernel.threads} threads need more than {FILE} registers")
        if kernel.multiplied != "float" and "HMMA" not in instructions:
            found.append("does not use the tensor cores")
        # The operands come from global memory, or from shared memory if the block computed them.
        own = re.search("one_block_|_columns<", kernel.name)
        wide = r"LDS\.128" if own else r"LDG?\.E(\.\w+)*\.128"
        if not re.search(wide, instructions):
            found.append("loads no 16 bytes at a time")
    return found


def short(name: str) -> str:
    name = re.sub(r"fastrnn::|cuda::|\(anonymous namespace\)::|void ", "", name)
    return name.partition("(")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["80", "90"], help="such as 80 90")
    args = parser.parse_args()
    table = Table(title="ptxas")
    for column in ["kernel", "sm", "registers", "stack", "spilled", "faults"]:
        table.add_column(column)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [(source, arch) for source in sorted(CUDA.glob("*.cu")) for arch in args.archs]
        results = pool.map(lambda job: compiled(*job, Path(folder)), jobs)
        for kernels, instructions in results:
            for kernel in kernels:
                if kernel.name not in instructions:
                    raise SystemExit(f"cuobjdump shows no {kernel.name}")
                found = faults(kernel, instructions[kernel.name])
                wrong += bool(found)
                numbers = (kernel.registers, kernel.stack, kernel.spilled)
                table.add_row(short(kernel.name), kernel.arch, *map(str, numbers), ", ".join(found))
    Console(width=120).print(table)
    if not table.row_count or wrong:
        sys.exit(f"{wrong} of {table.row_count} kernels are not as meant")


if __name__ == "__main__":
    main()
