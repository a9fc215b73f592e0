"""fastrnn.reference, which other tests compare with, against torch's layers in float64."""

import itertools

import pytest
import torch
from helpers import LAYERS, flat, gradients, leaves, pair, ragged, random_state
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastrnn import reference

pytestmark = [pytest.mark.once, pytest.mark.cpu("plain PyTorch, without fastrnn's kernels")]

F64 = torch.float64


def run(layer, kind, x, state, dropout_mask=None):
    """reference.run with the options of one of torch's layers."""
    h0, c0 = state if kind.startswith("lstm") else (state, None)
    packed = isinstance(x, PackedSequence)
    return reference.run(
        kind.removesuffix("_proj"),
        x.data if packed else x,
        h0,
        c0,
        layer._flat_weights,
        x.batch_sizes if packed else None,
        has_biases=layer.bias,
        num_layers=layer.num_layers,
        bidirectional=layer.bidirectional,
        dropout=layer.dropout,
        dropout_mask=dropout_mask,
    )


def present(result):
    return [t for t in result if t is not None]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients(kind, bias, bidirectional, layers, packed):
    _, theirs = pair(
        kind, 5, 6, bias=bias, bidirectional=bidirectional, num_layers=layers, dtype=F64
    )
    lengths = [4, 3, 3, 1]
    x = torch.randn(4, len(lengths), 5, dtype=F64)
    x = leaves(pack_padded_sequence(x, lengths) if packed else x)
    state = leaves(random_state(theirs, len(lengths)))
    ours = present(run(theirs, kind, x, state))
    expected = flat(theirs(x, state))
    torch.testing.assert_close(ours, expected)
    inputs = [*flat(x), *flat(state), *theirs.parameters()]
    torch.testing.assert_close(gradients(ours, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("p", [0.3, 0.999, 1.0])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout(kind, bidirectional, packed, p):
    L, D = 3, 2 if bidirectional else 1
    _, theirs = pair(
        kind, 5, 6, num_layers=L, dropout=p, bidirectional=bidirectional, dtype=F64
    )  # fmt: skip
    x = ragged([3, 1, 4], 5, F64) if packed else torch.randn(4, 3, 5, dtype=F64)
    state = random_state(theirs, 3)
    torch.manual_seed(5)
    expected = flat(theirs(x, state))
    torch.manual_seed(5)
    N, width = x.data.numel() // 5, D * (theirs.proj_size or theirs.hidden_size)
    dropout_mask = torch.zeros(L - 1, N, width, dtype=F64)
    if p < 1:  # torch draws no random numbers for p = 1
        for layer_mask in dropout_mask:
            layer_mask.bernoulli_(1 - p)
    if packed:  # the layer sorts the states of an unsorted batch, and restores their order after
        state = theirs.permute_hidden(state, x.sorted_indices)
    ours = present(run(theirs, kind, x, state, dropout_mask.bool()))
    if packed:
        ours[1:] = [t.index_select(1, x.unsorted_indices) for t in ours[1:]]
    torch.testing.assert_close(ours, expected)
    assert not torch.equal(ours[0], run(theirs, kind, x, state)[0])
    torch.testing.assert_close(
        present(run(theirs, kind, x, state, dropout_mask.byte()))[0], ours[0]
    )


def test_empty_batch_and_empty_sequence():
    for kind in LAYERS:
        _, theirs = pair(kind, 5, 6, num_layers=2, bidirectional=True, dtype=F64)
        x, state = torch.randn(4, 0, 5, dtype=F64), random_state(theirs, 0)
        for our, their in zip(
            present(run(theirs, kind, x, state)), flat(theirs(x, state)), strict=True
        ):
            assert our.shape == their.shape
        with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
            run(theirs, kind, torch.randn(0, 3, 5, dtype=F64), random_state(theirs, 3))


# Some of torch's decompositions still use torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_and_forward_mode(kind):
    _, theirs = pair(kind, 2, 3, num_layers=2, bidirectional=True, dtype=F64)
    x = leaves(ragged([3, 1], 2, F64))
    state = leaves(random_state(theirs, 2))
    inputs = [x.data, *flat(state), *theirs.parameters()]
    n = len(flat(state))

    def f(data, *rest):
        hx = tuple(rest[:n]) if n == 2 else rest[0]
        c0 = hx[1] if n == 2 else None
        return tuple(
            present(
                reference.run(
                    kind.removesuffix("_proj"), data, hx[0] if n == 2 else hx, c0, rest[n:],
                    x.batch_sizes, has_biases=True, num_layers=2, bidirectional=True,
                )
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_inputs_are_not_modified():
    """Autograd does not protect tensors that require no grad, so compare them with copies."""
    for kind, dtype in itertools.product(LAYERS, [torch.float32, torch.bfloat16]):
        _, theirs = pair(kind, 5, 6, num_layers=2, bidirectional=True, dtype=dtype)
        x, state = ragged([3, 2], 5, dtype), random_state(theirs, 2)
        inputs = [x.data, x.batch_sizes, *flat(state), *theirs._flat_weights]
        before = [t.clone() for t in inputs]
        with torch.no_grad():
            result = present(run(theirs, kind, x, state))
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
        assert {t.dtype for t in result} == {dtype}
