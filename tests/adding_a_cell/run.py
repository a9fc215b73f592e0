"""Tests docs/adding-a-cell.md: makes its three edits in a copy, builds it, runs the cell's tests.

    python tests/adding_a_cell/run.py

The copy is the source distribution, so this also tests that it builds. Takes as long as a build
from scratch. The other files of this folder are the edits; the page must quote them verbatim.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LINE = "    X(mgu, ::fastrnn::Mgu)"
# The tests of the cell, and tests that loop over all cells.
TESTS = "mgu or same_cells or fake_kernels"


def insert_after(path: Path, marker: str, text: str) -> None:
    """Inserts `text` after the line that contains `marker`."""
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if marker in line)
    path.write_text(
        "\n".join([*lines[: place + 1], *text.splitlines(), *lines[place + 1 :]]) + "\n"
    )


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


def source_distribution(folder: Path) -> Path:
    """Builds and unpacks the source distribution in the folder; returns its top folder."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    (archive,) = folder.glob("fastrnn-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def edit(copy: Path) -> None:
    """Makes the three edits."""
    shutil.copy(HERE / "mgu.h", copy / "csrc/cells")
    registry = copy / "csrc/cells/registry.h"
    insert_after(registry, '#include "lstm.h"', '#include "mgu.h"')
    insert_after(registry, "X(gru, ::fastrnn::Gru)", LINE + " \\")
    reference = copy / "fastrnn/reference.py"
    text, function = reference.read_text(), (HERE / "reference_mgu.py").read_text()
    reference.write_text(
        text.replace("@_cell\ndef rnn_tanh", f"{function}\n\n@_cell\ndef rnn_tanh")
    )


def main() -> None:
    check_quotes()
    with tempfile.TemporaryDirectory() as folder:
        copy = source_distribution(Path(folder).resolve())
        # The source distribution has no tests.
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignore, dirs_exist_ok=True)
        edit(copy)
        # The copy comes before the installed package. ninja is next to the interpreter.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PYTHONPATH": str(copy), "PATH": path}

        def run(*arguments: str) -> str:
            command = [sys.executable, *arguments]
            done = subprocess.run(
                command, cwd=copy, env=environment, stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{done.stdout}\n{' '.join(arguments)} failed")
            return done.stdout

        # Without optimization the build is quicker, and the test is the same.
        setup = copy / "setup.py"
        setup.write_text(setup.read_text().replace('"-O2"', '"-O0"'))
        # egg_info: fastrnn.__version__ is then the copy's, whether or not fastrnn is installed.
        run("setup.py", "--quiet", "egg_info", "build_ext", "--inplace")
        where = run("-c", "import fastrnn; print(fastrnn.__file__, 'mgu' in fastrnn.CELLS)").split()
        if not where[0].startswith(str(copy)) or where[1] != "True":
            raise SystemExit(f"another fastrnn than the copy was imported: {where}")
        # The best set stands for all sets that differ only in products of bfloat16.
        sets = run("-c", "import fastrnn; print(*fastrnn.build_info()['isa_supported'])").split()
        for isa in [*(s for s in sets[:-1] if s in ("generic", "avx2")), sets[-1]]:
            environment["FASTRNN_ISA"] = isa
            output = run("-m", "pytest", "tests/test_registry.py", "tests/test_ops.py", "-k", TESTS)
            passed = re.search(r"(\d+) passed", output)
            if not passed or int(passed.group(1)) < 10:
                raise SystemExit(f"no tests of the new cell were run:\n{output}")
            print(f"{isa}: {passed.group(0)}")


if __name__ == "__main__":
    main()
