"""`python -m fastrnn check`: this build's kernels on this machine, compared with torch's layers.

The expected values and gradients are torch's in float64, from the same weights and inputs. Errors
are in tolerances: torch.testing.assert_close's for the dtype, at the tensor's largest value. Where
torch's own layer of that dtype is off by more than a quarter of it, which is common in 16 bits, the
tolerance is four times torch's error.

FASTRNN_ISA is read once per process, and a kernel that crashes ends its process. So each device and
instruction set is checked by a process of its own: `python -m fastrnn.check DEVICE DTYPE...`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn.info import why_no_cuda

DTYPES = ["float32", "float64", "bfloat16", "float16"]
LIMIT = 120  # seconds until a process is given up
PROCESSES = 2  # at a time: each spends most of its time importing torch, on one core


class Case(NamedTuple):
    """A call of a layer, or of a cell if T is 0."""

    name: str  # of the class in torch.nn and fastrnn
    T: int
    B: int
    I: int
    H: int
    options: dict[str, Any]
    lengths: list[int] | None = None  # of a PackedSequence, in descending order

    def __str__(self) -> str:
        words = [self.name, *(f"{name}={value}" for name, value in self.options.items())]
        words += [f"{name}={value}" for name, value in zip("TBIH", self[1:5], strict=True) if value]
        return " ".join([*words, *(["packed"] if self.lengths else [])])


class Row(NamedTuple):
    """A line of the output: the result for a device, instruction set and dtype."""

    device: str
    isa: str
    dtype: str
    error: float = math.inf  # the largest, in tolerances; infinite if there is none
    what: str = ""  # the case and tensor with that error, or why there is none

    @property
    def ok(self) -> bool:
        return self.error <= 1

    def __str__(self) -> str:
        head = f"{self.device:<6}  {self.isa:<15}  {self.dtype:<8}"
        if self.ok:
            return f"{head}  ok      {self.error:.2g}"
        return f"{head}  FAILED  {self.error:.2g}  {self.what}"


HEADING = "device  instruction set  dtype     result  largest error, in tolerances"


def cases() -> Iterator[Case]:
    """Every cell, layer and option that has kernels of its own, in sizes that don't fill a tile."""
    relu = {"nonlinearity": "relu"}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("LSTM", {}),
        ("GRU", {}),
        ("RNN", {}),
        ("RNN", relu),
    ]
    for name, options in [*kinds, ("LSTM", {"proj_size": 7})]:
        yield Case(name, 1, 1, 5, 17, options)  # a single step reads unpacked weights
        yield Case(name, 6, 1, 64, 96, options)
        yield Case(name, 4, 9, 128, 256, options)  # enough work for several threads
        yield Case(name, 5, 20, 33, 64, {**options, "num_layers": 2, "bidirectional": True})
        yield Case(name, 6, 5, 5, 17, {**options, "bidirectional": True}, [6, 4, 4, 2, 1])
    for name, options in kinds:
        for B in [1, 20]:
            yield Case(f"{name}Cell", 0, B, 33, 64, options)


def errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest error of each result and gradient, in tolerances: up to 1 is right."""
    torch.manual_seed(0)
    exact = getattr(nn, case.name)(case.I, case.H, **case.options)
    if case.options.get("nonlinearity") == "relu":
        _avoid_kinks(exact)
    exact.to(dtype).double()
    inputs = [t.to(dtype).double() for t in _random_inputs(case)]
    expected = _results(exact, case, inputs, dtype)
    found = []
    for library in (fastrnn, nn):
        layer = getattr(library, case.name)(case.I, case.H, **case.options).to(device, dtype)
        layer.load_state_dict(exact.state_dict())
        found.append(_results(layer, case, [t.to(device, dtype) for t in inputs], dtype))
    ours, theirs = ({n: _error(t[n], right) for n, right in expected.items()} for t in found)
    return {
        # Where torch's is infinite, assert_close's tolerance counts.
        name: error / (max(1, 4 * theirs[name]) if math.isfinite(theirs[name]) else 1)
        for name, error in ours.items()
    }


def _avoid_kinks(module: nn.Module) -> None:
    """Moves relu's inputs away from 0, where rounding decides whether a gradient flows."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias"):
                parameter[::2] = 4
                parameter[1::2] = -4
            else:
                parameter.mul_(0.25)


def _random_inputs(case: Case) -> list[Tensor]:
    """The input, of a PackedSequence its data, and the initial states."""
    rows = case.options.get("num_layers", 1) * (1 + case.options.get("bidirectional", False))
    lead = (rows, case.B) if case.T else (case.B,)
    states = [torch.randn(*lead, case.options.get("proj_size", case.H))]
    if case.name.startswith("LSTM"):
        states.append(torch.randn(*lead, case.H))
    if case.lengths:
        return [torch.randn(sum(case.lengths), case.I), *states]
    return [torch.randn(*([case.T] if case.T else []), case.B, case.I), *states]


