"""What is kept for backward: never more than torch's layers keep."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, pair

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from memory import saved_bytes


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "dropout": 0.2}, {"bidirectional": True}]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_saved_bytes(kind, options, dtype):
    ours, theirs = pair(kind, 32, 64, dtype=dtype, **options)
    x = torch.randn(20, 16, 32, dtype=dtype)
    kept = saved_bytes(ours, x)
    assert kept >= 20 * 16 * 64 * dtype.itemsize  # at least the output: the count counts
    assert kept <= saved_bytes(theirs, x)


@pytest.mark.once
def test_nothing_is_kept_without_grad():
    ours, _ = pair("lstm", 32, 64)
    with torch.no_grad():
        assert saved_bytes(ours, torch.randn(20, 16, 32)) == 0
