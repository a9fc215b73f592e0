"""A copy of the project with edits: for the scripts that prove what an addition takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Copy:
    """The source distribution, unpacked in a folder, with the tests.

    So a script that builds it also tests that the source distribution builds.
    """

    def __init__(self, folder: str) -> None:
        top = Path(folder).resolve()
        command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(top)]
        subprocess.run(command, cwd=ROOT, check=True)
        (archive,) = top.glob("fastrnn-*.tar.gz")
        shutil.unpack_archive(archive, top)
        self.root = top / archive.name.removesuffix(".tar.gz")
        # The source distribution has no tests.
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", self.root / "tests", ignore=ignore, dirs_exist_ok=True)
        # The copy comes before the installed package. ninja is next to the interpreter.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PYTHONPATH": str(self.root), "PATH": path}

    def replace(self, file: str, old: str, new: str) -> None:
        """Replaces the one place in a file that has the text `old`."""
        path = self.root / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file} has {text.count(old)} places with {old!r}, expected 1")
        path.write_text(text.replace(old, new))

    def run(self, *arguments: str, prefix: Sequence[str] = ()) -> str:
        """Runs Python in the copy, by the command `prefix`, and returns what it prints."""
        done = subprocess.run(
            [*prefix, sys.executable, *arguments],
            cwd=self.root, env=self.environment, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{' '.join(arguments)} failed")
        return done.stdout

    def build(self) -> None:
        # Without optimization the build is quicker, and the test is the same.
        self.environment["CXXFLAGS"] = "-O0"
        # egg_info: fastrnn.__version__ is then the copy's, whether or not fastrnn is installed.
        self.run("setup.py", "--quiet", "egg_info", "build_ext", "--inplace")
        where = self.run("-c", "import fastrnn; print(fastrnn.__file__)").strip()
        if not where.startswith(str(self.root)):
            raise SystemExit(f"another fastrnn than the copy was imported: {where}")

    def test(self, *arguments: str, at_least: int, prefix: Sequence[str] = ()) -> str:
        """Runs pytest in the copy and returns how many tests passed, as in "12 passed"."""
        output = self.run("-m", "pytest", *arguments, prefix=prefix)
        passed = re.search(r"(\d+) passed", output)
        if not passed or int(passed.group(1)) < at_least:
            raise SystemExit(f"fewer than {at_least} tests were run:\n{output}")
        return passed.group(0)
