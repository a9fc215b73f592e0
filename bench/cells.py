"""Times cells of one's own against fastrnn's built-in ones, and against loops of the same function.

    python bench/cells.py [--json bench/results/cells.json]

The contestants compute the same layer with the same weights: a Python loop over the steps, with the
input's products computed before it; the same loop with torch.compile'd steps; and jax.lax.scan,
compiled, where jax is installed. Blocks of calls alternate as in bench/cpu.py. A speedup is the
other's time divided by fastrnn's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
import torch.nn.functional as F
from cpu import machine, save, versions
from figures import duration
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import cores
from torch import Tensor

import fastrnn
from fastrnn import cells
from fastrnn.define import Definition
from fastrnn.timing import product, quartiles, timed

T = 100
SIZES = [(B, H) for H in (128, 512) for B in (1, 16)]
MODES = ["inference", "training"]
OWN = [cells.light_gru, cells.mgu, cells.coupled_lstm]


@fastrnn.cell(gates=("i", "f", "g", "o"))
def lstm(x: Any, r: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o = (torch.sigmoid(x[k] + r[k]) for k in (0, 1, 3))
    c = f * c + i * torch.tanh(x.g + r.g)
    return o * torch.tanh(c), c


@fastrnn.cell(gates=("r", "z", "n"))
def gru(x: Any, r: Any, h: Tensor) -> Tensor:
    n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
    return n + torch.sigmoid(x.z + r.z) * (h - n)


BUILT_IN = {lstm: fastrnn.LSTM, gru: fastrnn.GRU}


def loop(layer: Any, compiled: bool) -> Callable[[Tensor], Tensor]:
    """The output of a layer by a Python loop over the steps."""
    from fastrnn import reference

    one = reference.CELLS[layer.definition.key]

    def step(x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        new_h, new_c = one(x, F.linear(h, w, b), h, c if with_c else None)
        return new_h, c if new_c is None else new_c

    with_c = len(layer.definition.states) > 1
    run = torch.compile(step) if compiled else step

    def output(x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = layer._flat_weights
        h = c = x.new_zeros(x.size(1), layer.hidden_size)
        outputs = []
        for part in F.linear(x, w_ih, b_ih).unbind(0):
            h, c = run(part, h, c, w_hh, b_hh)
            outputs.append(h)
        return torch.stack(outputs)

    return output


def scan(layer: Any, mode: str, x: Tensor) -> Callable[[], Any]:
    """The light GRU by jax.lax.scan."""
    import jax
    import jax.numpy as jnp

    w_ih, w_hh, b_ih, b_hh = (jnp.asarray(w.detach().numpy()) for w in layer._flat_weights)

    def output(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
        def step(h: Any, x: Any) -> tuple[Any, Any]:
            z, n = jnp.split(x + h @ w_hh.T + b_hh, 2, axis=-1)
            z, n = jax.nn.sigmoid(z), jax.nn.relu(n)
            h = z * h + (1 - z) * n
            return h, h

        start = jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype)
        return jax.lax.scan(step, start, x @ w_ih.T + b_ih)[1]

    def loss(*arguments: Any) -> Any:
        return (output(*arguments) ** 2).mean()

    run = jax.jit(output if mode == "inference" else jax.grad(loss, argnums=tuple(range(5))))
    arguments = (jnp.asarray(x.detach().numpy()), w_ih, w_hh, b_ih, b_hh)
    return lambda: jax.block_until_ready(run(*arguments))


def contestants(definition: Definition, mode: str, B: int, H: int) -> dict[str, Callable[[], Any]]:
    """The calls by contestant: the output, or the gradients of its mean square."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # it compiles a function anew for few sizes and modes only
    layer = definition.layer(H, H)
    x = torch.randn(T, B, H, requires_grad=mode == "training")
    outputs = {"fastrnn": lambda x: layer(x)[0]}
    if definition in BUILT_IN:
        other = BUILT_IN[definition](H, H)
        other.load_state_dict(layer.state_dict())
        outputs["built-in"] = lambda x: other(x)[0]
    else:
        outputs |= {"loop": loop(layer, False), "compiled loop": loop(layer, True)}
    calls: dict[str, Callable[[], Any]] = {}
    for name, output in outputs.items():
        if mode == "inference":
            calls[name] = torch.no_grad()(lambda output=output: output(x))
        else:
            own = other if name == "built-in" else layer
            inputs = [x, *own.parameters()]
            calls[name] = lambda output=output, inputs=inputs: torch.autograd.grad(
                output(x).square().mean(), inputs
            )
    if definition is cells.light_gru and importlib.util.find_spec("jax"):
        calls["jax"] = scan(layer, mode, x)
    return calls


def measure(definition: Definition, mode: str, B: int, H: int, rounds: int) -> dict[str, Any]:
    """A row: the seconds of every call, the speedups, and the rate of sgemm."""
    calls = contestants(definition, mode, B, H)
    own = calls["fastrnn"]()
    for name, call in calls.items():
        found = call()
        if name == "jax":
            found = torch.utils._pytree.tree_map(
                lambda a: torch.from_numpy(a.__array__().copy()), found
            )
        torch.testing.assert_close(found, own)
    sgemm, operations = product()
    times = timed({**calls, "sgemm": sgemm}, rounds)
    peak = [operations / value for value in times.pop("sgemm")["seconds"]]
    seconds = {name: found["seconds"] for name, found in times.items()}
    ratios = {
        name: quartiles([a / b for a, b in zip(seconds[name], seconds["fastrnn"], strict=True)])
        for name in calls
        if name != "fastrnn"
    }
    row = {"cell": definition.name, "mode": mode, "T": T, "B": B, "H": H}
    return {**row, "seconds": seconds, "ratio": ratios, "peak": max(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=9, help="at most this many (9)")
    args = parser.parse_args()
    torch.set_num_threads(min(2, len(cores())))
    for definition in [*BUILT_IN, *OWN]:
        definition.build()

    cases = [
        (definition, mode, B, H)
        for definition in [*BUILT_IN, *OWN]
        for mode in MODES
        for B, H in SIZES
    ]
    rows = [measure(*case, args.rounds) for case in track(cases, description="measuring")]
    names = ["built-in", "loop", "compiled loop", "jax"]
    table = Table(title=f"T={T}, I=H, float32, {torch.get_num_threads()} threads: speedup over")
    for name in ["row", "fastrnn", *names]:
        table.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        ratios = [row["ratio"].get(name) for name in names]
        table.add_row(
            f"{row['cell']} {row['mode']} B={row['B']} H={row['H']}",
            duration(statistics.median(row["seconds"]["fastrnn"])),
            *(f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" if r else "" for r in ratios),
        )
    Console().print(table)
    if args.json:
        save(args.json, {"machine": machine(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
