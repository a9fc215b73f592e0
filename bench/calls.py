"""Times small layers and cells under each way of calling them, compared with torch's.

    python bench/calls.py [--json bench/results/calls.json]

Most of such a call's time is Python and torch's dispatcher. Every row has torch's module and
fastrnn's with the same weights, on one thread, in alternating blocks as in bench/cpu.py. A speedup
is torch's time divided by fastrnn's: above 1 fastrnn is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import difference, flat, name_all
from cpu import machine, save, versions
from figures import duration
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

import fastrnn
from fastrnn.timing import product, quartiles, short, timed

MODULES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
T, I, H = 10, 32, 64
BATCHES = {"layer": [1, 16], "cell": [1, 16, 300]}
MODELS = 8  # of a vmap over models

_Call = Callable[[nn.Module, Tensor, Any], Any]


class Mode(TorchFunctionMode):
    """A mode that only passes calls on."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def states(module: nn.Module, B: int) -> Any:
    size = (1, B, H) if isinstance(module, nn.RNNBase) else (B, H)
    h, c = torch.randn(size), torch.randn(size)
    return (h, c) if isinstance(module, nn.LSTM | nn.LSTMCell) else h


# What changes a module, before it is called.


def unchanged(module: nn.Module, x: Tensor, hx: Any) -> nn.Module:
    return module


def weight_norm(module: nn.Module, x: Tensor, hx: Any) -> nn.Module:
    name = "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh"
    return parametrizations.weight_norm(module, name)


def hooked(module: nn.Module, x: Tensor, hx: Any) -> nn.Module:
    module.register_forward_hook(lambda module, args, result: None)
    return module


def compiled(module: nn.Module, x: Tensor, hx: Any) -> nn.Module:
    torch.compiler.reset()
    changed: nn.Module = torch.compile(module)
    return changed


def exported(module: nn.Module, x: Tensor, hx: Any) -> nn.Module:
    # The default since torch 2.7.
    return torch.export.export(module, (x, hx), strict=False).module()


class Loop(nn.Module):
    """Models, one after the other."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor, hx: Any) -> Tensor:
        return torch.stack([flat(model(x, hx))[0] for model in self.models])


class Stacked(nn.Module):
    """The same models, in one call of vmap."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        stacked = stack_module_state(models)[0]
        self.weights = nn.ParameterDict({name: nn.Parameter(p) for name, p in stacked.items()})
        self.skeleton = [copy.deepcopy(models[0]).to("meta")]  # in a list: no module of this one

    def forward(self, x: Tensor, hx: Any) -> Tensor:
        def output(weights: dict[str, Tensor]) -> Tensor:
            return flat(functional_call(self.skeleton[0], weights, (x, hx)))[0]

        return vmap(output)(dict(self.weights.items()))


def models(module: nn.Module, x: Tensor, hx: Any) -> nn.Module:
    copies = [copy.deepcopy(module) for _ in range(MODELS)]
    ours = type(module).__module__.startswith("fastrnn")
    return Stacked(copies) if ours else Loop(copies)


# How it is called.


def plain(module: nn.Module, x: Tensor, hx: Any) -> Any:
    return module(x, hx)


def without_state(module: nn.Module, x: Tensor, hx: Any) -> Any:
    return module(x)


def state_in_a_list(module: nn.Module, x: Tensor, hx: Any) -> Any:
    return module(x, list(hx))


def packed(module: nn.Module, x: Tensor, hx: Any) -> Any:
    lengths = [T - i % 5 for i in range(x.size(1))]
    return module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)


def with_parameters(module: nn.Module, x: Tensor, hx: Any) -> Any:
    return functional_call(module, dict(module.named_parameters()), (x, hx))


def transformed_jvp(module: nn.Module, x: Tensor, hx: Any) -> Any:
    return torch.func.jvp(lambda x: flat(module(x, hx))[0], (x,), (x,))


