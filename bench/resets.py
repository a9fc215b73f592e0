"""Times `resets=`, `lengths=` and `return_states=` against a call without, and torch's ways.

    python bench/resets.py [--json bench/results/resets.json]

3 % of the steps are resets; lengths are between half of T and T. torch's ways of resets are a loop
over the steps that multiplies the states by 0 (as stable-baselines3 has it), and one call on the
parts between resets, padded to the longest (as TorchRL has it); of lengths, packing and padding; of
all states a loop over the steps.
Blocks of calls alternate as in bench/cpu.py. A speedup is the other's time divided by fastrnn's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import machine, save, versions
from figures import speedup_table
from rich.console import Console
from rich.progress import track
from timing import cores, measured
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fastrnn

T = 128
SIZES = [(1, 128), (16, 128), (16, 256), (128, 256)]
NAMES = ["without", "loop", "parts", "packed"]


def loop(layer: nn.LSTM, x: Tensor, resets: Tensor) -> Tensor:
    """torch's layer, one step after the other."""
    h = c = x.new_zeros(1, x.size(1), layer.hidden_size)
    outputs = []
    for step, reset in zip(x.split(1), resets, strict=True):
        keep = (~reset).to(x.dtype).view(1, -1, 1)
        output, (h, c) = layer(step, (h * keep, c * keep))
        outputs.append(output)
    return torch.cat(outputs)


def parts(layer: nn.LSTM, x: Tensor, resets: Tensor) -> Tensor:
    """torch's layer on the parts between resets, as rows of a padded batch."""
    starts = resets.clone()
    starts[0] = True
    rows, steps = starts.T.nonzero(as_tuple=True)
    of_parts = torch.diff((rows * len(x) + steps), append=torch.tensor([x.size(1) * len(x)]))
    sizes = of_parts.tolist()
    pieces = x.transpose(0, 1).flatten(0, 1).split(sizes)
    output, _ = layer(pad_sequence(list(pieces)))
    together = torch.cat([output[:n, i] for i, n in enumerate(sizes)])
    return together.unflatten(0, (x.size(1), len(x))).transpose(0, 1)


def all_states(layer: nn.LSTM, x: Tensor) -> tuple[Tensor, Tensor]:
    """torch's layer, one step after the other: the output, and c of all steps."""
    hx = None
    outputs, states = [], []
    for step in x.split(1):
        output, hx = layer(step, hx)
        outputs.append(output)
        states.append(hx[1])
    return torch.cat(outputs), torch.cat(states)


def packed(layer: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    output, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output, total_length=len(x))[0]


def contestants(
    cut: str, mode: str, B: int, H: int
) -> tuple[dict[str, Callable[[], Any]], Callable[[], Any]]:
    """The calls by contestant, and fastrnn's without resets or lengths."""
    torch.manual_seed(0)
    layer, theirs = fastrnn.LSTM(H, H), nn.LSTM(H, H)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, H, requires_grad=mode == "training")
    resets, lengths = torch.rand(T, B) < 0.03, torch.randint(T // 2, T + 1, (B,))
    if cut == "resets":
        outputs = {
            "fastrnn": (layer, lambda: layer(x, resets=resets)[:1]),
            "loop": (theirs, lambda: (loop(theirs, x, resets),)),
            "parts": (theirs, lambda: (parts(theirs, x, resets),)),
        }
    elif cut == "lengths":
        outputs = {
            "fastrnn": (layer, lambda: layer(x, lengths=lengths)[:1]),
            "packed": (theirs, lambda: (packed(theirs, x, lengths),)),
        }
    else:
        outputs = {
            "fastrnn": (layer, lambda: _output_and_c(*layer(x, return_states=True))),
            "loop": (theirs, lambda: all_states(theirs, x)),
        }
    outputs["without"] = (layer, lambda: layer(x)[:1])
    calls: dict[str, Callable[[], Any]] = {}
    for name, (module, output) in outputs.items():
        if mode == "inference":
            calls[name] = torch.no_grad()(output)
        else:
            inputs = [x, *module.parameters()]
            calls[name] = lambda output=output, inputs=inputs: torch.autograd.grad(
                sum(t.square().mean() for t in output()), inputs
            )
    return calls, calls.pop("without")


def _output_and_c(output: Tensor, _: Any, states: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    return output, *states


def measure(cut: str, mode: str, B: int, H: int, rounds: int) -> dict[str, Any]:
    """A row: the seconds of every call, the speedups, and the rate of sgemm."""
    calls, without = contestants(cut, mode, B, H)
    own = calls["fastrnn"]()
    for call in calls.values():
        torch.testing.assert_close(call(), own)
    row = {"cut": cut, "mode": mode, "T": T, "B": B, "H": H}
    return {**row, **measured({**calls, "without": without}, rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=9, help="at most this many (9)")
    args = parser.parse_args()
    torch.set_num_threads(min(2, len(cores())))
    cases = [
        (cut, mode, B, H)
        for cut in ("resets", "lengths", "states")
        for mode in ("inference", "training")
        for B, H in SIZES
    ]
    rows = [measure(*case, args.rounds) for case in track(cases, description="measuring")]
    title = f"LSTM, T={T}, I=H, float32, {torch.get_num_threads()} threads"
    Console().print(speedup_table(title, "cut", NAMES, rows))
    if args.json:
        save(args.json, {"machine": machine(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
