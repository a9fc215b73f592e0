"""Times one row of bench/cpu.py: alternating blocks of its contestants in a process of its own.

`run` starts that process. It first compares each contestant's results with torch's in float64.
Then, in each round, every contestant and a matrix product (sgemm) run one block of calls, in an
order that changes from round to round. So the times that are compared were taken within a fraction
of a second, and sgemm's shows how fast the machine was at that moment.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case

BLOCK = 0.01  # least seconds of a block
# Seconds between blocks: threads that wait for work spin for some milliseconds before they sleep,
# and must not do so while the next contestant runs.
PAUSE = 0.01
BUDGET = 3.0  # seconds for the rounds of a row; long calls get fewer rounds...
FEWEST = 3  # ...but at least this many
LOADED = 5  # times as many rounds when other processes load the machine: times vary most there
LONG = 0.05  # seconds of a call that needs no warm-up: waking threads is negligible
LIMIT = 600  # seconds until a row is given up
BUSY = "while True: pass"  # the program of the processes that load the machine
SQUARE = 1024  # rows and columns of the matrices of sgemm


def cores() -> list[int]:
    """The CPUs that this process may use, one per core."""
    found = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else cpu, cpu)
    return list(found.values())


def environment(threads: int) -> dict[str, str]:
    """The environment of a row's process: read when the packages are imported."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which no contestant computes with
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def run(case: Case, rounds: int) -> dict[str, Any]:
    """The results of one row, from a process of its own; `error` says why there are none."""
    row = {"key": case.key, **case.to_json(), "operations": case.operations}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(case.to_json()), str(rounds)]
    began = time.perf_counter()
    allowed = os.sched_getaffinity(0)
    # The process inherits it. Some peers start as many threads as there are CPUs, whatever their
    # settings: so all have the same number of cores.
    os.sched_setaffinity(0, cores()[: case.threads])
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(case.beside)]
    try:
        done = subprocess.run(
            command,
            env=environment(case.threads),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            row["error"] = f"exit status {done.returncode}: {last}"
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row["error"] = f"took more than {LIMIT} s"
    finally:
        for other in others:
            other.kill()
            other.wait()
        os.sched_setaffinity(0, allowed)
    row["wall"] = round(time.perf_counter() - began, 2)
    return row


# --- in the row's process ------------------------------------------------------------------------


def short(value: float) -> float:
    """Rounded to four digits: the file of a full run is kept with the sources."""
    return float(f"{value:.4g}")


def seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds per call, over a block of calls."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def calls_of_a_block(call: Callable[[], object]) -> tuple[int, float]:
    """How many calls take BLOCK seconds, and the seconds of one call."""
    calls = 1
    while True:
        per_call = seconds(call, calls)
        if per_call < LONG:
            # Again, and the faster counts: the first calls wake threads and allocate memory.
            per_call = min(per_call, seconds(call, calls))
        if per_call * calls >= BLOCK:
            return calls, per_call
        calls = min(10 * calls, int(1.1 * BLOCK / per_call) + 1)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """For every contestant: seconds per call in each round, and the calls of a block."""
    found: dict[str, dict[str, Any]] = {}
    per_call = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        number, per_call[name] = calls_of_a_block(call)
        found[name] = {"calls": number, "seconds": []}
    per_round = sum(found[name]["calls"] * per_call[name] for name in calls)
    names = list(calls)
    for number in range(max(FEWEST, min(rounds, int(BUDGET / per_round)))):
        # Each contestant begins in turn; the order is reversed every second round.
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number % 2 == 0 else reversed(order):
            time.sleep(PAUSE)
            if per_call[name] < LONG:
                calls[name]()
            found[name]["seconds"].append(short(seconds(calls[name], found[name]["calls"])))
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    """The median, and the lower and upper quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": short(median), "low": short(low), "high": short(high)}


def summary(case: Case, contestants: dict[str, dict[str, Any]], peak: list[float]) -> dict:
    """The ratios, taken within each round, and the share of the peak."""
    ours = contestants["fastrnn"].get("seconds")
    if not ours:
        return {}
    ratios = {
        name: quartiles([theirs / own for theirs, own in zip(other["seconds"], ours, strict=True)])
        for name, other in contestants.items()
        if name != "fastrnn" and "seconds" in other
    }
    # The best of the rounds is the peak: other load on the machine can only lower it.
    share = case.operations / statistics.median(ours) / max(peak)
    return {"ratio": ratios, "share": short(share)}


def product(threads: int) -> tuple[Callable[[], object], int]:
    """A call of sgemm, and its operations. float32 whatever the row's dtype."""
    import torch

    a, b, c = (torch.randn(SQUARE, SQUARE) for _ in range(3))
    return lambda: torch.mm(a, b, out=c), 2 * SQUARE**3


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The row's contestants, each with its times or the reason why there are none."""
    import torch
    from contestants import contestants

    torch.set_num_threads(case.threads)
    found: dict[str, dict[str, Any]] = {}
    calls = {}
    with torch.inference_mode(case.mode != "training"):
        for name, result in contestants(case):
            if isinstance(result, str):
                found[name] = {"reason": result}
            else:
                calls[name] = result
        call, operations = product(case.threads)
        times = timed({**calls, "sgemm": call}, rounds * (LOADED if case.beside else 1))
    peak = [short(operations / value) for value in times.pop("sgemm")["seconds"]]
    found |= times
    return {"contestants": found, "peak": peak, **summary(case, found, peak)}


if __name__ == "__main__":
    found = measure(Case.from_json(json.loads(sys.argv[1])), int(sys.argv[2]))
    print(json.dumps(found), flush=True)
    # Without cleaning up: some peers take a second to end their threads.
    os._exit(0)
