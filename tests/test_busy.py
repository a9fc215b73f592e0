"""Fewer threads while other processes are busy, and where the process has fewer cores."""

import concurrent.futures
import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, flat, pair

import fastrnn

pytestmark = [pytest.mark.once, pytest.mark.cpu("about CPU threads")]

ROOT = Path(__file__).parent.parent
NO_QUOTA = 2**31 - 1
SLICE = 4_000_000  # ns that a thread waits for its core
LENGTHS = [20_000, 500_000, 3_000_000, 40_000_000]  # ns of a run on one thread


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("busy") / "rule.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-fopenmp"]
    command += ["-Icsrc", "-Icsrc/cpu", "tests/busy/rule.cpp"]
    command += [f"csrc/cpu/{name}.cpp" for name in ("busy", "barrier", "cores")]
    subprocess.run([*command, "-o", str(path)], cwd=ROOT, check=True)
    found = ctypes.CDLL(str(path))
    found.make.restype = ctypes.c_void_p
    found.watches.restype = ctypes.c_bool
    return found


class Caller:
    """Runs of one length under the rule, in simulated time."""

    def __init__(self, library, length, most=2):
        self.library, self.length, self.most = library, length, most
        self.limit = ctypes.c_void_p(library.make())
        self.now = 0

    def run(self, lost):
        """One run that loses `lost(threads)` ns; returns its threads."""
        threads = self.library.next(self.limit, self.most)
        assert 1 <= threads <= self.most
        began, missing = self.now, lost(threads) if threads > 1 else 0
        watched = self.library.watches(self.limit, ctypes.c_int64(began))
        self.now += self.length // threads + missing
        times = (ctypes.c_int64(t) for t in (began, self.now, missing if watched else 0))
        self.library.ran(self.limit, threads, *times)
        return threads

    def runs(self, count, lost):
        return [self.run(lost) for _ in range(count)]

    def whole(self, count):
        """The number of runs that count as so many."""
        return round(count * max(1, 2 * 1_000_000 / self.length))


def never(threads):
    return 0


@pytest.fixture(params=LENGTHS)
def caller(request, library):
    made = Caller(library, request.param)
    yield made
    library.destroy(made.limit)


def test_quiet_machine(caller):
    assert set(caller.runs(1000, never)) == {2}


def test_one_time_slice_now_and_then(caller):
    """Other processes run for a moment on any machine."""
    for _ in range(20):
        assert caller.run(lambda threads: 5 * SLICE) == 2
        assert set(caller.runs(caller.whole(20), never)) == {2}


def test_busy_machine(caller):
    lost = 5 * SLICE + 2 * caller.length
    first = caller.runs(20, lambda threads: lost)
    assert first[0] == 2
    assert 1 in first
    # Few runs try two threads.
    later = caller.runs(caller.whole(1000), lambda threads: lost)
    assert 0 < later.count(2) <= len(later) / 40


def test_all_threads_are_used_again_after_the_load(caller):
    lost = 5 * SLICE + 2 * caller.length
    caller.runs(caller.whole(1000), lambda threads: lost)
    caller.runs(caller.whole(70), never)
    assert set(caller.runs(1000, never)) == {2}


def test_small_losses_are_less_than_one_thread_would_lose(caller):
    assert set(caller.runs(1000, lambda threads: caller.length // 5)) == {2}


def test_short_runs_on_a_quiet_machine_read_no_clock_of_a_thread(library):
    caller = Caller(library, 500_000)
    for _ in range(100):
        assert not library.watches(caller.limit, ctypes.c_int64(caller.now))
        caller.run(never)


@pytest.mark.parametrize("busy", [1, 3, 7])
def test_many_threads_leave_the_busy_cores(busy, library):
    """On 8 cores, of which some are busy."""
    caller = Caller(library, 8_000_000, most=8)

    def lost(threads):
        return 5 * SLICE if threads > 8 - busy else 0

    caller.runs(300, lost)
    later = caller.runs(1000, lost)
    fitting = sum(threads <= 8 - busy for threads in later)
    assert fitting > 0.95 * len(later)
    assert sum(later) / len(later) > 0.6 * (8 - busy)
    caller.runs(300, never)
    assert set(caller.runs(100, never)) == {8}


def test_number_of_threads_that_changes(library):
    caller = Caller(library, 3_000_000)
    for most in [8, 1, 2, 5] * 50:
        caller.most = most
        caller.run(lambda threads: 5 * SLICE)  # asserts that there are from 1 to `most`


# --- cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, NO_QUOTA),
        ("0::/\n", {"cpu.max": "max 100000\n"}, NO_QUOTA),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 1),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "5:memory:/m\n4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "1e5"},
            3,
        ),
        (
            "4:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            NO_QUOTA,
        ),
        ("2:cpuacct:/\n", {"cpuacct/cpu.cfs_quota_us": "100000"}, NO_QUOTA),
        ("", {}, NO_QUOTA),
        ("nonsense\n0::/\n", {"cpu.max": "nonsense"}, NO_QUOTA),
    ],
)
def test_quota(groups, files, cores, library, tmp_path):
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "cgroup").write_text(groups)
    given = [str(tmp_path / name).encode() for name in ("cgroup", "root")]
    assert library.quota(*given) == cores


def run_script(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_more_threads_than_cores():
    """On one core no team of threads is entered: OpenMP starts none."""
    shown = run_script(
        """
        import os, torch, fastrnn
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(3)
        layer, x = fastrnn.LSTM(64, 512), torch.randn(100, 16, 64)
        before = os.listdir("/proc/self/task")
        with torch.no_grad():
            results = [layer(x)[0]]
        assert os.listdir("/proc/self/task") == before
        fastrnn.explain(layer, x)
        fastrnn._C.adapt_threads(False)
        fastrnn.explain(layer, x)
        with torch.no_grad():
            results.append(layer(x)[0])
        assert len(os.listdir("/proc/self/task")) == len(before) + 2
        assert torch.equal(*results)
        assert torch.get_num_threads() == 3
        """,
        OMP_NUM_THREADS="3",
    )
    partitions = [line for line in shown.splitlines() if "partition" in line]
    assert [line.split()[1] for line in partitions] == ["1", "1", "3", "3"]


# --- results --------------------------------------------------------------------------------------


@pytest.fixture
def busy_machine():
    """As many other processes as twice the cores, and calls that adapt to them."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(2 * len(os.sched_getaffinity(0)))]
    fastrnn._C.adapt_threads(True)
    yield
    fastrnn._C.adapt_threads(False)
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.parametrize("kind", LAYERS)
def test_same_bits_on_a_busy_machine(kind, busy_machine):
    layer, _ = pair(kind, 64, 200, bidirectional=True)
    inputs = [torch.randn(12, batch, 64) for batch in (1, 4, 17, 40)]

    def results(x):
        outputs = flat(layer(x))
        loss = sum(t.square().sum() for t in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(layer.parameters()))]

    torch.set_num_threads(1)
    expected = [results(x) for x in inputs]
    torch.set_num_threads(2)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for found, right in zip(pool.map(results, 10 * inputs), 10 * expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
