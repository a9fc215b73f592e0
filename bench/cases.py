"""The rows of bench/cpu.py: what is computed in each, and which peers it is compared with.

Sizes: T steps, batch size B, I inputs and H hidden units; I = H except in the small training steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import fastrnn

CELLS = ["LSTM", "GRU", "RNN"]
# The groups of rows: the values of `--only`.
GROUPS = [
    *("inference", "training", "streaming", "small", "half", "float64", "packed", "projection"),
    *("recompute", "load", "growth", "lopsided", "sample"),
]

SIZES = [64, 128, 256, 512, 1024]
BATCHES = [1, 16, 32, 64]

SAMPLE_SEED = 20
SAMPLE_ROWS = 300
SAMPLE_AXES: dict[str, list[Any]] = {
    "cell": CELLS,
    "mode": ["inference", "training"],
    "T": [1, 10, 100, 500],
    "B": [1, 2, 3, 4, 7, 8, 16, 20, 32, 48, 64, 96],
    "H": [16, 50, 64, 100, 128, 200, 256, 400, 512, 650, 1024],
    "threads": [1, 2],
    "layers": [1, 2, 3],
    "directions": [1, 2],
}
# A drawn row is drawn again if its forward pass has more operations: a call would take seconds.
SAMPLE_BOUNDS = {"inference": 40e9, "training": 12e9}


def gates(cell: str) -> int:
    """How many gates a layer or cell of torch.nn has."""
    name = cell.removesuffix("Cell").lower()
    return fastrnn.CELLS["rnn_tanh" if name == "rnn" else name]["gates"]


@dataclass(frozen=True)
class Case:
    """One row. Its contestants are fastrnn and `peers`."""

    group: str
    cell: str  # a name in torch.nn
    mode: str  # inference, training, or streaming: one step per call, with the state passed on
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    directions: int = 1
    dtype: str = "float32"
    packed: bool = False  # a PackedSequence of B sequences, of at most T steps
    projection: int = 0  # proj_size
    recompute: bool = False  # fastrnn's module does not save the gates for backward
    threads: int = 2
    beside: int = 0  # other processes that load the machine during the measurement
    peers: tuple[str, ...] = ("torch",)

    @property
    def key(self) -> str:
        """Identifies the row, also in other files of results."""
        return " ".join(
            [
                *(self.group, self.cell, self.mode, self.dtype),
                *(f"{name}{getattr(self, name)}" for name in "TBIH"),
                *(f"layers{self.layers}", f"directions{self.directions}"),
                *(["packed"] if self.packed else []),
                *([f"projection{self.projection}"] if self.projection else []),
                *(["recompute"] if self.recompute else []),
                *([f"beside{self.beside}"] if self.beside else []),
                f"threads{self.threads}",
            ]
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Steps of each of the B sequences, in descending order."""
        if not self.packed:
            return [self.T] * self.B
        draw = random.Random(self.B)
        return sorted((draw.randint(5, self.T) for _ in range(self.B)), reverse=True)

    @property
    def operations(self) -> int:
        """Multiplications and additions in the matrix products of one call.

        A backward pass has two products for each one of the forward pass: the gradients times the
        weights, and the gradients times what the weights were multiplied by.
        """
        per_unit = 0  # inputs of one hidden unit, summed over layers and directions
        h = self.projection or self.H
        for layer in range(self.layers):
            inputs = self.I if layer == 0 else self.directions * h
            per_unit += self.directions * (inputs + h)
        weights = gates(self.cell) * self.H * per_unit
        weights += self.layers * self.directions * self.H * self.projection
        forward = 2 * weights * sum(self.lengths)
        return forward * (3 if self.mode == "training" else 1)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peers": list(self.peers)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Case:
        return Case(**{**fields, "peers": tuple(fields["peers"])})


def square(group: str, cell: str, mode: str, T: int, B: int, H: int, **options: Any) -> Case:
    """A case with as many inputs as units."""
    return Case(group, cell, mode, T, B, H, H, **options)


INFERENCE_PEERS = ("torch", "ONNX Runtime", "OpenVINO", "JAX", "TensorFlow")
TRAINING_PEERS = ("torch", "JAX", "TensorFlow")
STREAMING_PEERS = ("torch", "ONNX Runtime", "OpenVINO")


def grid() -> Iterator[Case]:
    """One layer over cells, sizes and batches."""
    for mode in ["inference", "training"]:
        for cell in CELLS:
            for H in SIZES:
                for B in BATCHES:
                    peers = INFERENCE_PEERS
                    if mode == "training":
                        # TensorFlow takes seconds to start and to compile, and is the slowest.
                        peers = TRAINING_PEERS if B <= 16 else TRAINING_PEERS[:-1]
                    yield square(mode, cell, mode, 100, B, H, peers=peers)


def streaming() -> Iterator[Case]:
    """One step per call, as in a loop that receives one input at a time: all time is overhead."""
    for cell in CELLS:
        for H in [64, 256]:
            yield square("streaming", cell, "streaming", 1, 1, H, peers=STREAMING_PEERS)
            yield square("streaming", f"{cell}Cell", "streaming", 1, 1, H)


def small() -> Iterator[Case]:
    """Training steps as in examples/forecast.py."""
    for cell in ["LSTM", "GRU"]:
        yield Case("small", cell, "training", 10, 64, 1, 64, layers=2)


