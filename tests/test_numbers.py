"""Numbers at their ends: sequences of ten thousand steps, large weights, infinities, NaN, -0.0 and
subnormal numbers, as torch has them; but subnormal ones are zeros to a CPU's kernels."""

import copy

import pytest
import torch
from helpers import LAYERS, affordable, assert_pool_no_worse, device, flat, gradients, pair

import fastrnn

kinds = pytest.mark.parametrize("kind", LAYERS)


def scaled(by, *layers):
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
        scaled(0.5, ours, theirs)  # or it grows without end
    x = torch.randn(10_000, 2, 3)
    exact = copy.deepcopy(theirs).double()

    def results(layer, given):
        outputs = flat(layer(given))
        return [*outputs, *gradients(outputs, list(layer.parameters()))]

    found = results(ours, x), results(theirs, x), results(exact, x.double())
    for values in zip(*found, strict=True):
        assert_pool_no_worse([values])


@kinds
def test_large_weights(kind):
    """Most gates are at their ends, and what is between them is off by chance: of many layers."""
    pool = []
    for _ in range(20):
        ours, theirs = pair(kind, 33, 64)
        scaled(50 if kind != "rnn_relu" else 4, ours, theirs)
        x = torch.randn(5, 7, 33)
        exact = copy.deepcopy(theirs).double()
        with torch.no_grad():
            values = ours(x), theirs(x), exact(x.double())
        pool += zip(*map(flat, values), strict=True)
    assert_pool_no_worse(pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38], ids=str)
@kinds
def test_what_is_not_finite(kind, value, dtype):
    """In one element of the input, or of the state: what comes of it is where torch has it."""
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
                # Of sums of some tens of products, the largest of which may cancel.
                largest = b[finite].abs().max().clamp(min=1)
                assert (a - b)[finite].abs().max() <= 64 * torch.finfo(dtype).eps * largest


@kinds
def test_negative_zero(kind):
    """Weights of zero leave what they multiply without a trace, whatever its sign."""
    ours, theirs = pair(kind, 5, 33)
    x = torch.full((3, 2, 5), -0.0)
    for a, b in zip(flat(ours(x)), flat(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)


def forgetful(kind, dtype):
    """Ours and torch's, whose states are halved at every step, of no weights but h's by itself."""
    ours, theirs = pair(kind, 5, 33, dtype=dtype)
    scaled(0, ours, theirs)
    if "rnn" in kind:
        with torch.no_grad():
            for layer in (ours, theirs):
                layer.weight_hh_l0.copy_(torch.eye(33) / 2)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@kinds
def test_a_state_that_decays_to_subnormal_numbers(kind, dtype):
    """It is torch's as long as it is normal, then zero on the CPU; so are gradients. An input of
    such numbers leaves no trace."""
    ours, theirs = forgetful(kind, dtype)
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
        # A GPU's kernels keep them; whether its libraries' products do is theirs to say.
        kept = device() == "cuda" and "rnn" not in kind
        lost = tiny * 2**-20 if kept else tiny
        torch.testing.assert_close(our, their, rtol=torch.finfo(dtype).eps * 8, atol=lost)
        if device() == "cpu":
            assert not ((our != 0) & (our.abs() < tiny)).any()
    if kind == "rnn_relu":
        assert (found[1][0][-1] > 0).all(), "there was nothing to lose"


@pytest.mark.cpu
@pytest.mark.parametrize("callers", [False, True], ids=["kept", "flushed"])
def test_subnormal_numbers_are_zeros_to_all_threads(callers):
    """Of a call, and of the models of a vmap, whatever torch.set_flush_denormal says; which holds
    for torch's operations afterwards as it did before."""
    layers = [fastrnn.RNN(256, 256, nonlinearity="relu", bias=False) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.weight_hh_l0.copy_(torch.eye(256) / 2)
    stacked = torch.func.stack_module_state(layers)[0]
    x, h = torch.zeros(3, 2, 256), torch.full((1, 2, 256), 3e-38)
    many = torch.full((1 << 20,), 3e-38)  # for torch to share among threads

    def of(parameters):
        return torch.func.functional_call(layers[0], parameters, (x, h))[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if callers and not torch.set_flush_denormal(True):
        pytest.skip("this CPU can not flush them")
    try:
        torchs = many / 4
        found = torch.stack([layers[0](x, h)[0], *torch.vmap(of)(stacked)])
        assert torch.equal(many / 4, torchs)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert torchs[0] == (0 if callers else 7.5e-39)
    assert torchs[-1] == 7.5e-39
    expected = torch.tensor([1.5e-38, 0, 0]).view(3, 1, 1)
    assert torch.equal(found, expected.expand_as(found))
