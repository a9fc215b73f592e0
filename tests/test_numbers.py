"""Extreme values compared with torch: 10,000 steps, large weights, inf, NaN, -0.0, subnormals.

Subnormal numbers are the exception: the CPU kernels flush them to zero.
"""

import copy

import pytest
import torch
from helpers import LAYERS, affordable, assert_pool_no_worse, device, flat, gradients, pair

import fastrnn

kinds = pytest.mark.parametrize("kind", LAYERS)


def scale_weights(by, *layers):
    for layer in layers:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter *= by


@pytest.mark.slow
@pytest.mark.skipif(not affordable([(10_000, 2, 3, 17)]), reason="too long for an emulated GPU")
@kinds
def test_ten_thousand_steps(kind):
    ours, theirs = pair(kind, 3, 17)
    if kind == "rnn_relu":
        scale_weights(0.5, ours, theirs)  # else the state grows without bound
    x = torch.randn(10_000, 2, 3)
    exact = copy.deepcopy(theirs).double()

    def results(layer, x):
        outputs = flat(layer(x))
        return [*outputs, *gradients(outputs, list(layer.parameters()))]

    found = results(ours, x), results(theirs, x), results(exact, x.double())
    for values in zip(*found, strict=True):
        assert_pool_no_worse([values])


@kinds
def test_large_weights(kind):
    """Most gates saturate, and the errors of the others vary: pool those of 20 layers."""
    pool = []
    for _ in range(20):
        ours, theirs = pair(kind, 33, 64)
        scale_weights(50 if kind != "rnn_relu" else 4, ours, theirs)
        x = torch.randn(5, 7, 33)
        exact = copy.deepcopy(theirs).double()
        with torch.no_grad():
            values = ours(x), theirs(x), exact(x.double())
        pool += zip(*map(flat, values), strict=True)
    assert_pool_no_worse(pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38], ids=str)
@kinds
def test_nonfinite_values(kind, value, dtype):
    """inf, NaN or 3e38 in one element of the input or a state spreads exactly as with torch."""
    ours, theirs = pair(kind, 5, 33, dtype=dtype)
    for place in range(3):
        x, h = torch.randn(4, 3, 5, dtype=dtype), torch.randn(1, 3, 33, dtype=dtype)
        state = (h[..., : theirs.proj_size or 33].contiguous(), h.clone()) if "lstm" in kind else h
        (x if place == 0 else flat(state)[min(place, len(flat(state))) - 1])[0, 1, 2] = value
        with torch.no_grad():
            for a, b in zip(flat(ours(x, state)), flat(theirs(x, state)), strict=True):
                finite = b.isfinite()
                assert torch.equal(a.isfinite(), finite)
                torch.testing.assert_close(a[~finite], b[~finite], equal_nan=True)
                # The results are sums of tens of products, and the largest may cancel.
                largest = b[finite].abs().max().clamp(min=1)
                assert (a - b)[finite].abs().max() <= 64 * torch.finfo(dtype).eps * largest


@kinds
def test_negative_zero(kind):
    """An input of -0.0 gives torch's results."""
    ours, theirs = pair(kind, 5, 33)
    x = torch.full((3, 2, 5), -0.0)
    for a, b in zip(flat(ours(x)), flat(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)


def decaying_pair(kind, dtype):
    """Our layer and torch's, with weights that halve the state at every step.

    All weights are zero, except an RNN's weight_hh, which is I / 2.
    """
    ours, theirs = pair(kind, 5, 33, dtype=dtype)
    scale_weights(0, ours, theirs)
    if "rnn" in kind:
        with torch.no_grad():
            for layer in (ours, theirs):
                layer.weight_hh_l0.copy_(torch.eye(33) / 2)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@kinds
def test_state_that_decays_to_subnormals(kind, dtype):
    """States and gradients equal torch's while normal; on the CPU subnormals become zero.

    A subnormal input has no effect.
    """
    ours, theirs = decaying_pair(kind, dtype)
    tiny = torch.finfo(dtype).tiny
    small = torch.full((1, 2, 33), 8 * tiny, dtype=dtype).requires_grad_()
    state = (small[..., : theirs.proj_size or 33].contiguous(), small) if "lstm" in kind else small
    x = torch.full((6, 2, 5), tiny / 4, dtype=dtype)
    found = []
    for layer in (ours, theirs):
        results = flat(layer(x, state))
        (grad,) = torch.autograd.grad((results[0][-1] * 64 * tiny).sum(), small)
        found.append([*results, grad])
    for our, their in zip(*found, strict=True):
        # CUDA kernels keep subnormals; the libraries' matrix products may flush them.
        keeps = device() == "cuda" and "rnn" not in kind
        atol = tiny * 2**-20 if keeps else tiny
        torch.testing.assert_close(our, their, rtol=torch.finfo(dtype).eps * 8, atol=atol)
        if device() == "cpu":
            assert not ((our != 0) & (our.abs() < tiny)).any()
    if kind == "rnn_relu":
        assert (found[1][0][-1] > 0).all(), "no subnormal occurred"


@pytest.mark.cpu
@pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])
def test_all_threads_flush_subnormals(flush):
    """A call and a vmap over models flush subnormals whatever torch.set_flush_denormal is.

    That setting stays in force for torch's own operations.
    """
    layers = [fastrnn.RNN(256, 256, nonlinearity="relu", bias=False) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.weight_hh_l0.copy_(torch.eye(256) / 2)
    stacked = torch.func.stack_module_state(layers)[0]
    x, h = torch.zeros(3, 2, 256), torch.full((1, 2, 256), 3e-38)
    many = torch.full((1 << 20,), 3e-38)  # large enough for torch to use several threads

    def call(parameters):
        return torch.func.functional_call(layers[0], parameters, (x, h))[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        torchs = many / 4
        found = torch.stack([layers[0](x, h)[0], *torch.vmap(call)(stacked)])
        assert torch.equal(many / 4, torchs)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert torchs[0] == (0 if flush else 7.5e-39)
    assert torchs[-1] == 7.5e-39
    expected = torch.tensor([1.5e-38, 0, 0]).view(3, 1, 1)
    assert torch.equal(found, expected.expand_as(found))
