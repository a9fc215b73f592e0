"""Checks what ptxas reports about the CUDA kernels: registers, spills, instructions.

    python tests/check_ptxas.py [--archs 80 90]

Compiles the .cu files in csrc/cuda and fails if
- a kernel spills registers or has a local array;
- a block of a kernel that runs all steps needs more registers than a multiprocessor has;
- such a kernel for a 16-bit type or TF32 has no tensor core instruction;
- such a kernel has no 16-byte load for the operands of its products.

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


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    spilled: int
    threads: int  # of the largest block, by its launch bounds; 0 without any

    @property
    def runs_all_steps(self) -> bool:
        return "persistent_" in self.name or "one_block_" in self.name

    @property
    def multiplied(self) -> str:
        """The operand type of the products of a kernel that runs all steps."""
        found = re.search(r", (?:\w+::)*(\w+)>\(", self.name)
        assert found, self.name
        return found.group(1)


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if not found:
        raise SystemExit("no cuobjdump in PATH or in triton: install the CUDA toolkit's")
    return found


def launch_bounds(cubin: Path) -> dict[str, int]:
    """Threads per block by kernel name, for the kernels that have launch bounds."""
    found = {}
    for section in output([cuobjdump(), "-elf", str(cubin)]).split("\n.nv.info.")[1:]:
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x(\w+)", section)
        if bounds:
            found[demangled(section.partition("\n")[0].strip())] = int(bounds.group(1), 16)
    return found


def compiled(source: Path, arch: str, folder: Path) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels of a file for an architecture, and each one's SASS, by name."""
    cubin = folder / f"{source.parent.name}_{source.stem}_{arch}.cubin"
    report = output(["nvcc", *FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)])
    report = demangled(report)
    bounds = launch_bounds(cubin)
    kernels = []
    for block in report.split("Compiling entry function ")[1:]:
        name = re.match(r"'(.*?)' for", block)
        numbers = [
            re.search(pattern, block)
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill st")
        ]
        if not name or not all(numbers):
            raise SystemExit(f"ptxas's report on {source.name} is not understood:\n{block}")
        registers, stack, spilled = (int(n.group(1)) for n in numbers if n)
        threads = bounds.get(name.group(1), 0)
        kernels.append(Kernel(arch, name.group(1), registers, stack, spilled, threads))
    parts = demangled(output([cuobjdump(), "-sass", str(cubin)])).split("Function : ")[1:]
    return kernels, {part.partition("\n")[0].strip(): part for part in parts}


def faults(kernel: Kernel, instructions: str) -> list[str]:
    found = []
    if kernel.spilled or re.search(r"\b(STL|LDL)\b", instructions):
        found.append("spills registers")
    if kernel.runs_all_steps:
        if not kernel.threads:
            found.append("has no launch bounds")
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
        jobs = [(source, arch) for source in sorted(CUDA.rglob("*.cu")) for arch in args.archs]
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
