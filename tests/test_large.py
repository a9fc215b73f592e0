"""Tensors of more than 2^31 values: row offsets are computed in 64 bits everywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pair

pytestmark = [pytest.mark.slow, pytest.mark.once, pytest.mark.cpu("needs host memory")]

MANY = 2**31
NEEDED_BYTES = 14 << 30  # a gradient is computed in float32, then rounded to bfloat16
B = 2048
TAIL = 3  # steps whose values all lie beyond MANY


def available() -> int:
    """Bytes of memory that Linux reports as available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kilobytes * 1024


def zeros(*shape: int) -> torch.Tensor:
    """Zeros that take no memory until they are written: numpy uses calloc, torch writes them."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


def check(
    kind: str, I: int, H: int, *, values: int, train: bool = True, bidirectional: bool = False
) -> None:
    """Compares a very long sequence with its last TAIL steps alone, bitwise.

    The steps before the tail hold more than MANY values, with `values` values for each row.

    All inputs before the tail are zero and there is no bias, so the state is exactly zero when the
    tail starts, and the earlier steps add nothing to the weights' gradients.
    """
    layer, _ = pair(kind, I, H, bias=False, dtype=torch.bfloat16, bidirectional=bidirectional)
    T = MANY // (B * values) + 1 + TAIL
    assert (T - TAIL) * B * values > MANY
    x = zeros(T, B, I)
    x[-TAIL:].normal_()
    tail = x[-TAIL:].clone()
    if not train:
        with torch.no_grad():
            output, expected = layer(x)[0], layer(tail)[0]
        assert torch.equal(output[-TAIL:], expected)
        assert not output[:-TAIL].any()
        return
    output, expected = layer(x.requires_grad_())[0], layer(tail.requires_grad_())[0]
    assert torch.equal(output[-TAIL:], expected)
    cotangent = zeros(*output.shape)
    cotangent[-TAIL:].normal_()
    weights = list(layer.parameters())
    expected_grads = torch.autograd.grad(expected, [tail, *weights], cotangent[-TAIL:])
    found = torch.autograd.grad(output, [x, *weights], cotangent)
    assert all(w.abs().max() > 0.01 for w in expected_grads)
    assert torch.equal(found[0][-TAIL:], expected_grads[0])
    for a, b in zip(found[1:], expected_grads[1:], strict=True):
        assert torch.equal(a, b)


# One test, so that the cases run one after the other: each takes much memory.
@pytest.mark.skipif(available() < NEEDED_BYTES, reason="less than 14 GiB of memory are available")
def test_more_than_two_to_the_31_values():
    check("rnn_tanh", 64, 64, values=64, train=False)  # input and output
    check("rnn_tanh", 64, 1, values=64)  # input and its gradient
    check("rnn_tanh", 1, 32, values=64, bidirectional=True)  # output and its gradient
    check("lstm", 1, 64, values=4 * 64)  # gates
