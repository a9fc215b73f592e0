"""Layers and cells of DTensors, in two processes: the numbers of one."""

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

pytestmark = [pytest.mark.once, pytest.mark.cpu("processes of the CPU")]

BOTH = [False, True]
F64 = torch.float64
T, I, H = 4, 5, 6


def distributed(module, mesh, placements):
    """The module with DTensors for parameters."""
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
    return module


def whole(nested):
    return [t.full_tensor() for t in flat(nested)]


def assert_same_as_one(ours, theirs, args, mesh, placements, weights=None):
    """Compares results and gradients with those of plain tensors, and returns their placements.

    `placements` are those of `args`, `weights` those of the parameters, replicated if not given.
    """
    replicated = [Replicate()] * mesh.ndim
    distributed(ours, mesh, weights or replicated)
    args = leaves(args)
    mine = [
        mapped(a, lambda t, by=by: distribute_tensor(t.detach(), mesh, by).requires_grad_())
        for a, by in zip(args, placements, strict=True)
    ]
    results, expected = flat(ours(*mine)), flat(theirs(*args))
    assert all(isinstance(t, DTensor) for t in results)
    assert_close(whole(results), expected)
    wanted = [*flat(mine), *ours.parameters()]
    found = torch.autograd.grad(sum(t.square().sum() for t in results), wanted)
    one = torch.autograd.grad(
        sum(t.square().sum() for t in expected), [*flat(args), *theirs.parameters()]
    )
    assert_close(whole(found), list(one))
    return [t.placements for t in results], [g.placements for g in found]


def layers_and_cells(_):
    torch.manual_seed(0)  # the same numbers in both
    mesh = init_device_mesh("cpu", (2,))
    for kind, batch, given in itertools.product(LAYERS, [5, 1], BOTH):
        for options in [{}, {"batch_first": True, "num_layers": 2, "bidirectional": True}]:
            first = options.get("batch_first", False)
            x = torch.randn(*((batch, T) if first else (T, batch)), I, dtype=F64)
            of_batch = [Shard(0 if first else 1)]
            for by, by_state in [
                ([Replicate()], [Replicate()]),
                (of_batch, [Shard(1)]),
                (of_batch, [Replicate()]),
                ([Shard(2)], [Replicate()]),
            ]:
                ours, theirs = pair(kind, I, H, dtype=F64, **options)
                ours.recompute = given
                args = (x, random_state(theirs, batch)) if given else (x,)
                results, found = assert_same_as_one(
                    ours, theirs, args, mesh, [by, by_state][: len(args)]
                )
                sharded = by == of_batch
                assert results[1:] == [(Shard(1) if sharded else Replicate(),)] * len(results[1:])
                parameters = found[-len(list(ours.parameters())) :]
                assert set(parameters) == {(Partial() if sharded else Replicate(),)}
    for kind, given, bias in itertools.product(CELLS, BOTH, BOTH):
        for by in [Replicate()], [Shard(0)]:
            ours, theirs = cell_pair(kind, I, H, bias=bias, dtype=F64)
            x = torch.randn(5, I, dtype=F64)
            args = (x, cell_state(theirs, 5)) if given else (x,)
            results, _ = assert_same_as_one(ours, theirs, args, mesh, [by, by][: len(args)])
            assert set(results) == {tuple(by)}


def others(_):
    torch.manual_seed(0)  # the same numbers in both
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(T, 4, I, dtype=F64)
    for kind in LAYERS:
        # Sharded weights, whose gradients are too, in a mesh of two dimensions, unbatched, packed.
        ours, theirs = pair(kind, I, H, dtype=F64)
        _, found = assert_same_as_one(ours, theirs, (x,), mesh, [[Shard(1)]], weights=[Shard(0)])
        assert set(found[1:]) == {(Shard(0),)}
        ours, theirs = pair(kind, I, H, dtype=F64, num_layers=2)
        plane = init_device_mesh("cpu", (1, 2))
        assert_same_as_one(ours, theirs, (x,), plane, [[Replicate(), Shard(1)]])
        ours, theirs = pair(kind, I, H, dtype=F64, bidirectional=True)
        assert_same_as_one(ours, theirs, (x[:, 0],), mesh, [[Replicate()]])
        ours, theirs = pair(kind, I, H, dtype=F64, bidirectional=True)
        packed = pack_padded_sequence(x, [4, 3, 3, 1])
        for by in [Replicate()], [Shard(0)]:
            mine = PackedSequence(distribute_tensor(packed.data, mesh, by), packed.batch_sizes)
            results = distributed(ours, mesh, [Replicate()])(mine)
            assert_close(whole(results), flat(theirs(packed)))

    # Where torch's layer takes DTensors, theirs of the same placements.
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

    # A model of one is trained by its gradients.
    ours, theirs = pair("lstm", I, H, dtype=F64)
    distributed(ours, mesh, [Replicate()])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in [ours, theirs]]
    for _ in range(3):
        for module, optimizer in zip([ours, theirs], optimizers, strict=True):
            optimizer.zero_grad()
            mine = distribute_tensor(x, mesh, [Shard(1)]) if module is ours else x
            module(mine)[0].square().sum().backward()
            optimizer.step()
    assert_close(whole(list(ours.parameters())), list(theirs.parameters()))

    # Plain tensors among them, but for states that are constants.
    layer = distributed(fastrnn.GRU(I, H), mesh, [Replicate()])
    plain = torch.randn(T, 2, I)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        layer(plain)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        layer(distribute_tensor(plain, mesh), torch.zeros(1, 2, H, requires_grad=True))


@pytest.mark.slow
@pytest.mark.parametrize("work", [layers_and_cells, others])
def test_two_processes(work, tmp_path):
    in_two_processes(work, tmp_path)
