"""The rows of bench/gpu.py: what is computed in each, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator

from cases import Case, square

SIZES = [64, 128, 256, 512, 1024, 2048]
BATCHES = [1, 8, 32, 64, 256]
DTYPES = ["float32", "float16", "bfloat16"]
FULL = (
    "full float32"  # products of float32 are not rounded to TF32, as torch's layers do by default
)
GROUPS = ["inference", "training", "streaming", "bidirectional", "packed", FULL, "compiled"]

# nn.LSTM and nn.GRU run on cuDNN. A graph is recorded once and replayed, so that a call costs no
# launches from the host. haste has neither 16 bits nor RNN.
INFERENCE_PEERS = ("torch", "torch in a graph", "fastrnn in a graph", "fastrnn stepwise", "haste")
TRAINING_PEERS = ("torch", "fastrnn stepwise", "haste")


def grid() -> Iterator[Case]:
    for mode, peers in [("inference", INFERENCE_PEERS), ("training", TRAINING_PEERS)]:
        for cell in ["LSTM", "GRU"]:
            for dtype in DTYPES:
                for H in SIZES:
                    if dtype == "bfloat16" and H not in (256, 1024):
                        continue  # the same kernels as for float16
                    for B in BATCHES:
                        # Both paths where they are about equally fast.
                        both = ("fastrnn persistent",) if B >= 64 else ()
                        yield square(mode, cell, mode, 100, B, H, dtype=dtype, peers=peers + both)
                        if dtype == "float32" and H <= 512 and B in (1, 32):
                            yield square(FULL, cell, mode, 100, B, H, peers=peers)
        for H in [128, 512]:
            yield square(mode, "RNN", mode, 100, 32, H, peers=peers)
            yield square(mode, "LSTM", mode, 100, 32, H, dtype="float64", peers=peers)


def others() -> Iterator[Case]:
    for cell in ["LSTM", "GRU"]:
        for H in [64, 256, 1024]:
            yield square("streaming", cell, "streaming", 1, 1, H)
            yield square("streaming", f"{cell}Cell", "streaming", 1, 1, H)
        for mode in ["inference", "training"]:
            for H in [128, 512]:
                for dtype in ["float32", "float16"]:
                    options = {"dtype": dtype, "directions": 2}
                    yield square("bidirectional", cell, mode, 100, 32, H, **options)
                yield square("packed", cell, mode, 100, 64, H, packed=True)


def compiled() -> Iterator[Case]:
    # A compiled loop in Python takes a minute to start.
    for H in [128, 512]:
        yield square("compiled", "LSTM", "inference", 20, 32, H, peers=("torch", "compiled loop"))


def all_cases() -> list[Case]:
    return [*others(), *grid(), *compiled()]


def quick_cases() -> list[Case]:
    """Some of the rows, from every group but the compiled one."""

    def chosen(case: Case) -> bool:
        if case.group in ("inference", "training"):
            return case.dtype != "bfloat16" and (case.B, case.H) in [(1, 256), (32, 128), (64, 512)]
        return case.group != "compiled" and case.H <= 256

    return [case for case in all_cases() if chosen(case)]


def toy_cases() -> list[Case]:
    """One row of each kind, small enough for an emulated GPU: they test the benchmark itself."""
    return [
        square(
            "inference",
            "LSTM",
            "inference",
            3,
            2,
            16,
            peers=(*INFERENCE_PEERS, "fastrnn persistent"),
        ),
        square("training", "GRU", "training", 3, 2, 16, dtype="float16", peers=TRAINING_PEERS),
        square("streaming", "LSTM", "streaming", 1, 1, 16),
        square("streaming", "GRUCell", "streaming", 1, 1, 16),
        square("bidirectional", "LSTM", "training", 3, 2, 16, directions=2),
        square("packed", "GRU", "inference", 6, 3, 16, packed=True),
    ]
