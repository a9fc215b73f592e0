"""Without kernels for a device torch's own layer runs: logged once, and every call is counted."""

import logging

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, pair

import fastrnn
from fastrnn import functional

pytestmark = [pytest.mark.once, pytest.mark.cpu("as if there were no kernels for the CPU")]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch, without_direct_calls):
    """As if this build had no kernels for the CPU, and nothing had been counted."""
    monkeypatch.setattr(functional, "_DEVICES", ())
    monkeypatch.setattr(functional, "_fallbacks", type(functional._fallbacks)())


def check(ours, theirs, args, name, caplog):
    caplog.set_level(logging.WARNING, logger="fastrnn")
    assert fastrnn.fallbacks() == {}
    for _ in range(3):
        for a, b in zip(flat(ours(*args)), flat(theirs(*args)), strict=True):
            assert torch.equal(a, b)
    assert fastrnn.fallbacks() == {f"{name} on cpu": 3}
    assert [r.getMessage() for r in caplog.records] == [
        f"{name} on cpu: this build of fastrnn has no kernels for it, torch's own are used"
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, packed, caplog):
    ours, theirs = pair(kind, 3, 4, num_layers=2, bidirectional=True, batch_first=not packed)
    x = torch.randn(5, 2, 3)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 3])
    check(ours, theirs, (x,), kind.removesuffix("_proj"), caplog)


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, caplog):
    ours, theirs = cell_pair(kind, 3, 4)
    check(ours, theirs, (torch.randn(2, 3), cell_state(theirs, 2)), f"{kind}_cell", caplog)
