"""Builds fastrnn with each supported minor version of torch, and runs a short suite there.

    python tests/matrix.py            all of TORCH_VERSIONS
    python tests/matrix.py 2.6 2.9    these minor versions

Writes the rows of the table in docs/versions.md. One environment at a time is in build/matrix: with
the CUDA libraries that torch's wheels depend on it takes up to 6 GB.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
from toolchain import TORCH_VERSIONS  # noqa: E402

TABLE = ROOT / "docs" / "versions.md"
TOOLS = ["ninja>=1.11.1", "numpy>=1.26", "setuptools>=77.0.3"]
TOOLS += ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]
# Layers and cells, padded and packed, their gradients; torch.compile; torch.func; modules.
SUITE = [
    *("tests/test_layers.py::test_options", "tests/test_layers.py::test_packed"),
    *("tests/test_layers.py::test_cells", "tests/test_gradients.py::test_options"),
    *("tests/test_gradients.py::test_cells", "tests/test_gradients.py::test_gradgradcheck"),
    *("tests/test_compile.py", "tests/test_func.py", "tests/test_modules.py"),
]


def interpreter(version: str) -> str:
    """A Python of this minor version, in PATH or pyenv."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = shutil.which(f"python{version}")
    for path in [*([found] if found else []), *map(str, pyenv)]:
        if not subprocess.run([path, "-c", "import venv"], capture_output=True).returncode:
            return path
    raise SystemExit(f"matrix: no Python {version} in PATH or ~/.pyenv")


def run(*command: object, **environment: str) -> int:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}).returncode


def must(*command: object, **environment: str) -> None:
    if run(*command, **environment):
        raise SystemExit(f"matrix: failed: {' '.join(map(str, command))}")


def counts(report: Path) -> dict[str, int]:
    """The numbers of tests that passed, failed and were skipped, from pytest's XML report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def suite(python: Path, folder: str) -> dict[str, int]:
    """Builds fastrnn for this interpreter and its torch; returns the counts of the suite."""
    # A build for a GPU needs a toolkit that fits torch's.
    must(python, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace", FASTRNN_CUDA="0")
    report = Path(folder, "report.xml")
    options = ["-n", "auto", "--maxprocesses", "8", "-m", "not slow", f"--junitxml={report}"]
    # 1: tests have failed, which the row says.
    if run(python, "-m", "pytest", *options, *SUITE) > 1:
        raise SystemExit(f"matrix: pytest did not run with {python}")
    return counts(report)


def test(torch: str, version: str) -> dict[str, int]:
    """The counts of the suite in a new environment."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="matrix-", dir=ROOT / "build") as folder:
        must(interpreter(version), "-m", "venv", folder)
        python = Path(folder, "bin", "python")
        install = [python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install"]
        must(*install, "--quiet", "--no-compile", f"torch=={torch}", *TOOLS)
        return suite(python, folder)


def write_row(torch: str, python: str, found: dict[str, int]) -> None:
    """Replaces the row of this version of torch in the table."""
    minor = ".".join(torch.split(".")[:2])
    today = datetime.date.today().isoformat()
    row = " | ".join([torch, python, today, *map(str, found.values())])
    text, replaced = re.subn(
        rf"^\| {re.escape(minor)}\.\d+ \|.*$", f"| {row} |", TABLE.read_text(), flags=re.MULTILINE
    )
    if not replaced:
        raise SystemExit(f"matrix: {TABLE.relative_to(ROOT)} has no row for torch {minor}")
    TABLE.write_text(text)
    print(f"matrix: | {row} |", flush=True)


def main(minors: list[str]) -> None:
    chosen = {
        t: p for t, p in TORCH_VERSIONS.items() if not minors or t.rpartition(".")[0] in minors
    }
    if len(chosen) < len(minors):
        raise SystemExit(f"matrix: expected minor versions among {', '.join(TORCH_VERSIONS)}")
    failed = 0
    for torch, python in chosen.items():
        found = test(torch, python)
        write_row(torch, python, found)
        failed += found["failed"]
    if failed:
        raise SystemExit(f"matrix: {failed} tests failed")


if __name__ == "__main__":
    main(sys.argv[1:])
