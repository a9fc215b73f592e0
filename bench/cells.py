"""Times cells of one's own against fastrnn's built-in ones, and against loops of the same function.

    python bench/cells.py [--json bench/results/cells.json]

The contestants compute the same layer with the same weights: a Python loop over the steps, with the
input's products computed before it; the same loop with torch.compile'd steps; jax.lax.scan,
compiled, where jax is installed; and the package xlstm's sLSTM in PyTorch. Blocks of calls
alternate as in bench/cpu.py. A speedup is the
other's time divided by fastrnn's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
import torch.nn.functional as F
from cpu import machine, save, versions
from figures import speedup_table
from rich.console import Console
from rich.progress import track
from timing import cores, measured
from torch import Tensor

import fastrnn
from fastrnn import cells
from fastrnn.define import Definition

T = 100
SIZES = [(B, H) for H in (128, 512) for B in (1, 16)]
MODES = ["inference", "training"]
OWN = [cells.light_gru, cells.peephole_lstm, cells.indrnn, cells.slstm]
HEADS = 4  # of sLSTM


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

    recurrent, gates = layer.definition.recurrent, len(layer.definition.gates)

    def product(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if recurrent == "dense":
            return F.linear(h, w, b)
        if recurrent == "diagonal":
            return h.repeat(1, gates) * w + b
        by_head = torch.bmm(h.view(len(h), len(w), -1).transpose(0, 1), w.transpose(1, 2))
        return by_head.unflatten(2, (gates, -1)).permute(1, 2, 0, 3).flatten(1) + b

    def step(
        x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor, *vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        new_h, new_c = one(x, product(h, w, b), h, c if others else None, *vectors)
        return new_h, c if new_c is None else new_c

    others = len(layer.definition.states) - 1
    run = torch.compile(step) if compiled else step

    def output(x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, *vectors = layer._flat_weights
        h = x.new_zeros(x.size(1), layer.hidden_size)
        c = x.new_zeros(x.size(1), others * layer.hidden_size)
        outputs = []
        for part in F.linear(x, w_ih, b_ih).unbind(0):
            h, c = run(part, h, c, w_hh, b_hh, *vectors)
            outputs.append(h)
        return torch.stack(outputs)

    return output


def jax_cells() -> dict[Definition, Callable[..., Any]]:
    """One step in JAX, as (gates, h, the other states, vectors) -> (h, the other states).

    gates: x + r, [B, G, H].
    """
    import jax
    import jax.numpy as jnp

    def light_gru(gates: Any, h: Any, others: Any, vectors: Any) -> Any:
        z, n = jax.nn.sigmoid(gates[:, 0]), jax.nn.relu(gates[:, 1])
        return z * h + (1 - z) * n, ()

    def peephole_lstm(gates: Any, h: Any, others: Any, vectors: Any) -> Any:
        (c,), (w_i, w_f, w_o) = others, vectors
        i, f = jax.nn.sigmoid(gates[:, 0] + w_i * c), jax.nn.sigmoid(gates[:, 1] + w_f * c)
        c = f * c + i * jnp.tanh(gates[:, 2])
        return jax.nn.sigmoid(gates[:, 3] + w_o * c) * jnp.tanh(c), (c,)

    def indrnn(gates: Any, h: Any, others: Any, vectors: Any) -> Any:
        return jax.nn.relu(gates[:, 0]), ()

    def slstm(gates: Any, h: Any, others: Any, vectors: Any) -> Any:
        c, n, m = others
        log_i, log_f = gates[:, 0], jax.nn.log_sigmoid(gates[:, 1]) + m
        m = jnp.maximum(log_f, log_i)
        f, i = jnp.exp(log_f - m), jnp.exp(log_i - m)
        c, n = f * c + i * jnp.tanh(gates[:, 2]), f * n + i
        return jax.nn.sigmoid(gates[:, 3]) * c / n, (c, n, m)

    return {
        cells.light_gru: light_gru,
        cells.peephole_lstm: peephole_lstm,
        cells.indrnn: indrnn,
        cells.slstm: slstm,
    }


def scan(layer: Any, mode: str, x: Tensor) -> Callable[[], Any]:
    """A layer by jax.lax.scan."""
    import jax
    import jax.numpy as jnp

    definition = layer.definition
    one, H, G = jax_cells()[definition], layer.hidden_size, len(definition.gates)
    weights = tuple(jnp.asarray(w.detach().numpy()) for w in layer._flat_weights)

    def product(h: Any, w: Any) -> Any:
        """[B, G, H]"""
        if definition.recurrent == "dense":
            return (h @ w.T).reshape(-1, G, H)
        if definition.recurrent == "diagonal":
            return h[:, None] * w.reshape(G, H)
        w = w.reshape(w.shape[0], G, -1, w.shape[2])
        by_head = jnp.einsum("bkj,kgij->bgki", h.reshape(len(h), len(w), -1), w)
        return by_head.reshape(-1, G, H)

    def output(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, *vectors: Any) -> Any:
        def step(states: Any, x: Any) -> tuple[Any, Any]:
            h, others = states
            h, others = one(x + product(h, w_hh) + b_hh.reshape(G, H), h, others, vectors)
            return (h, others), h

        zeros = jnp.zeros((x.shape[1], H), x.dtype)
        start = (zeros, (zeros,) * (len(definition.states) - 1))
        gates = (x @ w_ih.T + b_ih).reshape(*x.shape[:2], G, H)
        return jax.lax.scan(step, start, gates)[1]

    def loss(*arguments: Any) -> Any:
        return (output(*arguments) ** 2).mean()

    arguments = (jnp.asarray(x.detach().numpy()), *weights)
    gradients = jax.grad(loss, argnums=tuple(range(len(arguments))))
    run = jax.jit(output if mode == "inference" else gradients)
    return lambda: jax.block_until_ready(run(*arguments))


def xlstm(layer: Any) -> Callable[[Tensor], Tensor]:
    """sLSTM as the package xlstm has it in PyTorch."""
    from xlstm.blocks.slstm.src.vanilla import slstm_forward
    from xlstm.blocks.slstm.src.vanilla.slstm import slstm_forward_pointwise

    def output(x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = layer._flat_weights
        zeros = x.new_zeros(4, x.size(1), layer.hidden_size)
        gates = F.linear(x, w_ih, b_ih)
        return slstm_forward(gates, zeros, w_hh, b_hh, slstm_forward_pointwise)[0][0, 1:]

    return output


def contestants(definition: Definition, mode: str, B: int, H: int) -> dict[str, Callable[[], Any]]:
    """The calls by contestant: the output, or the gradients of its mean square."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # it compiles a function anew for few sizes and modes only
    heads = {"heads": HEADS} if definition.recurrent == "heads" else {}
    layer = definition.layer(H, H, **heads)
    x = torch.randn(T, B, H, requires_grad=mode == "training")
    outputs = {"fastrnn": lambda x: layer(x)[0]}
    if definition in BUILT_IN:
        other = BUILT_IN[definition](H, H)
        other.load_state_dict(layer.state_dict())
        outputs["built-in"] = lambda x: other(x)[0]
    else:
        outputs |= {"loop": loop(layer, False), "compiled loop": loop(layer, True)}
    if definition is cells.slstm and importlib.util.find_spec("xlstm"):
        outputs["xlstm"] = xlstm(layer)
    calls: dict[str, Callable[[], Any]] = {}
    for name, output in outputs.items():
        if mode == "inference":
            calls[name] = torch.no_grad()(lambda output=output: output(x))
        else:
            own = other if name == "built-in" else layer
            inputs = [x, *own._flat_weights]
            calls[name] = lambda output=output, inputs=inputs: torch.autograd.grad(
                output(x).square().mean(), inputs
            )
    if importlib.util.find_spec("jax") and definition in jax_cells():
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
    row = {"cell": definition.name, "mode": mode, "T": T, "B": B, "H": H}
    return {**row, **measured(calls, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=9, help="at most this many (9)")
    known = {definition.name: definition for definition in [*BUILT_IN, *OWN]}
    parser.add_argument(
        "--cells", nargs="+", default=list(known), choices=known, metavar="CELL",
        help="these alone; rows of the others stay in the file if they are of this machine",
    )  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(min(2, len(cores())))
    for name in args.cells:
        known[name].build()

    cases = [
        (definition, mode, B, H)
        for definition in map(known.__getitem__, args.cells)
        for mode in MODES
        for B, H in SIZES
    ]
    rows = [measure(*case, args.rounds) for case in track(cases, description="measuring")]
    names = ["built-in", "loop", "compiled loop", "jax", "xlstm"]
    title = f"T={T}, I=H, float32, {torch.get_num_threads()} threads: speedup over"
    Console().print(speedup_table(title, "cell", names, rows))
    if args.json:
        kept = []
        if args.json.exists():
            before = json.loads(args.json.read_text())
            if before["machine"] == machine() and before["versions"] == versions():
                kept = [row for row in before["rows"] if row["cell"] not in args.cells]
        order = {name: i for i, name in enumerate(known)}
        rows = sorted([*kept, *rows], key=lambda row: order[row["cell"]])
        save(args.json, {"machine": machine(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
