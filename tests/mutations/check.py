"""Runs the persistent kernels of a library (library.cu) and compares them with float64.

python check.py LIBRARY [--cells lstm gru] [--cases persistent one_block tf32 float32]

Fails if a value is wrong or a launch reports an error. An emulator with race detection reports a
race as an error.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("reference", ROOT / "fastrnn/reference.py")
assert spec
assert spec.loader
# Loaded by path, as fastrnn need not be built here.
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

# In the order of run.py's registry: gates, values saved for backward, gradients stored.
CELLS = {"lstm": (4, 4, 4), "gru": (3, 4, 6)}
PLANNED, ONE_GROUP, ONE_BLOCK = range(3)  # library.cu's ways to partition a layer
FLOAT16, FLOAT32, TF32 = range(3)  # and its data types
# (Rows of each step, H, way). For "persistent": a few sequences of equal length; more of different
# lengths, in groups of one tile; one group of three tiles. For "one_block": two elements for each
# thread; an odd H.
PERSISTENT = [([5, 5, 5], 136, PLANNED), ([40, 18, 3], 150, PLANNED), ([37, 37], 136, ONE_GROUP)]
CASES = {
    "persistent": [(FLOAT16, *case) for case in PERSISTENT],
    "one_block": [
        (FLOAT16, [700, 690, 650, 3], 34, ONE_BLOCK), (FLOAT16, [5, 3, 2, 2, 1], 33, ONE_BLOCK)
    ],
    "tf32": [(TF32, *case) for case in PERSISTENT],
    "float32": [(FLOAT32, *case) for case in PERSISTENT],
}  # fmt: skip
# A few units in the last place, as h and the gates' gradients are rounded once a step. The bugs to
# detect give far larger errors.
TOLERANCES = {FLOAT16: 8e-3, FLOAT32: 1e-5, TF32: 4e-3}


def exact(cell: str, t: dict[str, Any], sizes: list[int], reverse: bool) -> dict[str, Tensor]:
    """Results and gradients of one direction by fastrnn/reference.py, in float64."""
    names = ("x", "w", "h0", "c0", "b_ih", "b_hh")
    inputs = {name: t[name].double().requires_grad_() for name in names if name in t}
    b_ih, b_hh = inputs["b_ih"], inputs["b_hh"]
    h, c = inputs["h0"], inputs.get("c0")
    xs, outputs = inputs["x"].split(sizes), [inputs["x"]] * len(sizes)
    for step in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[step]
        r = torch.nn.functional.linear(h[:n], inputs["w"], b_hh)
        new, c_new = reference.CELLS[cell](xs[step] + b_ih, r, h[:n], None if c is None else c[:n])
        outputs[step] = new
        h = torch.cat([new, h[n:]])
        if c is not None:
            c = torch.cat([c_new, c[n:]])
    results = {"output": torch.cat(outputs), "h": h}
    loss = (results["output"] * t["grad_output"].double()).sum() + (h * t["dh"].double()).sum()
    if c is not None:
        results["c"] = c
        loss = loss + (c * t["dc"].double()).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return results | {f"grad_{n}": g for n, g in zip(inputs, grads, strict=True)}


def check(library: ctypes.CDLL, cell: str, type: int, sizes: list[int], H: int, way: int) -> None:
    gates, saved, grads = CELLS[cell]
    has_c = cell == "lstm"
    T, B, N = len(sizes), sizes[0], sum(sizes)
    storage_dtype = torch.float16 if type == FLOAT16 else torch.float32
    torch.manual_seed(0)

    def random(*size: int, scale: float = 0.5, dtype: torch.dtype = storage_dtype) -> Tensor:
        return (torch.randn(*size) * scale).to(dtype)

    both = []
    for _ in range(2):
        t = {
            "x": random(N, gates * H), "w": random(gates * H, H, scale=H**-0.5),
            "b_ih": random(gates * H), "b_hh": random(gates * H), "h0": random(B, H),
            "grad_output": random(N, H), "dh": random(B, H),
        }  # fmt: skip
        if has_c:
            t |= {"c0": random(B, H), "dc": random(B, H)}
        both.append(t)
    expected = [exact(cell, t, sizes, reverse=d == 1) for d, t in enumerate(both)]

    def device(tensor: Tensor) -> Tensor:
        return tensor.cuda()

    def empty(*size: int, dtype: torch.dtype = storage_dtype) -> Tensor:
        return torch.full(size, torch.nan, dtype=dtype, device="cuda")

    alive: list[Tensor] = []  # keeps the memory behind the pointers

    def pointers(tensors: list[Tensor | None]) -> list[int]:
        alive.extend(t for t in tensors if t is not None)
        return [0 if t is None else t.data_ptr() for t in tensors]

    forward, backward, weights, found = [], [], [], []
    for t in both:
        g = {name: device(value) for name, value in t.items()}
        h, output, output_copy = empty(B, H), empty(N, H), empty(N, H)
        saved_gates = empty(N, saved * H)
        c, saved_c = (empty(B, H), empty(N, H)) if has_c else (None, None)
        dh = empty(B, H, dtype=torch.float32)
        dc = empty(B, H, dtype=torch.float32) if has_c else None
        dgates, prev = empty(N, grads * H), empty(N, H)
        # The 16-bit kernels leave the biases' gradients to another kernel.
        bias_grads = [None] * 2 if type == FLOAT16 else [empty(gates * H), empty(gates * H)]
        forward += pointers(
            [g["x"], g["b_ih"], g["b_hh"], g["h0"], g.get("c0"), h, None, c, output, output_copy,
             saved_gates, saved_c]
        )  # fmt: skip
        backward += pointers(
            [g["h0"], g.get("c0"), output, saved_gates, saved_c, g["grad_output"], g["dh"],
             g.get("dc"), dh, dc, dgates, prev, *bias_grads, None, None]
        )  # fmt: skip
        weights += pointers([g["w"]])
        found.append((output, output_copy, h, c, dh, dc, dgates, prev, bias_grads))

    arguments: list[Any] = [
        list(CELLS).index(cell), type, ctypes.c_int64(H), ctypes.c_int64(T),
        (ctypes.c_int64 * T)(*sizes),
    ]  # fmt: skip
    for name, directions in [("forward", forward), ("backward", backward)]:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        lists = [(ctypes.c_void_p * len(p))(*p) for p in (directions, weights)]
        error = function(*arguments, *lists, way)
        if error:
            raise SystemExit(f"{cell} {name}: {error.decode()}")

    for d, (output, output_copy, h, c, dh, dc, dgates, prev, bias_grads) in enumerate(found):
        by_gate = dgates.cpu().double().view(N, grads, H)
        recurrent_grads = by_gate[:, grads - gates :].reshape(N, gates * H)
        values = {
            "output": output, "h": h, "grad_h0": dh,
            "grad_x": by_gate[:, :gates].reshape(N, gates * H),
            "grad_w": recurrent_grads.t() @ prev.cpu().double(),
        }  # fmt: skip
        if c is not None and dc is not None:
            values |= {"c": c, "grad_c0": dc}
        if type != FLOAT16:
            values |= dict(zip(["grad_b_ih", "grad_b_hh"], bias_grads, strict=True))
        for name, value in values.items():
            value, right = value.cpu().double(), expected[d][name]
            error = (value - right).abs().max().item() / max(1, right.abs().max().item())
            if not error < TOLERANCES[type]:
                raise SystemExit(f"{cell}, direction {d}: {name} is off by {error:.1e}")
        if not torch.equal(output_copy, output):
            raise SystemExit(f"{cell}, direction {d}: the copy of the output differs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=ctypes.CDLL)
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    args = parser.parse_args()
    for cell in args.cells:
        for name in args.cases:
            for case in CASES[name]:
                check(args.library, cell, *case)
    print("right")