def _flat(nested: Any) -> list[Tensor]:
    """The tensors of a module's results."""
    if isinstance(nested, PackedSequence):
        return [nested.data]
    if isinstance(nested, Tensor):
        return [nested]
    return [tensor for item in nested for tensor in _flat(item)]


def _results(
    module: nn.Module, case: Case, inputs: list[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The results of a call in inference and of one in training, and all gradients."""
    x, *states = (t.clone().requires_grad_() for t in inputs)
    given: Any = x
    if case.lengths:
        sizes = [sum(n > t for n in case.lengths) for t in range(case.lengths[0])]
        given = PackedSequence(x, torch.tensor(sizes))
    hx = tuple(states) if len(states) > 1 else states[0]
    names = ["output", "h_n", "c_n"] if case.T else ["h", "c"]
    with torch.inference_mode():
        inferred = _flat(module(given, hx))
    results = _flat(module(given, hx))
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(r.shape, generator=generator).to(dtype).to(r) for r in results]
    leaves = {"input": x, **dict(zip(["h_0", "c_0"], states, strict=False))}
    leaves |= dict(module.named_parameters())
    found = torch.autograd.grad(results, list(leaves.values()), gradients)
    return {
        **{f"{name} in inference": t for name, t in zip(names, inferred, strict=False)},
        **{name: t.detach() for name, t in zip(names, results, strict=False)},
        **{f"gradient of {name}": t for name, t in zip(leaves, found, strict=True)},
    }


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest error in assert_close's tolerances; infinite for NaN and for another shape."""
    if found.shape != expected.shape:
        return math.inf
    rtol, atol = torch.testing._comparison.default_tolerances(found)
    largest = (found.to(expected) - expected).abs().max().item()
    error = largest / (atol + rtol * expected.abs().max().item())
    return math.inf if math.isnan(error) else error


def checked(device: str, dtype: str) -> Row:
    """The row of this process's instruction set, on the CPU, or of the GPU."""
    worst, what = 0.0, ""
    before = fastrnn.fallbacks()
    isa = fastrnn.build_info()["isa"]
    if device == "cuda":
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for case in cases():
        try:
            found = errors(case, getattr(torch, dtype), device)
        except Exception as error:  # whatever a kernel raises, the other rows are printed
            reason = (str(error).splitlines() or [""])[0]
            return Row(device, isa, dtype, what=f"{case}: {type(error).__name__}: {reason}")
        name = max(found, key=found.__getitem__)
        if found[name] > worst:
            worst, what = found[name], f"{case}: {name}"
    for call, count in fastrnn.fallbacks().items():
        if count > before.get(call, 0):
            return Row(device, isa, dtype, what=f"torch's own kernel ran: {call}")
    return Row(device, isa, dtype, worst, what)


def _process(device: str, isa: str, dtypes: list[str]) -> list[Row]:
    """The rows that a process of its own prints. What it does not print has failed."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # two processes share the cores
    if device == "cpu":
        environment["FASTRNN_ISA"] = isa
    command = [sys.executable, "-W", "ignore", "-m", "fastrnn.check", device, *dtypes]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, log = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        output, log = process.communicate()
        reason = f"took more than {LIMIT} s"
    else:
        reason = (log.strip().splitlines() or [f"ended with status {process.returncode}"])[-1]
        if process.returncode < 0:
            reason = f"ended by {signal.Signals(-process.returncode).name}"
    rows = [Row(*json.loads(line)) for line in output.splitlines() if line.startswith("[")]
    known = {row.dtype: row for row in rows if device != "cpu" or row.isa == isa}
    return [known.get(dtype, Row(device, isa, dtype, what=reason)) for dtype in dtypes]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only this one")
    parser.add_argument("--isa", metavar="NAME", help="only this instruction set of the CPU's")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")


def main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Prints a row for each device, instruction set and dtype. Returns 1 if one failed."""
    began = time.perf_counter()
    supported = fastrnn.build_info()["isa_supported"]
    if args.isa and args.isa not in supported:
        parser.error(f"--isa {args.isa}: expected one of {', '.join(supported)}")
    no_cuda = why_no_cuda()
    if args.device == "cuda" and no_cuda:
        parser.error(f"--device cuda: {no_cuda}")
    places = [("cpu", isa) for isa in ([args.isa] if args.isa else supported)]
    if not no_cuda:
        places.append(("cuda", "-"))
    places = [place for place in places if args.device in (None, place[0])]
    dtypes = [args.dtype] if args.dtype else DTYPES
    print(HEADING, flush=True)
    rows: list[Row] = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for found in pool.map(_process, *zip(*places, strict=True), [dtypes] * len(places)):
            rows += found
            print(*found, sep="\n", flush=True)
    if no_cuda:
        print(f"cuda    not checked: {no_cuda}")
    failed = sum(not row.ok for row in rows)
    result = f"{failed} of {len(rows)} failed" if failed else f"all {len(rows)} ok"
    print(f"{result}, in {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name in sys.argv[2:]:
        print(json.dumps(checked(sys.argv[1], name)), flush=True)
