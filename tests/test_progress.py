"""csrc/progress.py, which runs the steps of the Makefile."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]

PROGRAM = [sys.executable, str(Path(__file__).parent.parent / "csrc/progress.py")]


def step(log, script, **options):
    command = [*PROGRAM, str(log), "compiling", "sh", "-c", script]
    return subprocess.run(command, text=True, check=False, **options)


def test_step_is_a_line_and_its_output_is_in_the_log(tmp_path):
    log = tmp_path / "new/make.log"
    for word in ("first", "second"):
        result = step(log, f"echo {word}; echo error of {word} >&2", capture_output=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(r"compiling  \d+ s\n", result.stdout)
    text = log.read_text()
    assert text.index("\nfirst\n") < text.index("\nsecond\nerror of second\n")


def test_step_that_fails(tmp_path):
    log = tmp_path / "make.log"
    result = step(log, "for i in $(seq 100); do echo line $i; done; exit 3", capture_output=True)
    assert result.returncode == 3
    lines = result.stderr.splitlines()
    assert lines == [
        *(f"line {i}" for i in range(61, 101)),
        f"make: failed; all output is in {log}",
    ]


def test_log_that_cannot_be_written(tmp_path):
    (tmp_path / "build").write_text("a file")
    result = step(tmp_path / "build/make.log", "echo started", capture_output=True)
    assert result.returncode == 1
    assert result.stderr.startswith("make: can't write to ")
    assert result.stderr.count("\n") == 1
    assert "compiling" not in result.stdout


@pytest.mark.parametrize(
    ("output", "shown"),
    [("[3/4] c++ a.cpp", "3/4"), ("   ━━━ 9.0/12.0 MB 5.1 MB/s eta 0:00:01", "9.0/12.0 MB")],
)
def test_bar_on_a_terminal(output, shown, tmp_path):
    ours, theirs = pty.openpty()
    result = step(tmp_path / "log", f"echo '{output}'; sleep 1", stdout=theirs)
    os.close(theirs)
    drawn = os.read(ours, 100000).decode()
    assert result.returncode == 0
    assert re.search(rf"compiling  \d+ s  {'━' * 15} {{5}}  {shown}", drawn)
    assert re.search(r"\x1b\[Kcompiling  \d+ s\r\n$", drawn)
