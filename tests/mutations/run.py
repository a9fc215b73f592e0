"""Mutation tests: injects bugs into the persistent CUDA kernels, one at a time; all must be found.

    python tests/mutations/run.py [--vgpu PROGRAM] [NAME...]

The script fails if no check finds a bug, or if a check fails without a bug. check.py compares a
forward and a backward pass with float64, under an emulated GPU that detects races, out-of-bounds
accesses and reads of uninitialized memory. Needs nvcc and torch.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-Xcompiler", "-fPIC", "-cudart", "shared", "-std=c++20", "-O3", "-lineinfo"]
FLAGS += ["-gencode", "arch=compute_90,code=compute_90"]
# Only check.py's cells, so that a kernel compiles in seconds; for most bugs only the first one.
CELLS = {"lstm": "X(lstm, ::fastrnn::Lstm)", "gru": "X(gru, ::fastrnn::Gru)"}

# The files whose bugs show in other cases of check.py than "persistent", and each case's kernels.
OF_ONE_BLOCK = {"cuda/one_block.cuh", "cuda/held.cuh", "cuda/ahead.cuh"}
OF_COLUMNS = {"cuda/persistent_columns.cuh", "cuda/columns.cuh", "cuda/bias_gradients.cuh"}
KERNELS = {
    "persistent": "persistent_float16.cu",
    "one_block": "one_block_float16.cu",
    "tf32": "persistent_tf32.cu",
    "float32": "persistent_float32.cu",
}


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # in csrc
    right: str  # the correct text, which occurs once
    wrong: str  # its replacement
    cases: str = ""  # check.py's cases, if not the file's
    cells: tuple[str, ...] = ("lstm",)  # the cells in which it shows


BUGS = [
    Bug(
        "a block barrier is missing",
        "cuda/persistent.cuh",
        "            inputs.arrived();\n            __syncthreads();\n",
        "            inputs.arrived();\n",
    ),
    Bug(
        "a grid barrier is missing",
        "cuda/grid_barrier.cuh",
        "        if (blocks_ == 1) return;  // the",
        "        return;  // the",
    ),
    Bug(
        "the arrival does not release",
        "cuda/grid_barrier.cuh",
        "red.release.gpu.global",
        "red.relaxed.gpu.global",
    ),
    Bug(
        "the wait does not acquire",
        "cuda/grid_barrier.cuh",
        "ld.acquire.gpu.global",
        "ld.relaxed.gpu.global",
    ),
    Bug(
        "h has a single buffer",
        "cuda/persistent.cuh",
        "exchange.of_step(step + 1)[Weights::place(row, part.unit(), width)] =",
        "exchange.of_step(step)[Weights::place(row, part.unit(), width)] =",
    ),
    Bug(
        "the prefetch has a single buffer",
        "cuda/persistent.cuh",
        "ask(turn ^ 1, step + last, last ? 0 : row0 + tile_rows);",
        "ask(turn, step + last, last ? 0 : row0 + tile_rows);",
    ),
    Bug(
        "the prefetch is not waited for",
        "cuda/tile_inputs.cuh",
        "cp.async.wait_all;",
        "",
    ),
    Bug(
        "the sums have a single buffer",
        "cuda/persistent_part.cuh",
        "return row / tile_rows % 2;",
        "return 0;",
    ),
    Bug(
        "the last unit is left out",
        "cuda/persistent_part.cuh",
        "unit_row_ = unit() < a.size.hidden ?",
        "unit_row_ = unit() < a.size.hidden - 1 ?",
    ),
    Bug(
        "the last weight of a row is left out",
        "cuda/persistent.cuh",
        "own < H ? H - k : 0",
        "own < H ? H - k - 1 : 0",
    ),
    Bug(
        "a wrong gate",
        "cells/lstm.h",
        "c = f * c_prev + i * g;",
        "c = f * c_prev + i * o;",
    ),
    Bug(
        "a missing write",
        "cuda/persistent.cuh",
        "out.put(d, a.size.output_stride, at, part.unit());",
        "",
    ),
    Bug(
        "a stale state",
        "cuda/persistent.cuh",
        "                if constexpr (Cell::has_c) c_states[part.state_at(row)] = c;\n",
        "",
    ),
    Bug(
        "a swapped index",
        "cuda/persistent.cuh",
        "((first + row) * G + gate) * H +",
        "((first + row) * G + (G - 1 - gate)) * H +",
    ),
    Bug(
        "the gradients of other gates",
        "cuda/persistent.cuh",
        "widen(out.of_h(g))",
        "widen(out.dgates[g])",
        cells=("lstm", "gru"),
    ),
    Bug(
        "a row that joins takes another's state",
        "cuda/persistent.cuh",
        "b < next.rows ? next.first + b : -1",
        "next.first + b",
    ),
    Bug(
        "one block: the barrier of a step is missing",
        "cuda/one_block.cuh",
        "        read_ = write_, write_ = read;\n        __syncthreads();\n",
        "        read_ = write_, write_ = read;\n",
    ),
    Bug(
        "one block: h has a single buffer",
        "cuda/one_block.cuh",
        "        read_ = write_, write_ = read;\n",
        "        read_ = write_;\n",
    ),
    Bug(
        "one block: the prefetch is not waited for",
        "cuda/ahead.cuh",
        "cp.async.wait_group 2;",
        "",
    ),
    Bug(
        "one block: the wait is one prefetch short",
        "cuda/ahead.cuh",
        "cp.async.wait_group 2;",
        "cp.async.wait_group 3;",
    ),
    Bug(
        "one block: the second unit is left out",
        "cuda/ahead.cuh",
        "            if (u < count_) row[first_ + u] = pair.of[u];",
        "            if (u < count_ - 1) row[first_ + u] = pair.of[u];",
    ),
    Bug(
        "one block: another row's sums",
        "cuda/held.cuh",
        "row = column / 2 + column % 2 * 4;",
        "row = column;",
    ),
    Bug(
        "one block: a row that joins takes zeros",
        "cuda/one_block.cuh",
        "for (int buffer = 0; buffer < 2; ++buffer) {",
        "for (int buffer = 0; buffer < 1; ++buffer) {",
    ),
    Bug(
        "one block: the gradients of other gates",
        "cuda/one_block.cuh",
        "{widen(out[0].of_h(g)), widen(out[1].of_h(g))}",
        "{widen(out[0].dgates[g]), widen(out[1].dgates[g])}",
        cells=("lstm", "gru"),
    ),
    Bug(
        "columns: the grid barrier is missing",
        "cuda/persistent_columns.cuh",
        "        barrier.wait(step);\n",
        "",
    ),
    Bug(
        "columns: the barrier before the cell is missing",
        "cuda/persistent_columns.cuh",
        "            __syncthreads();  // the operands have been read, too\n",
        "",
    ),
    Bug(
        "columns: the barrier before the product is missing",
        "cuda/persistent_columns.cuh",
        "            __syncthreads();\n            part.forget();\n            if (row0 < rows)",
        "            part.forget();\n            if (row0 < rows)",
    ),
    Bug(
        "columns: the sums have a single buffer",
        "cuda/persistent_columns.cuh",
        "((step & 1) * sources() + source)",
        "source",
    ),
    Bug(
        "columns: the last source is left out",
        "cuda/persistent_columns.cuh",
        "for (int i = sources(); i > 0; --i",
        "for (int i = sources(); i > 1; --i",
    ),
    Bug(
        "columns: the last row is left out",
        "cuda/persistent_columns.cuh",
        "if (row < min(rows, row0 + turn_rows))",
        "if (row < min(rows - 1, row0 + turn_rows))",
    ),
    Bug(
        "columns: the gradients of other gates",
        "cuda/persistent_columns.cuh",
        "operand<M>(out.of_h(g))",
        "operand<M>(out.dgates[g])",
        cells=("lstm", "gru"),
    ),
    Bug(
        "columns: a stale state",
        "cuda/persistent_columns.cuh",
        "                if constexpr (Cell::has_c) dc_states[part.state_at(row)] = dc;\n",
        "",
    ),
    Bug(
        "columns: another gate's weights",
        "cuda/persistent_columns.cuh",
        "const int gate = k / units, row",
        "const int gate = G - 1 - k / units, row",
    ),
    Bug(
        "columns: another row's sums on the tensor cores",
        "cuda/columns.cuh",
        "row = column / 2 + column % 2 * 4;",
        "row = column;",
    ),
    Bug(
        "columns: another row's sums by multiply-adds",
        "cuda/columns.cuh",
        "upper ? low : high, 2)",
        "upper ? high : low, 2)",
        cases="float32",
    ),
    Bug(
        "columns: a step is left out of the biases' gradients",
        "cuda/persistent_columns.cuh",
        "                gradients.add(out);\n",
        "                if (step > 0) gradients.add(out);\n",
    ),
    Bug(
        "columns: the last block does not see the others' sums",
        "cuda/bias_gradients.cuh",
        "atom.acq_rel.gpu.global",
        "atom.relaxed.gpu.global",
    ),
]


def call(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )


def compiled(source: Path, csrc: Path, to: Path) -> None:
    done = call(["nvcc", *FLAGS, "-I", csrc, "-c", source, "-o", to])
    if done.returncode:
        raise SystemExit(f"{source} does not compile:\n{done.stderr}")


def copied(to: Path, cells: Iterable[str]) -> Path:
    """Copies the CUDA sources; the copy's registry has only these cells."""
    csrc = to / "csrc"
    shutil.copytree(ROOT / "csrc/cells", csrc / "cells")
    shutil.copytree(ROOT / "csrc/cuda", csrc / "cuda")
    shutil.copy(ROOT / "csrc/layer.h", csrc)
    registry = csrc / "cells/registry.h"
    text = registry.read_text()
    start = text.index("#define FASTRNN_FOR_EACH_CELL")
    end = start
    while text[text.index("\n", end) - 1] == "\\":
        end = text.index("\n", end) + 1
    listed = f"#define FASTRNN_FOR_EACH_CELL(X) {' '.join(CELLS[cell] for cell in cells)}\n"
    registry.write_text(text[:start] + listed + text[text.index("\n", end) + 1 :])
    return csrc


