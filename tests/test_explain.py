"""fastrnn.explain reports how a layer will be computed."""

import re

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, pair, ragged
from torch import nn

import fastrnn

pytestmark = pytest.mark.once


def facts(capsys, *args):
    """The printed blocks as {"lstm, layer 0, forward": {"path": ...}, ...}."""
    fastrnn.explain(*args)
    blocks, current = {}, {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            name, value = line.strip().split(": ", 1)
            current[name] = value
        else:
            current = blocks.setdefault(line, {})
    return blocks


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, packed, capsys):
    layer, _ = pair(kind, 5, 17, num_layers=2, bidirectional=True)
    x = ragged([3, 1], 5) if packed else torch.randn(3, 2, 5)
    found = facts(capsys, layer, x)
    assert len(found) == 4
    for block, values in found.items():
        assert re.fullmatch(r"\w+, layer [01], (forward|backward)", block)
        assert values["path"]


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, capsys):
    cell, _ = cell_pair(kind, 5, 17, bias=False)
    for x in [torch.randn(5), torch.randn(3, 5)]:
        assert len(facts(capsys, cell, x)) == 2


def test_on_the_cpu(capsys):
    layer = fastrnn.LSTM(64, 512, device="cpu")
    x = torch.randn(9, 1, 64, device="cpu")
    torch.set_num_threads(2)
    forward = facts(capsys, layer, x)["lstm, layer 0, forward"]
    assert forward["path"] == "cpu"
    assert forward["instruction set"] == fastrnn.build_info()["isa"]
    assert forward["partition"] == (
        "2 threads: 1 direction x 1 part of the rows x 2 parts of the units"
    )
    assert forward["barriers a step"] == "1"
    assert forward["operands"] == "packed weights"
    torch.set_num_threads(1)
    forward = facts(capsys, layer, x[:1])["lstm, layer 0, forward"]
    assert forward["partition"] == "1 thread"
    assert forward["barriers a step"] == "0"
    assert forward["operands"] == "unpacked weights"


@pytest.mark.parametrize(
    ("rows", "options", "partition"),
    [
        (16, {}, "1 direction x 1 part of the rows x 2 parts of the units"),
        (32, {}, "1 direction x 2 parts of the rows x 1 part of the units"),
        (32, {"bidirectional": True}, "2 directions x 1 part of the rows x 1 part of the units"),
    ],
)
def test_cpu_partition(capsys, rows, options, partition):
    """An LSTM whose weights fill a core's cache is split by rows if each thread gets enough."""
    layer = fastrnn.LSTM(64, 256, device="cpu", **options)
    torch.set_num_threads(2)
    found = facts(capsys, layer, torch.randn(40, rows, 64, device="cpu"))
    torch.set_num_threads(1)
    assert found["lstm, layer 0, forward"]["partition"] == f"2 threads: {partition}"


def test_batch_first_and_states(capsys):
    layer = fastrnn.GRU(5, 6, batch_first=True)
    found = facts(capsys, layer, torch.randn(2, 3, 5), torch.zeros(1, 2, 6))
    assert set(found) == {"gru, layer 0, forward", "gru, layer 0, backward"}


def test_errors():
    with pytest.raises(TypeError, match=r"got LSTM; fastrnn.accelerate makes"):
        fastrnn.explain(nn.LSTM(3, 4), torch.randn(2, 3))
    layer = fastrnn.LSTM(3, 4)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        fastrnn.explain(layer, torch.randn(2, 1, 5))


def test_a_subclass(capsys):
    class Named(fastrnn.GRU):
        pass

    assert facts(capsys, Named(3, 4), torch.randn(2, 3))


@pytest.mark.cuda
def test_on_a_gpu(capsys, monkeypatch):
    monkeypatch.delenv("FASTRNN_CUDA_PATH", raising=False)
    x = torch.randn(9, 3, 64)
    found = facts(capsys, fastrnn.LSTM(64, 300, bidirectional=True), x)
    for block in ["lstm, layer 0, forward", "lstm, layer 0, backward"]:
        assert found[block]["path"] == "persistent"
        count, parts = found[block]["blocks"].split(": ")
        shares = re.fullmatch(
            r"(2) x (\d+) parts of the rows x (\d+) parts of the units", parts
        ).groups()
        assert int(count) == int(shares[0]) * int(shares[1]) * int(shares[2])
        assert found[block]["barriers a step"] == ("1" if int(shares[2]) > 1 else "0")
        assert int(found[block]["threads a block"]) % 32 == 0
        assert int(found[block]["registers a thread"]) > 0
    found = facts(capsys, fastrnn.LSTM(64, 60, dtype=torch.float16), x.half())
    for block in ["lstm, layer 0, forward", "lstm, layer 0, backward"]:
        assert found[block]["path"] == "one_block"
        assert found[block]["barriers a step"] == "0"
        assert found[block]["threads a block"] == "128"
    for layer, why in [
        (fastrnn.LSTM(64, 30, proj_size=7), "a projection"),
        (fastrnn.GRU(64, 30, dtype=torch.float64), "float64"),
    ]:
        found = facts(capsys, layer, x.to(layer.weight_ih_l0.dtype))
        assert all((f["path"], f["why"]) == ("stepwise", why) for f in found.values())
    monkeypatch.setenv("FASTRNN_CUDA_PATH", "stepwise")
    found = facts(capsys, fastrnn.GRU(64, 30), x)
    assert all(f["why"] == "FASTRNN_CUDA_PATH" for f in found.values())
