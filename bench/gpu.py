"""Times fastrnn on a GPU against torch.nn on cuDNN, CUDA graphs, a compiled loop and haste.

    python bench/gpu.py --quick
    python bench/gpu.py --json bench/results/gpu.json --picture bench/results/gpu.png

Times are the GPU's, between two events around a block of calls. Blocks of the contestants
alternate, and a row has the median and quartiles of the speedup over the rounds: above 1 fastrnn is
faster. Results are compared with torch's in float64 before a time counts. float32 products are
rounded to TF32, as in torch's layers by default, except in the group FULL. It needs a GPU and a
fastrnn built for it. On an emulated GPU it runs a few toy rows, to test itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import Case
from contestants import TF32, Contestant, Problem, difference, exact, make, of_module, problem
from cpu import save, table, versions
from figures import Row, label, ratio
from gpu_cases import FULL, GROUPS, all_cases, quick_cases, toy_cases
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastrnn.info import why_no_cuda
from fastrnn.timing import quartiles, short

BLOCK = 0.005  # approximate seconds of a block of calls, by the GPU's clock
MOST_CALLS = 200


def emulated() -> bool:
    return "emulated" in torch.cuda.get_device_name()


# --- the contestants ------------------------------------------------------------------------------


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """Forces fastrnn onto this path."""
    before = os.environ.get("FASTRNN_CUDA_PATH")
    os.environ["FASTRNN_CUDA_PATH"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTRNN_CUDA_PATH"]
        else:
            os.environ["FASTRNN_CUDA_PATH"] = before


def on_path(name: str, given: Problem) -> Contestant:
    """fastrnn, forced onto the path of this name."""
    inner = make("fastrnn", given)

    def forced(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with path(name):
                return call()

        return run

    return Contestant(forced(inner.call), forced(inner.results))


def in_a_graph(inner: Contestant) -> Contestant:
    """The same call, recorded and replayed."""
    if emulated():
        raise NotImplementedError("no CUDA graphs on an emulated GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            inner.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = inner.results()

    def results() -> dict[str, torch.Tensor]:
        graph.replay()
        return recorded

    return Contestant(graph.replay, results)


def compiled_loop(given: Problem) -> Contestant:
    """torch.nn.LSTM's formulas in Python, compiled by torch.compile."""
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in given.layer.parameters())

    @torch.compile(mode="reduce-overhead")
    def run(x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.size(1), w_hh.size(1))
        gates = torch.nn.functional.linear(x, w_ih, b_ih + b_hh)
        outputs = []
        for step in gates.unbind():
            i, f, g, o = (step + h @ w_hh.t()).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)

    def results() -> dict[str, torch.Tensor]:
        return {"output": run(given.x).clone()}

    return Contestant(lambda: run(given.x), results)


def haste(given: Problem) -> Contestant:
    import haste_pytorch

    case = given.case
    if case.dtype not in ("float32", "float64") or case.cell not in ("LSTM", "GRU"):
        raise NotImplementedError(f"haste has no {case.cell} in {case.dtype}")
    layer = getattr(haste_pytorch, case.cell)(case.I, case.H).to(given.x)
    layer.from_native_weights(*given.layer.state_dict().values())
    return of_module(layer, given)


def contestant(name: str, given: Problem) -> Contestant:
    if name.endswith(" in a graph"):
        return in_a_graph(make(name.removesuffix(" in a graph"), given))
    if name in ("fastrnn stepwise", "fastrnn persistent"):
        return on_path(name.removeprefix("fastrnn "), given)
    others = {"compiled loop": compiled_loop, "haste": haste}
    return others[name](given) if name in others else make(name, given)


