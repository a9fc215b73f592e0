"""Times both paths of fastrnn on a GPU beside torch's layers on cuDNN: a line a size, in a minute.

    python bench/gpu_grid.py > bench/results/gpu_grid.txt

A line: what and its sizes, then microseconds a call of torch, of the persistent and of the
stepwise path, and torch's over the better of the two: first as called, by events around a block of
calls, and so with the host's time where that is longer; then replayed from a CUDA graph (inference
alone). Medians of three blocks. float32 is multiplied in TF32, as torch's layers do by default.
bench/gpu.py is the thorough one: it takes turns, compares the results, and knows other peers.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable

import torch
from gpu import path, seconds

import fastrnn

T = 100
PATHS = ["", "persistent", "stepwise"]  # "": torch's layer


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(2):
        call()
    calls = max(1, min(30, int(5e-3 / max(seconds(call, 2), 1e-7))))
    return round(statistics.median(seconds(call, calls) for _ in range(3)) * 1e6, 1)


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ratio(times: list[float | None]) -> str:
    ours = [t for t in times[1:] if t]
    return f"{times[0] / min(ours):.2f}" if times[0] and ours else "-"


def line(mode: str, cell: str, dtype: torch.dtype, H: int, B: int) -> str:
    layers = [getattr(library, cell)(H, H).to("cuda", dtype) for library in (torch.nn, fastrnn)]
    shape = {"dtype": dtype, "device": "cuda"}
    x = torch.randn(T, B, H, requires_grad=mode == "train", **shape)
    grad = torch.randn(T, B, H, **shape)

    def call(layer: torch.nn.Module) -> None:
        if mode == "train":
            layer(x)[0].backward(grad)
        else:
            with torch.no_grad():
                layer(x)

    called: list[float | None] = []
    replayed: list[float | None] = []
    for name in PATHS:
        run = functools.partial(call, layers[name != ""])
        with path(name):
            try:
                called.append(microseconds(run))
                replayed.append(microseconds(recorded(run)) if mode == "infer" else None)
            except NotImplementedError:  # it does not fit
                called.append(None)
                replayed.append(None)
    words = [mode, cell, str(dtype).removeprefix("torch."), H, B]
    words += ["eager", *called, ratio(called), "graph", *replayed, ratio(replayed)]
    return " ".join(map(str, words))


def main() -> None:
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, T = {T}, I = H")
    print("# mode cell dtype H B eager torch persistent stepwise ratio graph (the same)")
    dtypes = [torch.float16, torch.float32]
    sizes = [64, 128, 256, 512, 1024, 2048], [1, 8, 32, 64, 256]
    for row in itertools.product(["infer", "train"], ["LSTM", "GRU"], dtypes, *sizes):
        print(line(*row), flush=True)


if __name__ == "__main__":
    main()
