"""`python -m fastrnn bench`: torch's time divided by fastrnn's, for the sizes of one model."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import check
from fastrnn.info import cpu_model, why_no_cuda
from fastrnn.timing import product, quartiles, timed

CELLS = {name.lower(): name for name in ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]}
MODES = ["inference", "training"]
SECONDS = 14  # in all: with the imports and the comparison of the results at most 20
ROUNDS = 50  # at most; more hardly change a median
FEWEST = 2  # where a round takes longer than a mode may
EVEN = 0.8  # on an idle machine the median rate of sgemm is at least this share of the best
COMPARED = 20  # steps of which the results are compared


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:20]) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cell", choices=CELLS, default="lstm", help="a layer or a cell (lstm)")
    for name, default, text in [
        ("input", 64, "inputs"),
        ("hidden", 128, "hidden units"),
        ("batch", 16, "sequences of a batch"),
        ("steps", 100, "steps of a sequence; a cell is called once for each"),
        ("layers", 1, "layers"),
    ]:
        add(f"--{name}", type=_positive, default=default, metavar="N", help=f"{text} ({default})")
    add("--bidirectional", action="store_true", help="two directions")
    add("--dtype", choices=check.DTYPES, default="float32", help="of weights and input (float32)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (cpu)")
    add("--threads", type=_positive, metavar="N", help="of the CPU (as torch has them)")
    for mode in MODES:
        add(f"--{mode}", action="append_const", const=mode, dest="modes", help=f"only {mode}")


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer, or of a cell that is called once per step."""
    if isinstance(module, nn.RNNBase):
        output: Tensor = module(x)[0]
        return output
    state: Any = None
    outputs = []
    for x_t in x.unbind():
        state = module(x_t, state)
        outputs.append(state if isinstance(state, Tensor) else state[0])
    return torch.stack(outputs)


def _contestant(module: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """A forward pass, or a training step without its optimizer."""
    if mode == "inference":
        return lambda: _call(module, x)
    x = x.clone().requires_grad_()
    gradient = torch.randn_like(_call(module, x))

    def step() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        _call(module, x).backward(gradient)

    return step


def _wrong(args: argparse.Namespace, options: dict[str, Any]) -> str | None:
    """What is wrong with fastrnn's results, or None."""
    steps = 0 if args.cell.endswith("cell") else min(args.steps, COMPARED)
    case = check.Case(CELLS[args.cell], steps, args.batch, args.input, args.hidden, options)
    errors = check.errors(case, getattr(torch, args.dtype), args.device)
    wrong = [name for name, error in errors.items() if error > 1]
    return f"{wrong[0]} is off by {errors[wrong[0]]:.2g} tolerances" if wrong else None


def _print_heading(args: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if args.device == "cuda" else cpu_model()
    if args.device == "cpu":
        where += f" ({fastrnn.build_info()['isa']}), threads: {torch.get_num_threads()}"
    print(f"fastrnn {fastrnn.__version__}, torch {torch.__version__}, {where}")
    sizes = ["input", "hidden", "batch", "steps", *(["layers"] if args.layers > 1 else [])]
    words = [CELLS[args.cell], *(f"{name} {getattr(args, name)}" for name in sizes)]
    print(", ".join([*words, *(["bidirectional"] if args.bidirectional else []), args.dtype]))
    print("           torch      fastrnn    torch / fastrnn (quartiles)", flush=True)


def main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Times both libraries and prints the ratios. Returns 1 if the results are wrong."""
    is_cell = args.cell.endswith("cell")
    if is_cell and (args.layers > 1 or args.bidirectional):
        parser.error(f"--cell {args.cell}: a cell has one layer and one direction")
    no_cuda = why_no_cuda() if args.device == "cuda" else None
    if no_cuda:
        parser.error(f"--device cuda: {no_cuda}")
    if args.threads:
        torch.set_num_threads(args.threads)
    options = {} if is_cell else {"num_layers": args.layers, "bidirectional": args.bidirectional}
    _print_heading(args)
    began = time.perf_counter()
    wrong = _wrong(args, options)
    if wrong:
        print(f"not timed: {wrong}; `python -m fastrnn check` tells more")
        return 1

    kind = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    theirs = getattr(nn, CELLS[args.cell])(args.input, args.hidden, **options, **kind)
    ours = getattr(fastrnn, CELLS[args.cell])(args.input, args.hidden, **options, **kind)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(args.steps, args.batch, args.input, **kind)
    sgemm, operations = product(4096 if args.device == "cuda" else 1024, args.device)
    rates: list[float] = []
    modes = [mode for mode in MODES if mode in (args.modes or MODES)]
    for number, mode in enumerate(modes):
        left = (SECONDS - (time.perf_counter() - began)) / (len(modes) - number)
        with torch.inference_mode(mode == "inference"):
            calls = {
                "torch": _contestant(theirs, x, mode),
                "fastrnn": _contestant(ours, x, mode),
                "sgemm": sgemm,
            }
            # Finding how many calls a block has takes about as long as one round.
            found = timed(calls, ROUNDS, budget=0.6 * left, fewest=FEWEST, device=args.device)
        times = {name: found[name]["seconds"] for name in calls}
        ratio = quartiles([a / b for a, b in zip(times["torch"], times["fastrnn"], strict=True)])
        rates += [operations / value / 1e9 for value in times["sgemm"]]
        shown = [f"{1e3 * statistics.median(times[n]):.4g} ms" for n in ("torch", "fastrnn")]
        print(
            f"{mode:<9}  {shown[0]:<9}  {shown[1]:<9}  "
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            flush=True,
        )
    low, median, peak = min(rates), statistics.median(rates), max(rates)
    print(f"Medians of alternating blocks; above 1 fastrnn is faster. sgemm: {peak:.0f} GFLOP/s.")
    if median < EVEN * peak:
        print(
            "Something else slowed the machine down: the rates of sgemm are from "
            f"{low:.0f}, with a median of {median:.0f}. Measure again when it is idle."
        )
    return 0
