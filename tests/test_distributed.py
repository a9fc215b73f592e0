"""Distributed training in two processes: gradients, parameters and checkpoints as in one."""

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

# Does not depend on the kernels. The all-reduce is gloo's.
pytestmark = [pytest.mark.once, pytest.mark.cpu("uses the gloo backend on the CPU")]

F64 = torch.float64
I, H = 5, 17


class Model(nn.Module):
    """A Linear, a layer on packed sequences, and a cell on the layer's last state."""

    def __init__(self, layer, cell):
        super().__init__()
        self.linear = nn.Linear(3, I, dtype=F64)
        self.layer, self.cell = layer, cell

    def forward(self, x):
        _, state = self.layer(x._replace(data=self.linear(x.data)))
        return flat(self.cell(flat(state)[0][-1]))[0]


def models(kind, seed=0):
    """A model of fastrnn's layers and one of torch's, with equal weights."""
    torch.manual_seed(seed)
    layers = pair(kind, I, H, num_layers=2, bidirectional=True, dtype=F64)
    cells = cell_pair(kind.removesuffix("_proj"), layers[0].proj_size or H, H, dtype=F64)
    ours, theirs = (Model(*parts) for parts in zip(layers, cells, strict=True))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(seed):
    torch.manual_seed(seed)
    return ragged([4, 1, 7, 3, 7, 2], 3, F64), torch.randn(6, H, dtype=F64)


def local_batch(x, y):
    """The three rows of a batch that belong to this process."""
    first = 3 * dist.get_rank()
    rows = slice(first, first + 3)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(x)
    local = nn.utils.rnn.pack_padded_sequence(padded[:, rows], lengths[rows], enforce_sorted=False)
    return local, y[rows]


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def full_tensors(tensors):
    """The tensors, with every DTensor gathered."""
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def train(model, theirs, steps=3):
    """Trains `model` on this process's rows and `theirs` on all rows, and compares them.

    Returns both optimizers.
    """
    optimizers = [make_optimizer(m) for m in [model, theirs]]
    for number in range(steps):
        x, y = batch(number)
        step(model, optimizers[0], *local_batch(x, y))
        step(theirs, optimizers[1], x, y)
        found, expected = (list(m.parameters()) for m in [model, theirs])
        assert_close(full_tensors(p.grad for p in found), [p.grad for p in expected])
        assert_close(full_tensors(found), expected)
    return optimizers


def shard(model):
    for module in [model.layer, model.cell, model]:
        fully_shard(module)
    return model


def in_two_processes(work, folder):
    """Runs work(folder) in two single-threaded processes."""
    multiprocessing.spawn(join, args=(work, folder), nprocs=2)


def join(rank, work, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(folder)
    dist.destroy_process_group()


# ---- run in both processes -----------------------------------------------------------------------


def data_parallel():
    for kind in LAYERS:
        ours, theirs = models(kind)
        train(DistributedDataParallel(ours), theirs)
    train(DistributedDataParallel(copy.deepcopy(theirs)), theirs)  # torch's layers, as a check
    for option in ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"]:
        ours, theirs = models("lstm")
        train(DistributedDataParallel(ours, **{option: True}), theirs)

    # Gradient accumulation over two batches with a single all-reduce.
    ours, theirs = models("gru")
    model = DistributedDataParallel(ours)
    for number in range(2):
        x, y = batch(number)
        nn.functional.mse_loss(theirs(x), y).backward()
        x, y = local_batch(x, y)
        if number == 0:
            with model.no_sync():
                nn.functional.mse_loss(model(x), y).backward()
        else:
            nn.functional.mse_loss(model(x), y).backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def fully_sharded():
    # FSDP2 warns if a sharded module returns a view. The cell is sharded by itself.
    warnings.simplefilter("error")
    for kind in LAYERS:
        ours, theirs = models(kind)
        ours.layer.recompute = kind == "lstm"  # its backward also needs the weights for recompute
        train(shard(ours), theirs)
        assert ours.layer.weight_hh_l0.to_local().shape[0] < theirs.layer.weight_hh_l0.shape[0]
    train(shard(copy.deepcopy(theirs)), theirs)  # torch's layers, as a check


def train_both_ways(folder):
    data_parallel()
    fully_sharded()


def save_and_load(folder):
    ours, theirs = models("lstm")
    optimizer, _ = train(shard(ours), theirs)
    state = dict(zip(["model", "optimizer"], get_state_dict(ours, optimizer), strict=True))
    checkpoint.save(state, checkpoint_id=folder / "sharded")

    # Load into another model, and continue training both.
    other = shard(models("lstm", seed=1)[0])
    other_optimizer = make_optimizer(other)
    state = dict(zip(["model", "optimizer"], get_state_dict(other, other_optimizer), strict=True))
    checkpoint.load(state, checkpoint_id=folder / "sharded")
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    x, y = local_batch(*batch(9))
    for model, its_optimizer in [(ours, optimizer), (other, other_optimizer)]:
        step(model, its_optimizer, x, y)
    assert_close(full_tensors(other.parameters()), full_tensors(ours.parameters()), rtol=0, atol=0)

    # Save an unsharded model.
    checkpoint.save({"model": theirs.state_dict()}, checkpoint_id=folder / "full_tensors")


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_and_parameters_equal_those_of_one_process(tmp_path):
    in_two_processes(train_both_ways, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints(tmp_path):
    """Saved by two processes; loaded by two and by one, into fastrnn's layers and torch's."""
    in_two_processes(save_and_load, tmp_path)
    x, _ = batch(5)
    results = []
    for name in ["sharded", "full_tensors"]:
        for model in models("lstm", seed=2):
            state = {"model": model.state_dict()}
            before = model(x)
            checkpoint.load(state, checkpoint_id=tmp_path / name, no_dist=True)
            model.load_state_dict(state["model"])
            results.append(model(x))
            assert not torch.allclose(results[-1], before)
    for found in results[1:]:
        assert_close(found, results[0])