def with_tangent(module: nn.Module, x: Tensor, hx: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(flat(module(forward_ad.make_dual(x, x), hx))[0]).tangent


# A training step: a call and its backward pass.


def step(call: _Call, module: nn.Module, x: Tensor, hx: Any) -> Any:
    module.zero_grad(set_to_none=True)
    output = flat(call(module, x, hx))[0]
    output.sum().backward()
    return output


def penalized(call: _Call, module: nn.Module, x: Tensor, hx: Any) -> Any:
    """With the norm of the input's gradient, as in WGAN-GP: double backward."""
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    output = flat(call(module, x, hx))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    return [p.grad for p in module.parameters()]


class Kind(NamedTuple):
    """A kind of call."""

    call: _Call = plain
    change: _Call = unchanged
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    step: Callable[[_Call, nn.Module, Tensor, Any], Any] | None = step  # None: inference alone
    inference: bool = True


KINDS = {
    "plain": Kind(),
    "default device": Kind(context=lambda: torch.device("cpu")),
    "function mode": Kind(context=Mode),
    "no state": Kind(without_state),
    "state in a list": Kind(state_in_a_list),
    "parametrized": Kind(change=weight_norm),
    "autocast": Kind(context=lambda: torch.autocast("cpu", torch.bfloat16)),
    "packed": Kind(packed),
    "hook": Kind(change=hooked),
    "functional_call": Kind(with_parameters),
    "compile": Kind(change=compiled),
    "export": Kind(change=exported),
    "double backward": Kind(step=penalized, inference=False),
    "forward_ad": Kind(with_tangent, step=None),
    "jvp": Kind(transformed_jvp, step=None),
    "vmap": Kind(change=models),  # compared with a loop over torch's models
}


def fits(kind: str, name: str) -> bool:
    if kind == "state in a list":
        return name.startswith("LSTM")
    if kind in ("forward_ad", "jvp"):
        return name != "LSTM"  # torch has none of mkldnn's LSTM
    return kind != "packed" or not name.endswith("Cell")


def contestants(
    kind: str, name: str, B: int, training: bool
) -> tuple[dict[str, Callable[[], object]], str | None]:
    """The calls by contestant, and what is wrong with fastrnn's results, or None."""
    torch.manual_seed(0)
    how = KINDS[kind]
    theirs = getattr(nn, name)(I, H)
    ours = fastrnn.accelerate(copy.deepcopy(theirs))
    x = torch.randn(*([] if name.endswith("Cell") else [T]), B, I)
    hx = states(theirs, B)
    calls: dict[str, Callable[[], object]] = {}
    results = {}
    for who, given in {"torch": theirs, "fastrnn": ours}.items():
        module = how.change(given, x, hx)
        if training and how.step:
            calls[who] = functools.partial(how.step, how.call, module, x, hx)
        else:
            calls[who] = torch.no_grad()(functools.partial(how.call, module, x, hx))
    with how.context():
        for who, made in calls.items():
            try:
                found = flat(made())
            except RuntimeError as error:  # oneDNN has no bfloat16 LSTM for some CPUs
                if who != "torch":
                    raise
                return calls, f"torch can't: {str(error).splitlines()[0]}"
            results[who] = name_all([t.detach().float() for t in found])
    expected = {name: t.double() for name, t in results["torch"].items()}
    low = 0.02 if kind == "autocast" else None  # h in bfloat16, of 8 bits
    wrong = difference(results["fastrnn"], expected, low)
    return calls, wrong


def measure(rounds: int, kinds: list[str]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    cases = [
        (kind, name, B, training)
        for kind in kinds
        for name in MODULES
        if fits(kind, name)
        for B in BATCHES["cell" if name.endswith("Cell") else "layer"]
        for training in (False, True)
        if (KINDS[kind].step if training else KINDS[kind].inference)
    ]
    for kind, name, B, training in track(cases, "", console=Console(stderr=True)):
        calls, wrong = contestants(kind, name, B, training)
        mode = "training" if training else "inference"
        row: dict[str, Any] = {"kind": kind, "module": name, "mode": mode, "B": B}
        if wrong:
            rows.append({**row, "error": wrong})
            continue
        sgemm, operations = product()
        with KINDS[kind].context():
            times = timed({**calls, "sgemm": sgemm}, rounds)
        seconds = {who: times[who]["seconds"] for who in calls}
        ratios = [a / b for a, b in zip(seconds["torch"], seconds["fastrnn"], strict=True)]
        rows.append(
            {
                **row,
                "seconds": short(statistics.median(seconds["fastrnn"])),
                "ratio": quartiles(ratios),
                "peak": short(max(operations / value for value in times["sgemm"]["seconds"])),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"T = {T}, I = {I}, H = {H}, one thread: speedup over torch")
    for name in ("kind", "module", "B", "mode", "fastrnn", "speedup"):
        shown.add_column(name)
    for row in rows:
        head = [row["kind"], row["module"], str(row["B"]), row["mode"]]
        if "error" in row:
            shown.add_row(*head, row["error"])
            continue
        found = row["ratio"]
        style = "red" if found["high"] < 1 else "green" if found["low"] > 1 else "default"
        text = f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
        shown.add_row(*head, duration(row["seconds"]), f"[{style}]{text}[/]")
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=15, help="of each row, at most (15)")
    parser.add_argument("--only", action="append", choices=list(KINDS), metavar="KIND")
    args = parser.parse_args(arguments)
    rows = measure(args.rounds, args.only or list(KINDS))
    Console().print(table(rows))
    if args.json:
        head = {"machine": machine(), "versions": versions()}
        save(args.json, {**head, "date": datetime.date.today().isoformat(), "rows": rows})


if __name__ == "__main__":
    main()
