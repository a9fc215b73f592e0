"""The barrier of the CPU's threads under ThreadSanitizer: a program of its own, without torch."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.cpu("the barrier of CPU threads")]

ROOT = Path(__file__).parent.parent
REPORT = "ThreadSanitizer: data race"


def built(folder, change=None):
    """The program, with one text in barrier.cpp replaced."""
    text = (ROOT / "csrc/cpu/barrier.cpp").read_text().replace('"barrier.h"', '"cpu/barrier.h"')
    if change:
        assert text.count(change[0]) == 1
        text = text.replace(*change)
    source = folder / "barrier.cpp"
    source.write_text(text)
    program = folder / "threads"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-g", "-fopenmp", "-pthread"]
    command += ["-fsanitize=thread", "-Icsrc", str(source), "tests/barrier/threads.cpp"]
    subprocess.run([*command, "-o", str(program)], cwd=ROOT, check=True)
    return program


def ran(program, threads, rounds):
    return subprocess.run(
        [str(program), str(threads), str(rounds)], capture_output=True, text=True, check=False
    )


def test_all_writes_are_seen(tmp_path):
    """By two threads that spin, and by more than there are cores, which sleep."""
    program = built(tmp_path)
    for threads, rounds in [(1, 10), (2, 2000), (3, 300), (8, 100), (17, 30)]:
        result = ran(program, threads, rounds)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("&arrived_, 1, __ATOMIC_ACQ_REL", "&arrived_, 1, __ATOMIC_RELAXED"),
        ("&arrived_, 1, __ATOMIC_ACQ_REL", "&arrived_, 1, __ATOMIC_ACQUIRE"),
        ("&epoch_, epoch + 1, __ATOMIC_SEQ_CST", "&epoch_, epoch + 1, __ATOMIC_RELAXED"),
    ],
    ids=["nothing orders arrivals", "arrivals release nothing", "the new epoch releases nothing"],
)
def test_a_weaker_order_is_found(tmp_path, change):
    result = ran(built(tmp_path, change), 3, 300)
    assert REPORT in result.stderr