def same_names(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> Any:
    """The expected results that this contestant returns: fastrnn and torch return all."""
    if name in ("haste", "compiled loop"):
        return {key: value for key, value in expected.items() if key in found}
    return expected


# --- a row ----------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds per call, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """For every contestant: the calls of a block, and seconds per call in each round."""
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        for _ in range(2):  # warm-up: memory is allocated, kernels are loaded
            call()
        a_call = max(seconds(call, 2), 1e-7)
        found[name] = {"calls": max(1, min(MOST_CALLS, int(BLOCK / a_call))), "seconds": []}
    for number in range(rounds):
        names = list(calls)
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            value = seconds(calls[name], found[name]["calls"])
            found[name]["seconds"].append(short(value))
    return found


def measure(case: Case, rounds: int) -> Row:
    row: Row = {"key": case.key, **case.to_json(), "operations": case.operations}
    found: dict[str, dict[str, Any]] = {}
    calls = {}
    rounded = TF32 if case.dtype == "float32" and case.group != FULL else None
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=rounded is not None),
            torch.inference_mode(case.mode != "training"),
        ):
            with torch.device("cuda"):  # not around the timed calls: the mode would cost each time
                given = problem(case)
            expected = exact(given)
            for name in ["fastrnn", *case.peers]:
                try:
                    one = contestant(name, given)
                    results = one.results()
                    wrong = difference(results, same_names(results, expected, name), rounded)
                except ModuleNotFoundError as error:
                    wrong = f"{error.name} is not installed"
                except Exception as error:  # whatever a peer raises, the others are timed
                    wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                if wrong:
                    found[name] = {"reason": wrong}
                else:
                    calls[name] = one.call
            found |= timed(calls, rounds)
    except torch.cuda.OutOfMemoryError:
        return {**row, "error": "out of the GPU's memory"}
    own = found["fastrnn"].get("seconds")
    ratios = {
        name: quartiles([theirs / mine for theirs, mine in zip(one["seconds"], own, strict=True)])
        for name, one in found.items()
        if own and name != "fastrnn" and "seconds" in one
    }
    return {**row, "contestants": found, "ratio": ratios}


# --- the run --------------------------------------------------------------------------------------


def draw(results: dict[str, Any], to: Path) -> None:
    """The speedup over torch by hidden size: one panel per cell and mode, one line per batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for line, mode in zip(panels, ["inference", "training"], strict=True):
        for panel, cell in zip(line, ["LSTM", "GRU"], strict=True):
            rows = [r for r in results["rows"] if (r["group"], r["cell"]) == (mode, cell)]
            for B in sorted({row["B"] for row in rows}):
                points = [
                    (row["H"], ratio(row, "torch")["median"])  # type: ignore[index]
                    for row in rows
                    if row["B"] == B and row["dtype"] == "float16" and ratio(row, "torch")
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), "o-", label=f"B = {B}")
            panel.axhline(1, color="black", linewidth=1)
            panel.set_title(f"{cell}, {mode}, float16")
            panel.set_xscale("log", base=2)
            if panel.lines[:-1]:
                panel.legend(fontsize="small")
    figure.suptitle(f"speedup over cuDNN, T = 100, I = H: {results['machine']['gpu']}")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=90)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some of the rows: under 3 minutes")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group of rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the results, row by row")
    parser.add_argument("--picture", type=Path, help="where to write a picture of the grid")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    reason = why_no_cuda()
    if reason:
        print(f"bench/gpu.py: {reason}; nothing was timed", file=sys.stderr)
        return 2
    cases = toy_cases() if emulated() else quick_cases() if args.quick else all_cases()
    if args.only:
        cases = [case for case in cases if case.group in args.only]
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "emulated": emulated(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    today = datetime.date.today().isoformat()
    results: dict[str, Any] = {"machine": machine, "versions": versions(), "date": today}
    rows: list[Row] = []
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=label(case.to_json()))
            rows.append(measure(case, args.rounds))
            progress.advance(task)
            results["rows"] = rows
            if args.json:
                save(args.json, results)
    console = Console()
    for group in GROUPS:
        chosen = [row for row in rows if row["group"] == group]
        if chosen:
            console.print(table(group, chosen))
    console.print(f"{machine['gpu']}. Speedups: the other's time / fastrnn's, by the GPU's clock.")
    if emulated():
        console.print("This GPU is emulated: its clock says nothing.")
    if args.picture:
        draw(results, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