def library(kernels: list[Path], others: list[Path], to: Path) -> Path:
    done = call(["nvcc", "-shared", *FLAGS, *kernels, *others, "-o", to])
    if done.returncode:
        raise SystemExit(f"{to} does not link:\n{done.stderr}")
    return to


def verdict(vgpu: Path, built: Path, *which: str) -> str:
    """check.py's result for a library under the race check: "right" or the error."""
    command = [vgpu, "run", "--race-check", "--", sys.executable, HERE / "check.py", built, *which]
    # A kernel runs for about a second, so optimizing its translation does not pay.
    done = call(command, timeout=900, env={"VGPU_OPT": "-O0", **os.environ})
    if done.returncode == 0 and done.stdout.strip().endswith("right"):
        return "right"
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next((line for line in lines if "race" in line or "off by" in line), lines[-1])[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vgpu", type=Path, default=ROOT / "tests/vgpu/vgpu")
    parser.add_argument("names", nargs="*", help="of bugs; all if none is given")
    args = parser.parse_args()
    bugs = [bug for bug in BUGS if not args.names or bug.name in args.names]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        csrc = copied(where / "right", CELLS)
        changing = list(KERNELS.values())
        parts = [*changing, "offsets.cu", "plan.cpp", "persistent.cpp"]
        sources = [csrc / "cuda" / name for name in parts] + [HERE / "library.cu"]
        objects = [where / f"{source.name}.o" for source in sources]
        right, others = objects[: len(changing)], objects[len(changing) :]

        def one(bug: Bug | None) -> str:
            if bug is None:
                return verdict(args.vgpu, library(right, others, where / "right.so"))
            place = where / bug.name.replace(" ", "-")
            changed = copied(place, bug.cells)
            file = changed / bug.file
            text = file.read_text()
            if bug.right not in text:
                raise SystemExit(f"'{bug.name}': {bug.file} does not contain\n{bug.right}")
            file.write_text(text.replace(bug.right, bug.wrong, 1))
            # A cell's formulas are in all kernels; testing one of them is enough.
            path = "one_block" if bug.file in OF_ONE_BLOCK else "persistent"
            path = "tf32" if bug.file in OF_COLUMNS else path
            path = bug.cases or path
            name = KERNELS[path]
            compiled(changed / "cuda" / name, changed, place / "kernels.o")
            unchanged = [built for built in right if built.name != f"{name}.o"]
            built = library([place / "kernels.o", *unchanged], others, place / "all.so")
            return verdict(args.vgpu, built, "--cells", *bug.cells, "--cases", path)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(compiled, sources, [csrc] * len(sources), objects))
            found = list(pool.map(one, [None, *bugs]))
    print(f"without a bug: {found[0]}")
    for bug, what in zip(bugs, found[1:], strict=True):
        print(f"{bug.name}: {'NOT FOUND' if what == 'right' else what}")
    if found[0] != "right" or "right" in found[1:]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
