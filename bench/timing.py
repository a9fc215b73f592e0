"""Times one row of bench/cpu.py: alternating blocks of its contestants in a process of its own.

`run` starts that process. In it each contestant's results are first compared with torch's in
float64. Then come rounds: in each, every contestant and a product of matrices run one block of
calls, in an order that changes from round to round. What is compared thus ran within a fraction of
a second, and the product says what the machine gave at that moment.
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

BLOCK = 0.01  # seconds that a block takes at least
# Between blocks: threads that wait for more work spin for some milliseconds before they sleep, and
# they must not do so beside the next contestant.
PAUSE = 0.01
BUDGET = 3.0  # seconds for the rounds of a row; where calls are long there are fewer rounds...
FEWEST = 3  # ...but never fewer than this
LOADED = 5  # times as many rounds beside processes that load the machine, where times differ most
LONG = 0.05  # a call of so many seconds needs no other before it: waking threads is nothing to it
LIMIT = 600  # seconds after which a row is given up
BUSY = "while True: pass"  # the program of a process that loads the machine
SQUARE = 1024  # rows and columns of the matrices that the peak is measured with


def cores() -> list[int]:
    """CPUs that this process may use, one a core."""
    found = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else cpu, cpu)
    return list(found.values())


def environment(threads: int) -> dict[str, str]:
    """What a row's process must find set before it imports anything."""
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
    # Inherited by the process. Some peers start as many threads as there are CPUs, whatever they
    # are told: with this, all have the same number of cores.
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
    """To the digits that mean something: the file of a full run is kept with the sources."""
    return float(f"{value:.4g}")


def seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, over a block of them."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def calls_of_a_block(call: Callable[[], object]) -> tuple[int, float]:
    """How many calls take BLOCK seconds, and what one takes."""
    calls = 1
    while True:
        a_call = seconds(call, calls)
        if a_call < LONG:
            # Again, and the faster counts: the first calls wake threads and find their memory.
            a_call = min(a_call, seconds(call, calls))
        if a_call * calls >= BLOCK:
            return calls, a_call
        calls = min(10 * calls, int(1.1 * BLOCK / a_call) + 1)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds a call in each round, and the calls of a block, of every contestant."""
    found: dict[str, dict[str, Any]] = {}
    a_call = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        number, a_call[name] = calls_of_a_block(call)
        found[name] = {"calls": number, "seconds": []}
    a_round = sum(found[name]["calls"] * a_call[name] for name in calls)
    names = list(calls)
    for number in range(max(FEWEST, min(rounds, int(BUDGET / a_round)))):
        # Each in turn begins, and comes after its other neighbour every second time.
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number % 2 == 0 else reversed(order):
            time.sleep(PAUSE)
            if a_call[name] < LONG:
                calls[name]()
            found[name]["seconds"].append(short(seconds(calls[name], found[name]["calls"])))
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, and as the spread the lower and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": short(median), "low": short(low), "high": short(high)}


def summary(case: Case, contestants: dict[str, dict[str, Any]], peak: list[float]) -> dict:
    """What is read off the times: ratios by round, since a round's times belong together."""
    ours = contestants["fastrnn"].get("seconds")
    if not ours:
        return {}
    ratios = {
        name: quartiles([theirs / own for theirs, own in zip(other["seconds"], ours, strict=True)])
        for name, other in contestants.items()
        if name != "fastrnn" and "seconds" in other
    }
    # The best of the rounds is the peak: others' work on the machine can only lower it.
    share = case.operations / statistics.median(ours) / max(peak)
    return {"ratio": ratios, "share": short(share)}


def product(threads: int) -> tuple[Callable[[], object], int]:
    """sgemm at its best: a call of it, and its operations. float32 whatever the row's dtype."""
    import torch

    a, b, c = (torch.randn(SQUARE, SQUARE) for _ in range(3))
    return lambda: torch.mm(a, b, out=c), 2 * SQUARE**3


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The row's contestants, each with its times or the reason why it has none."""
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
    # At once: some peers take a second to put their threads away.
    os._exit(0)
