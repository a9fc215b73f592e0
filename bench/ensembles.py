"""Times the models of an ensemble in one call of vmap against a Python loop over them.

    python bench/ensembles.py [--json bench/results/ensembles.json]

E = 8 models of torch.func.stack_module_state have the same input. The loops call fastrnn's modules
and torch.nn's; the loss is the output's mean square. Blocks of calls alternate as in bench/cpu.py.
A speedup is the time of a loop divided by that of vmap.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import machine, save, versions
from figures import duration
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import fastrnn
from fastrnn.timing import product, quartiles, timed

E, H = 8, 64
CELLS = ["LSTM", "GRU", "RNN"]
MODES = ["inference", "gradients"]
SIZES = [(1, 1), (50, 1), (500, 1), (50, 16)]  # T and B
LOOPS = {"loop over fastrnn": fastrnn, "loop over torch": nn}


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def contestants(cell: str, mode: str, T: int, B: int) -> dict[str, Callable[[], Any]]:
    """The calls by contestant; each returns the models' outputs or gradients."""
    torch.manual_seed(0)
    x = torch.randn(T, B, H)
    models = {name: [getattr(m, cell)(H, H) for _ in range(E)] for name, m in LOOPS.items()}
    ours, theirs = models.values()
    for own, other in zip(ours, theirs, strict=True):
        other.load_state_dict(own.state_dict())
    states = {name: p.detach() for name, p in stack_module_state(ours)[0].items()}
    skeleton = copy.deepcopy(ours[0]).to("meta")

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, parameters, (x,))[0]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(output(parameters, x))

    def gradients(layer: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(layer(x)[0]), list(layer.parameters()))

    calls: dict[str, Callable[[], Any]] = {}
    if mode == "inference":
        calls["vmap"] = torch.no_grad()(lambda: vmap(output, (0, None))(states, x))
        for name, layers in models.items():
            calls[name] = torch.no_grad()(lambda layers=layers: [m(x)[0] for m in layers])
    else:
        calls["vmap"] = lambda: vmap(grad(loss), (0, None))(states, x)
        for name, layers in models.items():
            calls[name] = lambda layers=layers: [gradients(m) for m in layers]
    return calls


def by_model(result: Any) -> list[list[Tensor]]:
    """The tensors of a call's result by model."""
    if isinstance(result, list):
        return [list(r) if isinstance(r, tuple) else [r] for r in result]
    all_models = list(result.values()) if isinstance(result, dict) else [result]
    return [[t[e] for t in all_models] for e in range(E)]


def measure(cell: str, mode: str, T: int, B: int, rounds: int) -> dict[str, Any]:
    """A row: the seconds of every call, and the speedups."""
    calls = contestants(cell, mode, T, B)
    for call in calls.values():
        torch.testing.assert_close(by_model(call()), by_model(calls["vmap"]()))
    seconds = {name: found["seconds"] for name, found in timed(calls, rounds).items()}
    ratios = {
        name: quartiles([a / b for a, b in zip(seconds[name], seconds["vmap"], strict=True)])
        for name in LOOPS
    }
    return {"cell": cell, "mode": mode, "T": T, "B": B, "seconds": seconds, "ratio": ratios}


def scaling(rounds: int) -> dict[str, float]:
    """The speedup of a matrix product on two threads over one.

    It bounds the speedup of models on a thread each over one model after the other on one thread.
    """

    def on(threads: int) -> Callable[[], Any]:
        call, _ = product()

        def with_threads() -> None:
            torch.set_num_threads(threads)
            call()

        return with_threads

    found = timed({"one": on(1), "two": on(2)}, rounds)
    one, two = (found[name]["seconds"] for name in ("one", "two"))
    return quartiles([a / b for a, b in zip(one, two, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=15, help="at most this many (15)")
    args = parser.parse_args()
    torch.set_num_threads(2)

    cases = [(cell, mode, T, B) for cell in CELLS for mode in MODES for T, B in SIZES]
    rows = [measure(*case, args.rounds) for case in track(cases, description="measuring")]
    two_threads = scaling(args.rounds)
    table = Table(title=f"{E} models, H={H}: speedup of vmap over a loop")
    for name in ["row", "vmap", *LOOPS]:
        table.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        ratios = [row["ratio"][name] for name in LOOPS]
        table.add_row(
            f"{row['cell']} {row['mode']} T={row['T']} B={row['B']}",
            duration(statistics.median(row["seconds"]["vmap"])),
            *(f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in ratios),
        )
    Console().print(table, f"sgemm, speedup of two threads over one: {two_threads['median']:.2f}")
    if args.json:
        about = {"machine": machine(), "versions": versions(), "sizes": {"E": E, "H": H}}
        save(args.json, {**about, "two threads beside one": two_threads, "rows": rows})


if __name__ == "__main__":
    main()
