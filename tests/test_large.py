"""Tensors of more than 2^31 values: offsets are 64 bits wide wherever a row's place is computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pair

pytestmark = [pytest.mark.slow, pytest.mark.once, pytest.mark.cpu("the memory beside the CPU")]

MANY = 2**31
NEEDED = 14 << 30  # bytes: a gradient is made in float32 before it becomes bfloat16
B = 2048
TAIL = 3  # steps, all of whose values lie beyond


def available() -> int:
    """Bytes of memory that Linux could give now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kilobytes * 1024


def zeros(*shape: int) -> torch.Tensor:
    """That take no memory until they are written: numpy does not write them, torch would."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


def check(
    kind: str, I: int, H: int, *, values: int, train: bool = True, bidirectional: bool = False
) -> None:
    """Of enough steps that there are MANY `values` a row before the last ones.

    All inputs are zero but those of the last steps, and there is no bias: whatever comes before,
    the state is exactly zero there, and so is what it adds to the gradients of the weights. The
    last steps are then those of a sequence that is no longer, bit by bit. Zeros that nobody has
    written take no memory.
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
    wanted = torch.autograd.grad(expected, [tail, *weights], cotangent[-TAIL:])
    found = torch.autograd.grad(output, [x, *weights], cotangent)
    assert all(w.abs().max() > 0.01 for w in wanted)
    assert torch.equal(found[0][-TAIL:], wanted[0])
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(a, b)


# One after the other, for the memory that they take.
@pytest.mark.skipif(available() < NEEDED, reason="less than 14 GiB of memory are available")
def test_more_than_two_to_the_31_values():
    check("rnn_tanh", 64, 64, values=64, train=False)  # of input and output
    check("rnn_tanh", 64, 1, values=64)  # of input and its gradient
    check("rnn_tanh", 1, 32, values=64, bidirectional=True)  # of output and its gradient
    check("lstm", 1, 64, values=4 * 64)  # of gates
