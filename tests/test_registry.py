"""Every registered cell, torch's or not, against its definition in fastrnn/reference.py."""

import copy
import inspect
import pickle

import pytest
import torch
from helpers import OPERATOR_CELLS as CELLS
from helpers import VIRTUAL, gradients, host_tensor, ragged

from fastrnn import functional, reference
from fastrnn.define import Registered

F64 = torch.float64


def tensors(cell, L, D, T, B, I, H, *, bias=True, lengths=None, dtype=F64):
    """input, h0, c0, weights and batch_sizes of a network; the floating tensors require grad."""
    G, states = CELLS[cell]["gates"], CELLS[cell]["states"]
    batch_sizes, shape = None, (T, B, I)
    if lengths:
        B = len(lengths)
        batch_sizes = host_tensor([sum(n > t for n in lengths) for t in range(max(lengths))])
        shape = (sum(lengths), I)
    weights = []
    for layer in range(L):
        for _ in range(D):
            shapes = [(G * H, I if layer == 0 else D * H), (G * H, H)] + [(G * H,)] * (2 * bias)
            weights += [(torch.rand(s, dtype=F64) * 2 - 1) * H**-0.5 for s in shapes]
    x, h0 = torch.randn(shape, dtype=F64), torch.randn(L * D, B, H, dtype=F64)
    c0 = torch.randn(L * D, B, H, dtype=F64) if states == 2 else None

    def leaf(t):
        return t.to(dtype).requires_grad_()

    return leaf(x), leaf(h0), None if c0 is None else leaf(c0), [*map(leaf, weights)], batch_sizes


