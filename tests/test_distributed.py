"""Two processes that train together: the gradients, parameters and checkpoints of one."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import LAYERS, cell_pair, flat, pair, ragged
from torch import multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

# The sums over processes are gloo's; what the layers do there comes before any kernel.
pytestmark = [pytest.mark.once, pytest.mark.cpu("processes of the CPU")]

F64 = torch.float64
I, H = 5, 17


class Model(nn.Module):
    """A Linear, a layer of packed sequences, and a cell on its last state."""

    def __init__(self, layer, cell):
        super().__init__()
        self.linear = nn.Linear(3, I, dtype=F64)
        self.layer, self.cell = layer, cell

    def forward(self, x):
        _, state = self.layer(x._replace(data=self.linear(x.data)))
        return flat(self.cell(flat(state)[0][-1]))[0]


def models(kind, seed=0):
    """fastrnn's and torch's, with equal weights."""
    torch.manual_seed(seed)
    layers = pair(kind, I, H, num_layers=2, bidirectional=True, dtype=F64)
    cells = cell_pair(kind.removesuffix("_proj"), layers[0].proj_size or H, H, dtype=F64)
    ours, theirs = (Model(*parts) for parts in zip(layers, cells, strict=True))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(seed):
    torch.manual_seed(seed)
    return ragged([4, 1, 7, 3, 7, 2], 3, F64), torch.randn(6, H, dtype=F64)


def share(x, y):
    """Of a batch, the three rows of a process."""
    first = 3 * dist.get_rank()
    rows = slice(first, first + 3)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(x)
    mine = nn.utils.rnn.pack_padded_sequence(padded[:, rows], lengths[rows], enforce_sorted=False)
    return mine, y[rows]


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def whole(tensors):
    """Those of which each process has a part."""
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def train(model, theirs, steps=3):
    """Trains the model on this process's rows, torch's on all, and compares. The optimizers."""
    optimizers = [optimizer_of(m) for m in [model, theirs]]
    for number in range(steps):
        x, y = batch(number)
        step(model, optimizers[0], *share(x, y))
        step(theirs, optimizers[1], x, y)
        found, expected = (list(m.parameters()) for m in [model, theirs])
        assert_close(whole(p.grad for p in found), [p.grad for p in expected])
        assert_close(whole(found), expected)
    return optimizers


def shard(model):
    for part in [model.layer, model.cell, model]:
        fully_shard(part)
    return model


def in_two_processes(work, folder):
    """Runs work(folder) in two processes of a thread each."""
    multiprocessing.spawn(join, args=(work, folder), nprocs=2)


def join(rank, work, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(folder)
    dist.destroy_process_group()


# ---- what the two processes do -------------------------------------------------------------------


def data_parallel():
    for kind in LAYERS:
        ours, theirs = models(kind)
        train(DistributedDataParallel(ours), theirs)
    train(DistributedDataParallel(copy.deepcopy(theirs)), theirs)  # torch's can do it
    for option in ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"]:
        ours, theirs = models("lstm")
        train(DistributedDataParallel(ours, **{option: True}), theirs)

    # Gradients of two batches, summed over the processes once.
    ours, theirs = models("gru")
    model = DistributedDataParallel(ours)
    for number in range(2):
        x, y = batch(number)
        nn.functional.mse_loss(theirs(x), y).backward()
        mine, wanted = share(x, y)
        if number == 0:
            with model.no_sync():
                nn.functional.mse_loss(model(mine), wanted).backward()
        else:
            nn.functional.mse_loss(model(mine), wanted).backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def fully_sharded():
    # FSDP2 warns where a module returns a view, such as a cell that is sharded by itself.
    warnings.simplefilter("error")
    for kind in LAYERS:
        ours, theirs = models(kind)
        ours.layer.recompute = kind == "lstm"  # whose backward needs the weights for more
        train(shard(ours), theirs)
        assert ours.layer.weight_hh_l0.to_local().shape[0] < theirs.layer.weight_hh_l0.shape[0]
    train(shard(copy.deepcopy(theirs)), theirs)  # torch's can do it


def both(folder):
    data_parallel()
    fully_sharded()


def saved_and_loaded(folder):
    ours, theirs = models("lstm")
    optimizer, _ = train(shard(ours), theirs)
    state = dict(zip(["model", "optimizer"], get_state_dict(ours, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder / "sharded")

    # Into others, with which the training goes on.
    other = shard(models("lstm", seed=1)[0])
    optimizer_of_other = optimizer_of(other)
    state = dict(
        zip(["model", "optimizer"], get_state_dict(other, optimizer_of_other), strict=True)
    )
    checkpoint.load(state, checkpoint_id=folder / "sharded")
    set_state_dict(
        other,
        optimizer_of_other,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    x, y = share(*batch(9))
    for model, how in [(ours, optimizer), (other, optimizer_of_other)]:
        step(model, how, x, y)
    assert_close(whole(other.parameters()), whole(ours.parameters()), rtol=0, atol=0)

    # And of a model that every process has all of.
    checkpoint.save({"model": theirs.state_dict()}, checkpoint_id=folder / "whole")


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_and_parameters_are_those_of_one_process(tmp_path):
    in_two_processes(both, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints(tmp_path):
    """Saved by two processes, loaded by two and by one, by fastrnn's layers and by torch's."""
    in_two_processes(saved_and_loaded, tmp_path)
    x, _ = batch(5)
    results = []
    for name in ["sharded", "whole"]:
        for model in models("lstm", seed=2):
            state = {"model": model.state_dict()}
            before = model(x)
            checkpoint.load(state, checkpoint_id=tmp_path / name, no_dist=True)
            model.load_state_dict(state["model"])
            results.append(model(x))
            assert not torch.allclose(results[-1], before)
    for found in results[1:]:
        assert_close(found, results[0])
