"""recompute=True saves only outputs and recomputes the gates in backward: equal gradients."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, device, flat, gradients, leaves, pair, ragged, random_state
from torch import nn

import fastrnn
from fastrnn import functional

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from memory import saved_bytes

OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 3, "dropout": 0.4},
    "both": {"num_layers": 2, "bidirectional": True},
}


def both(kind, **options):
    """A layer that saves its gates, and one of equal weights that recomputes them."""
    keeping, _ = pair(kind, 5, 17, **options)
    recomputing = copy.deepcopy(keeping)
    recomputing.recompute = True
    return keeping, recomputing


def results(layer, args):
    torch.manual_seed(3)
    outputs = flat(layer(*args))
    return [*outputs, *gradients(outputs, [*flat(args), *layer.parameters()])]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        # On CUDA the products are cuBLAS's, which need not be bitwise reproducible.
        if device() == "cuda":
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bitwise_equal(kind, options, dtype, packed):
    keeping, recomputing = both(kind, dtype=dtype, **OPTIONS[options])
    x = ragged([6, 2, 5], 5, dtype) if packed else torch.randn(6, 3, 5, dtype=dtype)
    args = leaves(x), leaves(random_state(keeping, 3))
    assert_equal(results(recomputing, args), results(keeping, args))


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYERS)
def test_without_fast_path(kind, without_fast_path):
    keeping, recomputing = both(kind, num_layers=2)
    args = leaves(torch.randn(6, 3, 5)), leaves(random_state(keeping, 3))
    assert_equal(results(recomputing, args), results(keeping, args))
    assert saved_bytes(recomputing, *args[:1]) <= saved_bytes(keeping, *args[:1])


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "fewer"), [("lstm", 5), ("lstm_proj", 5), ("gru", 4), ("rnn_tanh", 1)]
)
def test_saved_bytes(kind, fewer):
    """With recompute only h is saved.

    Without it an LSTM saves i, f, g, o, c and h, a GRU r, z, n, W_hn h + b_hn and h. The few bytes
    of the states come on top in both cases.
    """
    layer, _ = pair(kind, 32, 63)
    x = torch.randn(50, 16, 32)
    saved = saved_bytes(layer, x)
    layer.recompute = True
    assert saved_bytes(layer, x) * fewer <= saved
    assert saved_bytes(layer, x) >= 50 * 16 * (layer.proj_size or 63) * 4


@pytest.mark.once
@pytest.mark.parametrize("kind", LAYERS)
def test_double_backward(kind):
    _, layer = both(kind, dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], [x])


@pytest.mark.once
def test_functions():
    layer, _ = pair("gru", 5, 17)
    x, h0 = torch.randn(6, 3, 5), torch.zeros(1, 3, 17)
    found = []
    for recompute in [False, True]:
        weights = leaves([p.detach() for p in layer.parameters()])
        output, h_n, _ = functional.rnn(
            "gru", x, h0, None, weights, has_biases=True, num_layers=1, bidirectional=False,
            recompute=recompute,
        )  # fmt: skip
        found.append([output, *gradients([output, h_n], weights)])
    assert_equal(*found)


@pytest.mark.once
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_option(name):
    layer = getattr(fastrnn, name)(3, 4, num_layers=2, recompute=True)
    assert layer.recompute
    assert repr(layer) == f"{name}(3, 4, num_layers=2, recompute=True)"
    assert pickle.loads(pickle.dumps(layer)).recompute
    assert copy.deepcopy(layer).recompute
    plain = getattr(fastrnn, name)(3, 4, num_layers=2)
    assert not plain.recompute
    assert repr(plain) == repr(getattr(nn, name)(3, 4, num_layers=2))


@pytest.mark.once
def test_option_of_accelerated_layer():
    """An accelerated layer has the option, too."""
    layer = nn.LSTM(3, 64)
    fastrnn.accelerate(layer)
    x = torch.randn(20, 4, 3)
    saved = saved_bytes(layer, x)
    layer.recompute = True
    assert saved_bytes(layer, x) < saved / 2
    assert isinstance(fastrnn.restore(layer)(x)[0], torch.Tensor)


@pytest.mark.once
def test_operators_reject_gates_without_c():
    """backward rejects saved gates without c, and c without gates."""
    layer, _ = pair("lstm", 3, 4)
    x, h = torch.randn(2, 1, 3), torch.zeros(1, 1, 4)
    weights = [p.detach() for p in layer.parameters()]
    network = (True, 1, False, 0.0, False)
    forward = torch.ops.fastrnn.forward
    _, _, _, hidden, saved, c, dropout_mask = forward(
        "lstm", x, h, h, weights, None, *network, True, True
    )
    output_mask = [True] * 7
    for gates, cells in [(saved[:0, 0, 0, 0], c), (saved, c[:0, 0, 0, 0])]:
        with pytest.raises(RuntimeError, match=r"Expected .* size"):
            torch.ops.fastrnn.backward(
                "lstm", torch.ones(2, 1, 4), None, None, x, h, h, weights, None, *network,
                hidden, gates, cells, dropout_mask, output_mask,
            )  # fmt: skip
