"""Trains small layers on every CUDA path under compute-sanitizer, on a real GPU.

    python tests/gpu_sanitizer.py

memcheck finds out-of-bounds accesses, racecheck shared memory hazards, synccheck divergent
barriers. initcheck is not used: it does not see cuBLAS's bulk stores and reports what they wrote as
uninitialised. compute-sanitizer comes with the CUDA toolkit. The test suite runs under the
emulator's own checks (docs/cuda.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import torch

import fastrnn

TOOLS = ["memcheck", "racecheck", "synccheck"]
CELLS = ["LSTM", "GRU", "RNN"]
PATHS = ["persistent", "stepwise"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# H, B, T, bidirectional, TF32: for one block and for many, with and without partial tiles.
SIZES = [
    (17, 3, 5, True, False),
    (64, 1, 6, False, True),
    (128, 33, 4, False, True),
    (256, 8, 4, True, False),
]


def train_layers() -> None:
    calls = 0
    for path, dtype, cell, size in product(PATHS, DTYPES, CELLS, SIZES):
        if path == "persistent" and dtype == torch.float64:  # not supported
            continue
        H, B, T, bidirectional, tf32 = size
        os.environ["FASTRNN_CUDA_PATH"] = path
        torch.backends.cudnn.allow_tf32 = tf32
        layer = getattr(fastrnn, cell)(H, H, bidirectional=bidirectional).to("cuda", dtype)
        x = torch.randn(T, B, H, device="cuda", dtype=dtype, requires_grad=True)
        layer(x)[0].sum().backward()
        torch.cuda.synchronize()
        calls += 1
    print(f"trained {calls} layers for one step each on {torch.cuda.get_device_name()}")


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_sanitizer: torch finds no GPU", file=sys.stderr)
        return 2
    failed = []
    for tool in TOOLS:
        print(f"{tool}:", flush=True)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        if subprocess.run([*command, sys.executable, __file__, "--layers"], check=False).returncode:
            failed.append(tool)
    print("compute-sanitizer: " + (f"reports by {', '.join(failed)}" if failed else "no report"))
    return bool(failed)


if __name__ == "__main__":
    if "--layers" in sys.argv:
        train_layers()
    else:
        sys.exit(main())
