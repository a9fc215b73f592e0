"""Plants bugs in the CUDA kernels of one launch, one at a time, and sees each of them found.

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

# Which of check.py's cases see a bug of a file: those of one block for its folder, those of TF32
# for these files, and for the others those of the persistent kernels of 16 bits.
OF_COLUMNS = {
    "cuda/persistent/columns_backward.cuh",
    "cuda/persistent/columns_part.cuh",
    "cuda/persistent/register_columns.cuh",
    "cuda/common/bias_gradients.cuh",
}
PATHS = ["persistent", "one_block"]
# The file whose kernels they run.
KERNELS = {
    "persistent": "persistent/kernels_float16.cu",
    "one_block": "one_block/kernels_float16.cu",
    "tf32": "persistent/kernels_tf32.cu",
    "float32": "persistent/kernels_float32.cu",
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
        "cuda/persistent/forward.cuh",
        "            inputs.wait();\n            __syncthreads();\n",
        "            inputs.wait();\n",
    ),
    Bug(
        "a grid barrier is missing",
        "cuda/persistent/grid_barrier.cuh",
        "        if (blocks_ == 1) return;  // the",
        "        return;  // the",
    ),
    Bug(
        "the arrival is no release",
        "cuda/persistent/grid_barrier.cuh",
        "red.release.gpu.global",
        "red.relaxed.gpu.global",
    ),
    Bug(
        "the wait is no acquire",
        "cuda/persistent/grid_barrier.cuh",
        "ld.acquire.gpu.global",
        "ld.relaxed.gpu.global",
    ),
    Bug(
        "h has a single buffer",
        "cuda/persistent/forward.cuh",
        "exchange.of_step(step + 1)[Weights::index(row, part.unit(), width)] =",
        "exchange.of_step(step)[Weights::index(row, part.unit(), width)] =",
    ),
    Bug(
        "the prefetch has a single buffer",
        "cuda/persistent/forward.cuh",
        "prefetch(buffer ^ 1, step + last, last ? 0 : row0 + tile_rows);",
        "prefetch(buffer, step + last, last ? 0 : row0 + tile_rows);",
    ),
    Bug(
        "the prefetch is not waited for",
        "cuda/persistent/tile_prefetch.cuh",
        "cp.async.wait_all;",
        "",
    ),
    Bug(
        "the sums have a single buffer",
        "cuda/persistent/part.cuh",
        "return row / tile_rows % 2;",
        "return 0;",
    ),
    Bug(
        "the last unit is left out",
        "cuda/persistent/part.cuh",
        "unit_row_ = unit() < a.size.hidden ?",
        "unit_row_ = unit() < a.size.hidden - 1 ?",
    ),
    Bug(
        "the last weight of a row is left out",
        "cuda/persistent/forward.cuh",
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
        "cuda/persistent/forward.cuh",
        "out.store_output(d, a.size.output_stride, at, part.unit());",
        "",
    ),
    Bug(
        "a stale state",
        "cuda/persistent/forward.cuh",
        "                if constexpr (Cell::has_c) c_states[part.state_at(row)] = c;\n",
        "",
    ),
    Bug(
        "a swapped index",
        "cuda/persistent/forward.cuh",
        "((first + row) * G + gate) * H +",
        "((first + row) * G + (G - 1 - gate)) * H +",
    ),
    Bug(
        "the gradients of other gates",
        "cuda/persistent/backward.cuh",
        "widen(out[0].of_h(g))",
        "widen(out[0].dgates[g])",
        cells=("lstm", "gru"),
    ),
    Bug(
        "the last row's gradient does not pass through W_hh",
        "cuda/common/backward_steps.cuh",
        "if (row < rows_after) path",
        "if (row < rows_after - 1) path",
    ),
    Bug(
        "a row that joins takes another's state",
        "cuda/persistent/backward_elements.cuh",
        "b < before.count ? before.first + b : -1",
        "before.first + b",
    ),
    Bug(
        "one block: the barrier of a step is missing",
        "cuda/one_block/block.cuh",
        "        read_ = write_, write_ = read;\n        __syncthreads();\n",
        "        read_ = write_, write_ = read;\n",
    ),
    Bug(
        "one block: h has a single buffer",
        "cuda/one_block/block.cuh",
        "        read_ = write_, write_ = read;\n",
        "        read_ = write_;\n",
    ),
    Bug(
        "one block: the prefetch is not waited for",
        "cuda/one_block/pair_prefetch.cuh",
        "cp.async.wait_group 2;",
        "",
    ),
    Bug(
        "one block: too little is waited for",
        "cuda/one_block/pair_prefetch.cuh",
        "cp.async.wait_group 2;",
        "cp.async.wait_group 3;",
    ),
    Bug(
        "one block: the second unit is left out",
        "cuda/one_block/pair_prefetch.cuh",
        "            if (u < count_) row[first_ + u] = pair.of[u];",
        "            if (u < count_ - 1) row[first_ + u] = pair.of[u];",
    ),
    Bug(
        "one block: another row's sums",
        "cuda/one_block/register_units.cuh",
        "row = column / 2 + column % 2 * 4;",
        "row = column;",
    ),
    Bug(
        "one block: a row that joins takes zeros",
        "cuda/one_block/forward.cuh",
        "for (int buffer = 0; buffer < 2; ++buffer) {",
        "for (int buffer = 0; buffer < 1; ++buffer) {",
    ),
    Bug(
        "one block: the gradients of other gates",
        "cuda/one_block/backward.cuh",
        "{widen(out[0].of_h(g)), widen(out[1].of_h(g))}",
        "{widen(out[0].dgates[g]), widen(out[1].dgates[g])}",
        cells=("lstm", "gru"),
    ),
    Bug(
        "columns: the grid barrier is missing",
        "cuda/persistent/columns_backward.cuh",
        "[&](int step) { barrier.wait(step); }",
        "[](int) {}",
    ),
    Bug(
        "columns: the barrier before the cell is missing",
        "cuda/persistent/backward_elements.cuh",
        "        inputs.wait();\n        __syncthreads();\n",
        "        inputs.wait();\n",
        cases="tf32",
    ),
    Bug(
        "columns: the barrier before the product is missing",
        "cuda/persistent/columns_backward.cuh",
        "                    __syncthreads();\n",
        "",
    ),
    Bug(
        "columns: the sums have a single buffer",
        "cuda/persistent/columns_part.cuh",
        "((step & 1) * sources() + source)",
        "source",
    ),
    Bug(
        "columns: the last source is left out",
        "cuda/persistent/columns_part.cuh",
        "for (int i = sources(); i > 0; --i",
        "for (int i = sources(); i > 1; --i",
    ),
    Bug(
        "columns: the last row is left out",
        "cuda/persistent/columns_backward.cuh",
        "if (row < min(tile.rows, tile.row0 + rows_at_once))",
        "if (row < min(tile.rows - 1, tile.row0 + rows_at_once))",
    ),
    Bug(
        "columns: the gradients of other gates",
        "cuda/persistent/columns_backward.cuh",
        "operand<M>(out[0].of_h(g))",
        "operand<M>(out[0].dgates[g])",
        cells=("lstm", "gru"),
    ),
    Bug(
        "columns: a stale state",
        "cuda/persistent/backward_elements.cuh",
        "        if constexpr (Cell::has_c) dc_states[part.state_at(row)] = state.dc[0];\n",
        "",
        cases="tf32",
    ),
    Bug(
        "columns: another gate's weights",
        "cuda/persistent/columns_backward.cuh",
        "const int gate = k / units, row",
        "const int gate = G - 1 - k / units, row",
    ),
    Bug(
        "columns: another row's sums on the tensor cores",
        "cuda/persistent/register_columns.cuh",
        "row = column / 2 + column % 2 * 4;",
        "row = column;",
    ),
    Bug(
        "columns: another row's sums by multiply-adds",
        "cuda/persistent/register_columns.cuh",
        "upper ? low : high, 2)",
        "upper ? high : low, 2)",
        cases="float32",
    ),
    Bug(
        "columns: a step is left out of the biases' gradients",
        "cuda/persistent/columns_backward.cuh",
        "gradients.add(out);",
        "if (tile.step > 0) gradients.add(out);",
    ),
    Bug(
        "columns: the last block does not see the others' sums",
        "cuda/common/bias_gradients.cuh",
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
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, csrc)
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
        parts = [*changing, "common/store_offsets.cu", "common/plan.cpp", "own_cells.cpp"]
        parts += [f"{path}/{name}.cpp" for path in PATHS for name in ("plan", "launch")]
        sources = [csrc / "cuda" / name for name in parts] + [HERE / "library.cu"]
        objects = [where / f"{i}.o" for i in range(len(sources))]
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
            # The formulas of the cells are in the kernels of all: one will do.
            path = "one_block" if bug.file.startswith("cuda/one_block/") else "persistent"
            path = "tf32" if bug.file in OF_COLUMNS else path
            path = bug.cases or path
            name = KERNELS[path]
            compiled(changed / "cuda" / name, changed, place / "kernels.o")
            unchanged = [built for built, of in zip(right, changing, strict=True) if of != name]
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
