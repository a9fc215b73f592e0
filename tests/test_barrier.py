"""The CPU kernels' thread barrier under ThreadSanitizer, in a program without torch."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.cpu("the barrier of CPU threads")]

ROOT = Path(__file__).parent.parent
REPORT = "ThreadSanitizer: data race"


def build(folder, change=None):
    """Builds the program and returns its path. `change` replaces one text in barrier.cpp."""
    text = (ROOT / "csrc/cpu/barrier.cpp").read_text()
    if change:
        assert text.count(change[0]) == 1
        text = text.replace(*change)
    source = folder / "barrier.cpp"
    source.write_text(text)
    program = folder / "threads"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-g", "-fopenmp", "-pthread"]
    command += ["-fsanitize=thread", "-Icsrc", "-Icsrc/cpu"]
    command += [str(source), "tests/barrier/threads.cpp"]
    subprocess.run([*command, "-o", str(program)], cwd=ROOT, check=True)
    return program


def run(program, threads, rounds):
    return subprocess.run(
        [str(program), str(threads), str(rounds)], capture_output=True, text=True, check=False
    )


def test_writes_are_visible_after_the_barrier(tmp_path):
    """With two threads, which spin, and with more threads than cores, which sleep."""
    program = build(tmp_path)
    for threads, rounds in [(1, 10), (2, 2000), (3, 300), (8, 100), (17, 30)]:
        result = run(program, threads, rounds)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("&arrived_, 1, __ATOMIC_ACQ_REL", "&arrived_, 1, __ATOMIC_RELAXED"),
        ("&arrived_, 1, __ATOMIC_ACQ_REL", "&arrived_, 1, __ATOMIC_ACQUIRE"),
        ("&epoch_, epoch + 1, __ATOMIC_SEQ_CST", "&epoch_, epoch + 1, __ATOMIC_RELAXED"),
    ],
    ids=["arrivals relaxed", "arrivals without release", "new epoch without release"],
)
def test_weaker_memory_order_is_reported(tmp_path, change):
    result = run(build(tmp_path, change), 3, 300)
    assert REPORT in result.stderr
