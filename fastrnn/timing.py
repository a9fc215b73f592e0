"""Times calls in alternating blocks, for `python -m fastrnn bench` and the scripts in bench/.

In each round every contestant runs one block of calls, in an order that changes from round to
round. So the times that are compared were taken within a fraction of a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BLOCK = 0.01  # least seconds of a block
# Seconds between blocks: threads that wait for work spin for some milliseconds before they sleep,
# and must not do so while the next contestant runs.
PAUSE = 0.01
BUDGET = 3.0  # seconds for the rounds; long calls get fewer rounds...
FEWEST = 3  # ...but at least this many
LONG = 0.05  # seconds of a call that needs no warm-up: waking threads is negligible
SQUARE = 1024  # rows and columns of the matrices of sgemm

Calls = dict[str, Callable[[], object]]


def short(value: float) -> float:
    """Rounded to four digits: the file of a full run is kept with the sources."""
    return float(f"{value:.4g}")


def quartiles(values: list[float]) -> dict[str, float]:
    """The median, and the lower and upper quartiles, of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": short(median), "low": short(low), "high": short(high)}


def seconds(call: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Seconds per call, over a block of calls, until the device has finished them."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def calls_of_a_block(call: Callable[[], object], device: str = "cpu") -> tuple[int, float]:
    """How many calls take BLOCK seconds, and the seconds of one call."""
    calls = 1
    while True:
        per_call = seconds(call, calls, device)
        if per_call < LONG:
            # Again, and the faster counts: the first calls wake threads and allocate memory.
            per_call = min(per_call, seconds(call, calls, device))
        if per_call * calls >= BLOCK:
            return calls, per_call
        calls = min(10 * calls, int(1.1 * BLOCK / per_call) + 1)


def order(names: list[str], number: int) -> list[str]:
    """The contestants of a round: each begins in turn, and every second round is reversed."""
    turn = number % len(names)
    rotated = names[turn:] + names[:turn]
    return rotated if number % 2 == 0 else rotated[::-1]


def timed(
    calls: Calls,
    rounds: int,
    *,
    budget: float = BUDGET,
    fewest: int = FEWEST,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """For every contestant: seconds per call in each round, and the calls of a block.

    Args:
        calls: the contestants by name.
        rounds: at most this many. None begins after `budget` seconds...
        fewest: ...but there are at least this many.
        device: "cpu" or "cuda", where the calls compute.
    """
    found: dict[str, dict[str, Any]] = {}
    per_call: dict[str, float] = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        number, per_call[name] = calls_of_a_block(call, device)
        found[name] = {"calls": number, "seconds": []}
    names = list(calls)
    began = time.perf_counter()
    for number in range(max(fewest, rounds)):
        if number >= fewest and time.perf_counter() - began > budget:
            break
        for name in order(names, number):
            time.sleep(PAUSE)
            if per_call[name] < LONG:
                seconds(calls[name], 1, device)
            found[name]["seconds"].append(short(seconds(calls[name], found[name]["calls"], device)))
    return found


def product(square: int = SQUARE, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """A call of sgemm, and its operations. float32 whatever the contestants' dtype."""
    a, b, c = (torch.randn(square, square, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=c), 2 * square**3
