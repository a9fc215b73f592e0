"""Memory layouts: strided tensors give the right results, and no byte out of bounds is read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import OPERATOR_CELLS, flat, host_tensor
from test_ops import backward_arguments, sample

import fastrnn
from fastrnn import ops, reference

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("cell", OPERATOR_CELLS)
def test_odd_layouts(cell):
    """Expanded, overlapping, transposed and sliced tensors, and batch_sizes with strides."""
    cell, x, h0, c0, weights, _, bias, *_ = sample(cell)
    x = torch.randn(5).expand(4, 3, 5)
    h0 = torch.randn(17).expand(1, 3, 17)
    c0 = None if c0 is None else torch.randn(20).as_strided((1, 3, 17), (0, 1, 1))
    weights = [0.2 * torch.randn(w.shape[::-1]).permute(*range(w.dim())[::-1]) for w in weights]
    options = {"has_biases": bias, "num_layers": 1, "bidirectional": False}
    found = fastrnn.functional.rnn(cell, x, h0, c0, weights, **options)
    exact = reference.run(cell, x, h0, c0, weights, **options)
    torch.testing.assert_close(found[0], exact[0])
    sizes = host_tensor([3, 9, 3, 9, 2, 9, 1, 9])[::2]
    data = torch.randn(5, 9).t()
    found = fastrnn.functional.rnn(cell, data, h0, c0, weights, sizes, **options)
    exact = reference.run(cell, data, h0, c0, weights, sizes.contiguous(), **options)
    torch.testing.assert_close(found[0], exact[0])


def spread(t):
    """The same values at stride 2 in a larger tensor, with NaN or 7 between them."""
    if t.numel() == 0:
        return t
    between = float("nan") if t.is_floating_point() else 7
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), between)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def each(arguments, change):
    """The arguments with `change` applied to every tensor."""

    def changed(a):
        if isinstance(a, list):
            return [changed(b) for b in a]
        return change(a) if isinstance(a, torch.Tensor) else a

    return [changed(a) for a in arguments]


def both_ways(arguments):
    """(operator, arguments) for a forward call and for the backward call of its saved tensors."""
    return [(ops.forward, [*arguments, True]), (ops.backward, backward_arguments(arguments))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", OPERATOR_CELLS)
def test_strides_do_not_change_results(cell, packed):
    P = 3 if OPERATOR_CELLS[cell]["allows_projection"] else 0
    for operator, arguments in both_ways(
        sample(cell, packed=packed, L=2, D=2, P=P, dropout=0.5, train=True)
    ):
        for change in [spread, lambda t: torch._neg_view(-t) if t.dtype != torch.uint8 else t]:
            results = []
            for call_arguments in [arguments, each(arguments, change)]:
                torch.manual_seed(3)
                results.append(flat(operator(*call_arguments)))
            for found, expected in zip(*results, strict=True):
                assert torch.equal(found, expected)


GUARDED = """
import ctypes, mmap, sys
import torch
from test_layouts import both_ways, each
from test_ops import sample
import fastrnn

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE
maps = []

def guarded(t, at_end):
    "A copy that ends at the guard page after it, or starts at the one before it."
    n = t.numel() * t.element_size()
    if n == 0:
        return t
    size = -(-n // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, size + 2 * PAGE, 0, flags, -1, 0)
    maps.append((start, size + 2 * PAGE))
    assert libc.mprotect(start + PAGE, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    address = start + PAGE + (size - n if at_end else 0)
    copy = torch.frombuffer((ctypes.c_char * n).from_address(address), dtype=t.dtype).view(t.shape)
    return copy.copy_(t)

for cell in fastrnn.CELLS:
    for packed in [False, True]:
        for P in [0, 3] if fastrnn.CELLS[cell]["allows_projection"] else [0]:
            for dtype in [torch.float32, torch.float64, torch.bfloat16]:
                arguments = sample(
                    cell, packed=packed, L=2, D=2, P=P, dropout=0.5, train=True, dtype=dtype
                )
                for operator, args in both_ways(arguments):
                    for at_end in [False, True]:
                        operator(*each(args, lambda t: guarded(t, at_end)))
                        while maps:
                            libc.munmap(*maps.pop())
print("all read within bounds", flush=True)  # the process may crash next
if "overrun" in sys.argv:
    ctypes.string_at(guarded(torch.zeros(3), True).data_ptr(), 13)
"""


@pytest.mark.cpu("the virtual GPU detects out-of-bounds reads itself")
@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mmap flags")
def test_no_out_of_bounds_reads():
    """Every tensor borders an unreadable page, so an out-of-bounds read is a segmentation fault."""
    command = [sys.executable, "-c", GUARDED, "overrun"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [FOLDER.parent, FOLDER]))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "all read within bounds" in result.stdout, (result.returncode, result.stderr[-2000:])
    assert result.returncode == -signal.SIGSEGV  # the guard page caught the last line