def half() -> Iterator[Case]:
    """Modules in 16 bits."""
    for cell in CELLS:
        for dtype in ["bfloat16", "float16"]:
            for H in [512, 1024]:
                # A step of one row reads all weights and computes little with them: half the bytes
                # should take about half the time of fastrnn's float32.
                peers = ("torch", "fastrnn float32")
                yield square("half", cell, "inference", 100, 1, H, dtype=dtype, peers=peers)
                yield square("half", cell, "inference", 100, 16, H, dtype=dtype)
            for B in [1, 16]:
                yield square("half", cell, "training", 100, B, 256, dtype=dtype)


def float64() -> Iterator[Case]:
    for cell in CELLS:
        for mode in ["inference", "training"]:
            for B in [1, 16]:
                for H in [64, 512]:
                    yield square("float64", cell, mode, 100, B, H, dtype="float64")


def packed() -> Iterator[Case]:
    for cell in ["LSTM", "GRU"]:
        for mode in ["inference", "training"]:
            yield square("packed", cell, mode, 100, 64, 128, packed=True)


def projection() -> Iterator[Case]:
    for mode in ["inference", "training"]:
        yield square("projection", "LSTM", mode, 100, 16, 512, projection=128)


def recompute() -> Iterator[Case]:
    """Training steps that save only h and c, compared with those that save the gates too."""
    for cell in ["LSTM", "GRU"]:
        for B, H in [(1, 256), (16, 128), (16, 256), (64, 512)]:
            options = {"recompute": True, "peers": ("torch", "fastrnn keeping gates")}
            yield square("recompute", cell, "training", 100, B, H, **options)


def load() -> Iterator[Case]:
    """More threads than cores; and as many other processes as cores."""
    for cell in ["LSTM", "GRU"]:
        for mode in ["inference", "training"]:
            for B, H in [(1, 64), (1, 512), (16, 64), (16, 512)]:
                yield square("load", cell, mode, 100, B, H, threads=8)
                yield square("load", cell, mode, 100, B, H, beside=2)


# What is varied in each figure of growth.py; the other sizes are those of GROWTH_BASE.
GROWTH_BASE = {"T": 100, "B": 16, "H": 256, "threads": 2}
GROWTH_AXES: dict[str, list[int]] = {
    "T": [1, 3, 10, 30, 100, 300, 1000],
    "B": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "H": [16, 32, 64, 128, 256, 512, 1024],
    "threads": [1, 2, 4, 8],
}


def growth() -> Iterator[Case]:
    """One size varied at a time, the others fixed."""
    seen = set()
    for name, axis in GROWTH_AXES.items():
        for cell in ["LSTM", "GRU"]:
            for value in axis:
                case = square("growth", cell, "inference", **{**GROWTH_BASE, name: value})
                if case not in seen:
                    seen.add(case)
                    yield case


def lopsided() -> Iterator[Case]:
    """Large networks, and those that are far longer, wider or deeper in one size than in others."""
    sizes = [
        *({"T": 20, "B": B, "I": 2048, "H": 2048} for B in (1, 16)),
        {"T": 10, "B": 4, "I": 4096, "H": 4096},
        {"T": 100, "B": 16, "I": 2048, "H": 64},
        {"T": 100, "B": 16, "I": 16, "H": 512},
        {"T": 10_000, "B": 1, "I": 64, "H": 64},
        {"T": 20, "B": 512, "I": 64, "H": 256},
        {"T": 10, "B": 4096, "I": 64, "H": 64},
        {"T": 100, "B": 16, "I": 128, "H": 128, "layers": 8},
        {"T": 1, "B": 256, "I": 512, "H": 512},
    ]
    for mode in ["inference", "training"]:
        for cell in CELLS:
            for size in sizes:
                yield Case("lopsided", cell, mode, **size)


def sample() -> Iterator[Case]:
    """SAMPLE_ROWS different rows drawn at random from SAMPLE_AXES."""
    draw = random.Random(SAMPLE_SEED)
    seen = set()
    while len(seen) < SAMPLE_ROWS:
        case = square("sample", **{name: draw.choice(axis) for name, axis in SAMPLE_AXES.items()})
        forward = case.operations / (3 if case.mode == "training" else 1)
        if case not in seen and forward <= SAMPLE_BOUNDS[case.mode]:
            seen.add(case)
            yield case


def all_cases() -> list[Case]:
    """The rows of a full run."""
    parts = [grid(), streaming(), small(), half(), float64(), packed(), projection()]
    parts += [recompute(), load(), growth(), lopsided(), sample()]
    return [case for part in parts for case in part]


def quick_cases() -> list[Case]:
    """Some of the full run's rows, from every group: under three minutes on two cores."""

    def chosen(case: Case) -> bool:
        sizes = case.B, case.H
        if case.group == "inference":
            return sizes in {"LSTM": [(1, 64), (1, 256), (1, 1024), (16, 256)]}.get(
                case.cell, [(1, 256)]
            )
        if case.group == "training":
            return case.cell == "LSTM" and sizes in [(1, 256), (16, 256)]
        if case.group == "half":
            return case.dtype == "bfloat16" and case.cell == "LSTM" and sizes == (1, 512)
        if case.group == "float64":
            return case.cell == "LSTM" and sizes == (16, 64)
        if case.group in ("streaming", "packed"):
            return case.cell.startswith("LSTM") and case.H < 256
        if case.group in ("recompute", "load"):
            return case.cell == "LSTM" and sizes in [(16, 128), (16, 64)]
        if case.group == "growth":
            return case.cell == "LSTM" and case.T in (1, 10)
        if case.group == "lopsided":
            return case.cell == "LSTM" and case.T == 1
        return case.group in ("small", "projection")

    some = [case for case in all_cases() if chosen(case)]
    return some + list(sample())[:8]
