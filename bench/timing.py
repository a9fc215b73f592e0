"""Times one row of bench/cpu.py: alternating blocks of its contestants in a process of its own.

`run` starts that process. It first compares each contestant's results with torch's in float64.
Then blocks of their calls and of a matrix product (sgemm) alternate (fastrnn/timing.py). sgemm's
times show how fast the machine was at that moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import Case

from fastrnn.timing import Calls, product, quartiles, short, timed

LOADED = 5  # times as many rounds when other processes load the machine: times vary most there
LIMIT = 600  # seconds until a row is given up
# The program of the processes that load the machine.
BUSY = "print('busy', flush=True)\nwhile True: pass"


def measured(calls: Calls, rounds: int) -> dict[str, Any]:
    """The seconds of every call, fastrnn's speedup over each other, and the best rate of sgemm."""
    sgemm, operations = product()
    times = timed({**calls, "sgemm": sgemm}, rounds)
    peak = max(operations / value for value in times.pop("sgemm")["seconds"])
    seconds = {name: found["seconds"] for name, found in times.items()}
    own = seconds["fastrnn"]
    ratios = {
        name: quartiles([a / b for a, b in zip(values, own, strict=True)])
        for name, values in seconds.items()
        if name != "fastrnn"
    }
    return {"seconds": seconds, "ratio": ratios, "peak": peak}


#: The variables that limit fastrnn, torch, OpenVINO, JAX and TensorFlow to AVX2, on any CPU.
AVX2 = {
    "FASTRNN_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
}


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


@contextlib.contextmanager
def others(count: int, program: str = BUSY) -> Iterator[None]:
    """So many other processes, on one thread each, run the program, which prints "busy" first."""
    command = [sys.executable, "-c", program]
    started = [
        subprocess.Popen(command, env=environment(1), stdout=subprocess.PIPE) for _ in range(count)
    ]
    try:
        for process in started:
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def run(case: Case, rounds: int) -> dict[str, Any]:
    """The results of one row, from a process of its own; `error` says why there are none."""
    row = {"key": case.key, **case.to_json(), "operations": case.operations}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(case.to_json()), str(rounds)]
    began = time.perf_counter()
    allowed = os.sched_getaffinity(0)
    # The process inherits it. Some peers start as many threads as there are CPUs, whatever their
    # settings: so all have the same number of cores.
    os.sched_setaffinity(0, cores()[: case.threads])
    try:
        with others(case.beside):
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
        os.sched_setaffinity(0, allowed)
    row["wall"] = round(time.perf_counter() - began, 2)
    return row


# --- in the row's process ------------------------------------------------------------------------


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
        call, operations = product()
        times = timed({**calls, "sgemm": call}, rounds * (LOADED if case.beside else 1))
    peak = [short(operations / value) for value in times.pop("sgemm")["seconds"]]
    found |= times
    return {"contestants": found, "peak": peak, **summary(case, found, peak)}


if __name__ == "__main__":
    found = measure(Case.from_json(json.loads(sys.argv[1])), int(sys.argv[2]))
    print(json.dumps(found), flush=True)
    # Without cleaning up: some peers take a second to end their threads.
    os._exit(0)
