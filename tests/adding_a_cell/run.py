"""Tests docs/adding-a-cell.md: makes its three edits in a copy, builds it, runs the cell's tests.

    python tests/adding_a_cell/run.py           the CPU, with every instruction set
    python tests/adding_a_cell/run.py --cuda    a GPU, or the virtual one where there is none

Takes as long as a build from scratch; --cuda needs nvcc, and a torch with CUDA. The other files of
this folder are the edits; the page must quote them verbatim.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from edited_copy import ROOT, Copy

HERE = Path(__file__).parent
LINE = "    X(mgu, ::fastrnn::Mgu)"
# The tests of the cell, and tests that loop over all cells.
TESTS = "mgu or same_cells or fake_kernels"


def check_quotes() -> None:
    """The page quotes the current files of this folder."""
    page = (ROOT / "docs/adding-a-cell.md").read_text()
    header = (HERE / "mgu.h").read_text()
    struct = header[header.index("struct Mgu") : header.index("}  // namespace")].strip()
    for name, text in [
        ("mgu.h", struct),
        ("reference_mgu.py", (HERE / "reference_mgu.py").read_text().strip()),
        ("LINE of run.py", LINE),
    ]:
        if text not in page:
            raise SystemExit(f"docs/adding-a-cell.md does not quote {name} verbatim")


def edit(copy: Copy) -> None:
    """Makes the three edits."""
    shutil.copy(HERE / "mgu.h", copy.root / "csrc/cells")
    registry = "csrc/cells/registry.h"
    copy.replace(registry, '#include "lstm.h"\n', '#include "lstm.h"\n#include "mgu.h"\n')
    line = "    X(gru, ::fastrnn::Gru)"
    copy.replace(registry, line, f"{line} \\\n{LINE}")
    function = (HERE / "reference_mgu.py").read_text()
    before = "@_cell\ndef rnn_tanh"
    copy.replace("fastrnn/reference.py", before, f"{function}\n\n{before}")


def test_on_the_gpu(copy: Copy) -> None:
    """The tests of the cell with --device cuda: every path, in all dtypes."""
    gpu = shutil.which("nvidia-smi")
    real = gpu and not subprocess.run([gpu, "-L"], check=False).returncode
    copy.environment |= {"FASTRNN_CUDA": "1", "FASTRNN_ISAS": "generic"}  # few CPU kernels
    prefix = () if real else (str(ROOT / "tests/vgpu/vgpu"), "run", "--")
    if not real:
        copy.environment["TORCH_CUDA_ARCH_LIST"] = "9.0+PTX"
    copy.build()
    options = ("--device", "cuda", "-n", "2", "tests/test_registry.py")
    print(f"cuda: {copy.test(*options, '-k', 'mgu', at_least=30, prefix=prefix)}")


def main() -> None:
    check_quotes()
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder)
        edit(copy)
        if "--cuda" in sys.argv[1:]:
            test_on_the_gpu(copy)
            return
        copy.build()
        # The best set stands for all sets that differ only in products of bfloat16.
        isas = "import fastrnn; print(*fastrnn.build_info()['isa_supported'])"
        sets = copy.run("-c", isas).split()
        files = ("tests/test_registry.py", "tests/test_ops.py")
        for isa in [*(s for s in sets[:-1] if s in ("generic", "avx2")), sets[-1]]:
            copy.environment["FASTRNN_ISA"] = isa
            print(f"{isa}: {copy.test(*files, '-k', TESTS, at_least=10)}")


if __name__ == "__main__":
    main()
