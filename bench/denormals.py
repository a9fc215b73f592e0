"""Times layers whose state is subnormal against the same layers with a normal state.

    python bench/denormals.py [--json bench/results/denormals.json]

The input is zero and the gates keep nearly all of the state. Started at 1e-39 it stays subnormal
(below 1.2e-38) for all T steps, and many CPUs multiply such numbers in microcode. All biases but
the gate's are zero, so that all other sums of a step are subnormal too. A ratio compares a layer
with itself, by round: above 1 its subnormal numbers cost time. fastrnn's kernels take them as
zeros.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import machine, save, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import quartiles, timed
from torch import nn

import fastrnn

T = 100
SIZES = [(1, 256), (16, 256), (16, 64)]  # B, H; I = H
CELLS = ["LSTM", "GRU", "RNN"]
MODES = ["inference", "training"]
CONTESTANTS = ["fastrnn", "torch"]
STATES = {"subnormal": 1e-39, "normal": 0.1}
KEPT = 0.998  # share of the state that a step keeps: 0.8 of it is left after T steps


def decaying(cell: str, H: int) -> nn.RNNBase:
    """torch's layer, in which a step multiplies a small state by KEPT if the input is zero."""
    layer = getattr(nn, cell)(H, H)
    open_gate = torch.tensor(KEPT / (1 - KEPT)).log()
    with torch.no_grad():
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.zero_()
        if cell == "RNN":
            layer.weight_hh_l0.copy_(KEPT * nn.init.orthogonal_(torch.empty(H, H)))
        else:
            layer.bias_ih_l0[H : 2 * H] = open_gate  # forget gate, or z
            layer.weight_hh_l0 *= 0.01  # or what h adds to the state would make it grow
    return layer


def started_at(layer: nn.RNNBase, B: int, value: float) -> Any:
    """h0, or (h0, c0), of elements of that size."""
    h = value * torch.randn(1, B, layer.hidden_size).sign()
    return (h, h) if isinstance(layer, nn.LSTM) else h


def call_of(layer: nn.RNNBase, B: int, value: float, training: bool) -> Callable[[], object]:
    x, state = torch.zeros(T, B, layer.input_size), started_at(layer, B, value)

    def infer() -> object:
        with torch.inference_mode():
            return layer(x, state)

    def train() -> None:
        layer.zero_grad()
        layer(x, state)[0].sum().backward()

    return train if training else infer


def measure(cell: str, mode: str, B: int, H: int, rounds: int) -> dict[str, Any]:
    theirs = decaying(cell, H)
    ours = getattr(fastrnn, cell)(H, H)
    ours.load_state_dict(theirs.state_dict())
    calls = {
        f"{name}, {state}": call_of(layer, B, value, mode == "training")
        for name, layer in zip(CONTESTANTS, [ours, theirs], strict=True)
        for state, value in STATES.items()
    }
    exact = copy.deepcopy(theirs).double()  # where nothing is subnormal
    state = started_at(exact, B, STATES["subnormal"])
    state = tuple(s.double() for s in state) if isinstance(state, tuple) else state.double()
    last = exact(torch.zeros(T, B, H, dtype=torch.float64), state)[0][-1].abs()
    if not 1e-42 < last.median() < last.max() < torch.finfo(torch.float32).tiny:
        raise SystemExit(f"{cell}: the state that should be subnormal is {last.max():.1e}")
    times = timed(calls, rounds)
    row = {"cell": cell, "mode": mode, "T": T, "B": B, "H": H, "contestants": times}
    for name in CONTESTANTS:
        slow, fast = (times[f"{name}, {state}"]["seconds"] for state in STATES)
        row[name] = quartiles([a / b for a, b in zip(slow, fast, strict=True)])
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="time with a subnormal state / time with a normal one (quartiles)")
    for name in ["cell", "mode"]:
        shown.add_column(name)
    for name in ["B", "H", *CONTESTANTS]:
        shown.add_column(name, justify="right")
    for row in rows:
        ratios = ["{median:.2f} ({low:.2f}-{high:.2f})".format(**row[name]) for name in CONTESTANTS]
        shown.add_row(row["cell"], row["mode"], str(row["B"]), str(row["H"]), *ratios)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=7, help="at most this many (7)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    cases = [(cell, mode, B, H) for mode in MODES for cell in CELLS for B, H in SIZES]
    console = Console(stderr=True)
    rows = [measure(*case, args.rounds) for case in track(cases, console=console)]
    Console().print(table(rows))
    if args.json:
        save(args.json, {"machine": machine(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