def both(cell, L, D, *sizes, bias=True, lengths=None, dropout=0.0, dtype=F64, exactly=False):
    """Values and gradients of functional.rnn and of reference.run, on the same tensors.

    exactly: reference.run in float64, whatever the dtype.
    """
    x, h0, c0, weights, batch_sizes = tensors(
        cell, L, D, *sizes, bias=bias, lengths=lengths, dtype=dtype
    )
    options = {"has_biases": bias, "num_layers": L, "bidirectional": D == 2, "dropout": dropout}
    inputs = [t for t in (x, h0, c0, *weights) if t is not None]
    dropout_mask = None
    torch.manual_seed(9)
    if dropout:
        ones = torch.ones(x.numel() // x.size(-1), D * h0.size(-1), dtype=dtype)
        # Drawn as torch draws them on this device, one layer at a time.
        masks = [torch.dropout(ones, dropout, True) != 0 for _ in range(L - 1)]
        dropout_mask = torch.stack(masks)
    torch.manual_seed(9)
    found = functional.rnn(cell, x, h0, c0, weights, batch_sizes, train=True, **options)
    wide = [t if t is None or not exactly else t.double() for t in (x, h0, c0, *weights)]
    exact = reference.run(
        cell, *wide[:3], wide[3:], batch_sizes, dropout_mask=dropout_mask, **options
    )
    assert isinstance(found, tuple)
    assert [t is None for t in found] == [t is None for t in exact]
    assert (found[2] is None) == (CELLS[cell]["states"] == 1)
    results = []
    for result in [found, exact]:
        present = [t for t in result if t is not None]
        results.append([*present, *gradients(present, inputs)])
        with torch.no_grad():
            torch.manual_seed(9)
            without = functional.rnn(cell, x, h0, c0, weights, batch_sizes, train=True, **options)
        results[-1] += [t for t in without if t is not None]
    return results


def test_registry_and_reference_list_the_same_cells():
    own = {name for name in reference.CELLS if "-" in name}  # other tests' (fastrnn.cell)
    assert set(CELLS) == set(reference.CELLS) - own
    assert {"lstm", "gru", "rnn_tanh", "rnn_relu"} <= set(CELLS)
    for name, cell in CELLS.items():
        assert set(cell) >= {"gates", "states"}
        assert cell["gates"] >= 1
        assert cell["states"] in (1, 2)
        step = getattr(reference, name)
        assert list(inspect.signature(step).parameters) == ["x", "r", "h", "c"]
        assert inspect.getdoc(step)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_padded(cell, L, D, bias):
    for sizes in [(1, 1, 1, 1), (2, 3, 5, 17), (7, 8, 33, 16), (3, 17, 5, 64), (4, 1, 3, 33)]:
        torch.testing.assert_close(*both(cell, L, D, *sizes, bias=bias))


@pytest.mark.parametrize("lengths", [[1], [5, 3, 3, 1], [2, 2], [9, *[1] * 18]], ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell, L, D, lengths):
    for I, H in [(1, 1), (5, 17), (33, 16)]:
        torch.testing.assert_close(*both(cell, L, D, 0, 0, I, H, lengths=lengths))


@pytest.mark.parametrize("lengths", [None, [4, 3, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout(cell, D, lengths):
    with_dropout = both(cell, 3, D, 4, 3, 5, 17, lengths=lengths, dropout=0.4)
    torch.testing.assert_close(*with_dropout)


@pytest.mark.parametrize("cell", CELLS)
def test_float32(cell):
    for sizes in [(2, 3, 5, 17), (7, 8, 33, 16)]:
        torch.testing.assert_close(*both(cell, 2, 2, *sizes, dtype=torch.float32))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell, packed):
    """A registered cell has layers, of torch's options, and steps."""
    definition = Registered(cell)
    layer = definition.layer(5, 17, 2, bidirectional=True, dtype=F64)
    x = ragged([3, 1, 4], 5, F64) if packed else torch.randn(4, 3, 5, dtype=F64)
    output, last = layer(x)
    data, sizes = (x.data, x.batch_sizes) if packed else (x, None)
    zeros = torch.zeros(4, 3, 17, dtype=F64)
    c0 = zeros if CELLS[cell]["states"] == 2 else None
    exact = reference.run(
        cell, data, zeros, c0, layer._flat_weights, sizes,
        has_biases=True, num_layers=2, bidirectional=True,
    )  # fmt: skip
    torch.testing.assert_close(output.data if packed else output, exact[0])
    h_n = last[0] if c0 is not None else last
    back = x.unsorted_indices if packed else torch.arange(3)
    torch.testing.assert_close(h_n, exact[1][:, back])
    assert copy.deepcopy(layer).definition is definition
    assert pickle.loads(pickle.dumps(layer)).definition.name == cell
    step = definition.step(5, 17, dtype=F64)
    new = step(torch.randn(3, 5, dtype=F64))
    assert (new[0] if c0 is not None else new).shape == (3, 17)


def test_layers_of_unknown_cells():
    with pytest.raises(ValueError, match="no cell is called 'none', expected one of: lstm"):
        Registered("none")


@pytest.mark.cuda
@pytest.mark.parametrize("path", ["stepwise", "persistent", "one_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_paths(cell, dtype, path, monkeypatch):
    """Every path of a GPU, where blocks and warps share a cell's gates in other ways."""
    if path == "one_block" and dtype == torch.float32:
        pytest.skip("it computes float32 in TF32")
    monkeypatch.setenv("FASTRNN_CUDA_PATH", path)
    for lengths, H in [(None, 40), ([4, 3, 1], 17)]:
        found, exact = both(cell, 1, 2, 4, 3, 5, H, lengths=lengths, dtype=dtype, exactly=True)
        # h is rounded at each of 4 steps, and gradients are sums of up to 12 rounded values.
        few = 16 * torch.finfo(dtype).eps
        for value, right in zip(found, exact, strict=True):
            assert (value.double() - right).abs().max() <= few * (1 + right.abs().max())


@pytest.mark.once
@pytest.mark.parametrize("lengths", [None, [3, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, lengths):
    x, h0, c0, weights, batch_sizes = tensors(cell, 2, 2, 3, 2, 2, 3, lengths=lengths)
    states = [h0] if c0 is None else [h0, c0]

    def function(data, h, *rest):
        c, w = (None, rest) if c0 is None else (rest[0], rest[1:])
        result = functional.rnn(
            cell, data, h, c, list(w), batch_sizes,
            has_biases=True, num_layers=2, bidirectional=True,
        )  # fmt: skip
        return tuple(t for t in result if t is not None)

    inputs = [x, *states, *weights]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    if not VIRTUAL:  # too slow; test_gradients.py has a few cases
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_unknown_cell():
    x, h0, _, weights, _ = tensors("rnn_tanh", 1, 1, 2, 3, 4, 5)
    with pytest.raises((ValueError, RuntimeError), match="no_such_cell"):
        functional.rnn(
            "no_such_cell", x, h0, None, weights,
            has_biases=True, num_layers=1, bidirectional=False,
        )  # fmt: skip
