"""Layers and cells with DTensors in two processes: the results of one process."""

import copy
import itertools

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, leaves, mapped, pair, random_state
from test_distributed import in_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import fastrnn

pytestmark = [pytest.mark.once, pytest.mark.cpu("uses the gloo backend on the CPU")]

BOTH = [False, True]
F64 = torch.float64
T, I, H = 4, 5, 6


def distributed(module, mesh, placements):
    """The module with its parameters replaced by DTensors."""
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
    return module


def full_tensors(nested):
    return [t.full_tensor() for t in flat(nested)]


def assert_same_as_plain_tensors(ours, theirs, args, mesh, placements, weights=None):
    """Compares results and gradients with those of plain tensors, and returns their placements.

    `placements` has one entry per argument. `weights` are the placements of the parameters, which
    are replicated by default.
    """
    replicated = [Replicate()] * mesh.ndim
    distributed(ours, mesh, weights or replicated)
    args = leaves(args)
    dtensors = [
        mapped(a, lambda t, by=by: distribute_tensor(t.detach(), mesh, by).requires_grad_())
        for a, by in zip(args, placements, strict=True)
    ]
    results, expected = flat(ours(*dtensors)), flat(theirs(*args))
    assert all(isinstance(t, DTensor) for t in results)
    assert_close(full_tensors(results), expected)
    inputs = [*flat(dtensors), *ours.parameters()]
    found = torch.autograd.grad(sum(t.square().sum() for t in results), inputs)
    expected = torch.autograd.grad(
        sum(t.square().sum() for t in expected), [*flat(args), *theirs.parameters()]
    )
    assert_close(full_tensors(found), list(expected))
    return [t.placements for t in results], [g.placements for g in found]


def layers_and_cells(_):
    torch.manual_seed(0)  # the same numbers in both processes
    mesh = init_device_mesh("cpu", (2,))
    for kind, batch, with_state in itertools.product(LAYERS, [5, 1], BOTH):
        for options in [{}, {"batch_first": True, "num_layers": 2, "bidirectional": True}]:
            batch_first = options.get("batch_first", False)
            x = torch.randn(*((batch, T) if batch_first else (T, batch)), I, dtype=F64)
            batch_sharded = [Shard(0 if batch_first else 1)]
            for by, state_by in [
                ([Replicate()], [Replicate()]),
                (batch_sharded, [Shard(1)]),
                (batch_sharded, [Replicate()]),
                ([Shard(2)], [Replicate()]),
            ]:
                ours, theirs = pair(kind, I, H, dtype=F64, **options)
                ours.recompute = with_state
                args = (x, random_state(theirs, batch)) if with_state else (x,)
                results, found = assert_same_as_plain_tensors(
                    ours, theirs, args, mesh, [by, state_by][: len(args)]
                )
                sharded = by == batch_sharded
                assert results[1:] == [(Shard(1) if sharded else Replicate(),)] * len(results[1:])
                parameters = found[-len(list(ours.parameters())) :]
                assert set(parameters) == {(Partial() if sharded else Replicate(),)}
    for kind, with_state, bias in itertools.product(CELLS, BOTH, BOTH):
        for by in [Replicate()], [Shard(0)]:
            ours, theirs = cell_pair(kind, I, H, bias=bias, dtype=F64)
            x = torch.randn(5, I, dtype=F64)
            args = (x, cell_state(theirs, 5)) if with_state else (x,)
            results, _ = assert_same_as_plain_tensors(
                ours, theirs, args, mesh, [by, by][: len(args)]
            )
            assert set(results) == {tuple(by)}


def other_placements(_):
    torch.manual_seed(0)  # the same numbers in both processes
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(T, 4, I, dtype=F64)
    for kind in LAYERS:
        # Sharded weights and gradients; a two-dimensional mesh; unbatched; packed sequences.
        ours, theirs = pair(kind, I, H, dtype=F64)
        _, found = assert_same_as_plain_tensors(
            ours, theirs, (x,), mesh, [[Shard(1)]], weights=[Shard(0)]
        )
        assert set(found[1:]) == {(Shard(0),)}
        ours, theirs = pair(kind, I, H, dtype=F64, num_layers=2)
        mesh_2d = init_device_mesh("cpu", (1, 2))
        assert_same_as_plain_tensors(ours, theirs, (x,), mesh_2d, [[Replicate(), Shard(1)]])
        ours, theirs = pair(kind, I, H, dtype=F64, bidirectional=True)
        assert_same_as_plain_tensors(ours, theirs, (x[:, 0],), mesh, [[Replicate()]])
        ours, theirs = pair(kind, I, H, dtype=F64, bidirectional=True)
        packed = pack_padded_sequence(x, [4, 3, 3, 1])
        for by in [Replicate()], [Shard(0)]:
            dtensors = PackedSequence(distribute_tensor(packed.data, mesh, by), packed.batch_sizes)
            results = distributed(ours, mesh, [Replicate()])(dtensors)
            assert_close(full_tensors(results), flat(theirs(packed)))

    # Resets, as a plain tensor and sharded with the batch; and all states.
    resets = torch.rand(T, 4) < 0.4
    for by, mask in itertools.product(
        [[Replicate()], [Shard(1)]], [resets, distribute_tensor(resets, mesh, [Shard(1)])]
    ):
        ours, _ = pair("lstm", I, H, dtype=F64, bidirectional=True)
        theirs = copy.deepcopy(ours)
        results = distributed(ours, mesh, [Replicate()])(
            distribute_tensor(x, mesh, by), resets=mask, return_states=True
        )
        expected = theirs(x, resets=resets, return_states=True)
        assert_close(full_tensors(results), flat(expected))

    # The same placements as torch's layers return, where those accept DTensors.
    for kind, by in itertools.product(["gru", "rnn_tanh", "rnn_relu"], [Replicate(), Shard(1)]):
        modules = pair(kind, I, H, dtype=F64)
        state = random_state(modules[1], 4)
        args = [distribute_tensor(t, mesh, [by]).requires_grad_() for t in [x, state]]
        placements = []
        for module in modules:
            distributed(module, mesh, [Replicate()])
            results = flat(module(*args))
            found = torch.autograd.grad(
                sum(t.sum() for t in results), [*args, *module.parameters()]
            )
            placements.append([t.placements for t in [*results, *found]])
        assert placements[0] == placements[1]

    # Training with an optimizer gives the same parameters as in one process.
    ours, theirs = pair("lstm", I, H, dtype=F64)
    distributed(ours, mesh, [Replicate()])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in [ours, theirs]]
    for _ in range(3):
        for module, optimizer in zip([ours, theirs], optimizers, strict=True):
            optimizer.zero_grad()
            input = distribute_tensor(x, mesh, [Shard(1)]) if module is ours else x
            module(input)[0].square().sum().backward()
            optimizer.step()
    assert_close(full_tensors(list(ours.parameters())), list(theirs.parameters()))

    # Mixing with plain tensors raises, except for states that do not require grad.
    layer = distributed(fastrnn.GRU(I, H), mesh, [Replicate()])
    plain = torch.randn(T, 2, I)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        layer(plain)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        layer(distribute_tensor(plain, mesh), torch.zeros(1, 2, H, requires_grad=True))


@pytest.mark.slow
@pytest.mark.parametrize("work", [layers_and_cells, other_placements])
def test_two_processes(work, tmp_path):
    in_two_processes(work, tmp_path)
