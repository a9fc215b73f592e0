"""On a device without kernels torch's own layer runs: one warning is logged, calls are counted."""

import logging
import re

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, pair
from test_bad_input import each
from test_ops import sample
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastrnn
from fastrnn import fallback, ops

pytestmark = [pytest.mark.once, pytest.mark.cpu("removes the CPU kernels")]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch, without_fast_path):
    """This build appears to have no CPU kernels, and the fallback counters are empty."""
    monkeypatch.setattr(fallback, "_DEVICES", ())
    monkeypatch.setattr(fallback, "_counts", type(fallback._counts)())


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


def test_operator_error_names_the_device_without_kernels():
    """Redispatch fake tensors of another device straight to the kernels, past the Meta kernels."""
    built = fastrnn.build_info()["cuda"]
    mode, key = FakeTensorMode(), torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for device, text in [
        ("cuda:0", f"in this build ({built}); build it with FASTRNN_CUDA=1 pip install"),
        ("xpu:0", "xpu:0, expected tensors on the CPU or a CUDA device"),
    ]:
        if device == "cuda:0" and built == "built":
            continue

        def on_device(t, device=device):
            return FakeTensor(mode, t.to("meta"), torch.device(device))

        arguments = each(sample("gru"), on_device)
        with pytest.raises(NotImplementedError, match=re.escape(text)) as error:
            ops.forward.redispatch(key, *arguments, False)
        assert str(error.value).startswith(f"fastrnn has no kernels for device {device}")


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
