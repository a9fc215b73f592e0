"""Bitwise determinism across runs and numbers of threads, and batch invariance."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    affordable,
    cell_pair,
    cell_state,
    device,
    flat,
    gradients,
    leaves,
    pair,
    ragged,
)
from helpers import random_state as layer_state
from torch.nn.utils.rnn import PackedSequence

#: Numbers of CPU threads. On CUDA they make no difference.
THREADS = [1, 2, 8] if device() == "cpu" else [2]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

BATCH_DEPENDENT = "on CUDA, cuBLAS chooses the order of summation by the sizes of the product"

#: (T, B, I, H): odd sizes, one row, one step, more rows than a tile, units for several threads
SIZES = [
    (7, 3, 5, 17),
    (5, 1, 33, 64),
    (1, 40, 33, 17),
    (3, 40, 16, 33),
    (4, 4, 64, 256),
    (12, 20, 17, 192),
]


def results(layer, args):
    """Outputs with and without grad mode, and gradients of inputs and weights."""
    outputs = flat(layer(*args))
    inputs = flat(args)
    found = gradients(outputs, [*inputs, *layer.parameters()])
    with torch.no_grad():
        inference = flat(layer(*args))
    return [*outputs, *inference, *found]


def assert_same_bits(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"tensor {i}: {(a != b).sum()} of {a.numel()} differ"


def arguments(layer, T, B, I, packed=False):
    dtype = next(layer.parameters()).dtype
    if packed:
        x = ragged([1 + (5 * b) % T for b in range(B)], I, dtype)
    else:
        x = torch.randn(T, B, I, dtype=dtype)
    return leaves((x, layer_state(layer, B)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_runs_and_threads(kind, dtype, packed):
    for T, B, I, H in affordable(SIZES):
        for bidirectional in [False, True]:
            layer, _ = pair(kind, I, H, bidirectional=bidirectional, dtype=dtype)
            args = arguments(layer, T, B, I, packed)
            torch.set_num_threads(THREADS[0])
            first = results(layer, args)
            for threads in THREADS:
                torch.set_num_threads(threads)
                assert_same_bits(results(layer, args), first)


@pytest.mark.cpu("on CUDA, second derivatives are torch's operators")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(kind, packed):
    for T, B, I, H in affordable(SIZES):
        layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
        args = arguments(layer, T, B, I, packed)
        inputs = [*flat(args), *layer.parameters()]
        found = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            loss = sum(t.sin().sum() for t in flat(layer(*args)))
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            found.append(gradients(first, inputs))
        for other in found[1:]:
            assert_same_bits(other, found[0])


@pytest.mark.cpu(BATCH_DEPENDENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_invariance(kind, dtype):
    """The results of a row do not depend on the other rows of the batch or their number."""
    # One step; slices of up to 8 rows, for which backward may not pack the weights, and of more.
    sizes = [(1, 9, 33, 64), (1, 40, 33, 17), (4, 12, 128, 256)]
    for T, B, I, H in [(5, 17, 5, 17), (3, 9, 33, 64), (2, 40, 16, 33), *sizes]:
        layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True, dtype=dtype)
        x, state = arguments(layer, T, B, I)
        whole = flat(layer(x, state))
        cotangents = [torch.randn_like(t) for t in whole]
        inputs = [x, *flat(state)]
        whole_grads = torch.autograd.grad(whole, inputs, cotangents)
        for rows in [slice(0, 1), slice(B - 1, B), slice(2, 5), slice(1, B)]:
            some = [t[:, rows].detach().clone().requires_grad_() for t in inputs]
            hx = tuple(some[1:]) if len(some) == 3 else some[1]
            part = flat(layer(some[0], hx))
            assert_same_bits(part, [t[:, rows] for t in whole])
            grads = torch.autograd.grad(part, some, [t[:, rows] for t in cotangents])
            assert_same_bits(grads, [t[:, rows] for t in whole_grads])
            with torch.no_grad():
                assert_same_bits(flat(layer(some[0], hx)), [t[:, rows] for t in whole])


@pytest.mark.cpu(BATCH_DEPENDENT)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_equals_padded(kind):
    """Sequences of equal length give the same bits packed and padded."""
    for T, B, I, H in [(5, 17, 5, 17), (4, 1, 33, 64)]:
        layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
        x, state = arguments(layer, T, B, I)
        packed = PackedSequence(x.flatten(0, 1), torch.full((T,), B))
        output, last = layer(x, state)
        assert_same_bits(flat(layer(packed, state)), [output.flatten(0, 1), *flat(last)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, dtype):
    for B, I, H in [(3, 5, 17), (17, 33, 64), (40, 64, 256)]:
        cell, _ = cell_pair(kind, I, H, dtype=dtype)
        x, state = leaves((torch.randn(B, I, dtype=dtype), cell_state(cell, B)))
        torch.set_num_threads(THREADS[0])
        first = results(cell, (x, state))
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert_same_bits(results(cell, (x, state)), first)
        if device() == "cuda":
            continue
        rows = slice(1, 2)
        alone = [t[rows] for t in flat(state)]
        hx = tuple(alone) if len(alone) == 2 else alone[0]
        outputs = flat(cell(x, state))
        assert_same_bits(flat(cell(x[rows], hx)), [t[rows] for t in outputs])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_does_not_depend_on_threads(kind):
    layer, _ = pair(kind, 16, 33, num_layers=3, dropout=0.5, bidirectional=True)
    args = arguments(layer, 6, 20, 16)
    found = []
    for threads in [*THREADS, THREADS[0]]:
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        outputs = flat(layer(*args))
        found.append([*outputs, *gradients(outputs, [*flat(args), *layer.parameters()])])
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.once
@pytest.mark.cpu("OpenMP's threads")
@pytest.mark.parametrize("limit", [*(pytest.param(n, marks=pytest.mark.slow) for n in [1, 2]), 3])
def test_fewer_openmp_threads_than_requested(limit, tmp_path):
    """OpenMP may start fewer threads than requested: no barrier waits for missing threads."""
    code = """
import sys, torch, fastrnn
torch.set_num_threads(4)
fastrnn._C.adapt_threads(False)  # as many as that, on any machine
torch.manual_seed(0)
layer = fastrnn.LSTM(8, 300)
x = torch.randn(9, 5, 8)
layer(x)[0].sum().backward()
torch.save([layer(x)[0].detach(), *(p.grad for p in layer.parameters())], sys.argv[1])
"""
    results = []
    for threads in [limit, 64]:
        file = tmp_path / f"{threads}.pt"
        environment = {**os.environ, "OMP_THREAD_LIMIT": str(threads)}
        command = [sys.executable, "-c", code, str(file)]
        subprocess.run(command, env=environment, check=True, timeout=120)
        results.append(torch.load(file))
    assert_same_bits(*results)
