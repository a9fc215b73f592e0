"""The direct way from a module to the kernels: where it is taken, and that it changes nothing."""

import inspect
import itertools
from unittest import mock

import numpy
import pytest
import torch
from helpers import (
    CELLS,
    FULL,
    LAYERS,
    LOW,
    VIRTUAL,
    cell_pair,
    cell_state,
    flat,
    pack,
    pair,
    random_state,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, modules


def asked(layer, *args):
    """The direct call's results, or None; hx is None where it is not given."""
    name = type(layer).__name__.removesuffix("Cell").lower()
    if name == "rnn":
        name = f"rnn_{layer.nonlinearity}"
    call = _C.cell if isinstance(layer, nn.RNNCellBase) else _C.layer
    return call(name, layer, *args, *[None] * (2 - len(args)))


def direct(layer, *args):
    """The same under a default device, as the tests of CUDA are: that is a mode, which listens."""
    with torch._C.DisableTorchFunction():
        return asked(layer, *args)


def long_way(layer, *args):
    """The results as if there were no direct way: by torch's forward code and the operator."""
    nothing = dict.fromkeys(("network", "step"), lambda *args: None)
    with mock.patch.multiple(_C, **nothing):
        return type(layer).forward.__wrapped__(layer, *args)


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_give_the_same_bits(kind, dtype):
    for T, B in [(1, 1), (1, 5), (4, 1), (6, 17)]:
        for bidirectional, bias, batch_first, layers in itertools.product(
            [False, True], [False, True], [False, True], [1, 2]
        ):
            options = {"bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
            layer, _ = pair(kind, 5, 17, num_layers=layers, dtype=dtype, **options)
            x = torch.randn((B, T, 5) if batch_first else (T, B, 5), dtype=dtype)
            for args in [(x,), (x, random_state(layer, B))]:
                with torch.no_grad():
                    found, expected = direct(layer, *args), long_way(layer, *args)
                    called = layer(*args)
                assert found is not None
                for a, b, c in zip(flat(found), flat(expected), flat(called), strict=True):
                    assert torch.equal(a, b)
                    assert torch.equal(a, c)
                    assert a.stride() == b.stride()


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_layers(kind):
    layer, _ = pair(kind, 5, 17, num_layers=2)
    x, hx = torch.randn(4, 5), random_state(layer, 1)
    hx = tuple(t[:, 0] for t in hx) if isinstance(hx, tuple) else hx[:, 0]
    with torch.no_grad():
        found, expected = direct(layer, x, hx), long_way(layer, x, hx)
        assert direct(layer, x) is not None
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_give_the_same_bits(kind, dtype):
    for B, bias in itertools.product([None, 1, 5, 17], [False, True]):
        layer, _ = cell_pair(kind, 5, 17, bias=bias, dtype=dtype)
        x = torch.randn(5, dtype=dtype) if B is None else torch.randn(B, 5, dtype=dtype)
        hx = cell_state(layer, B or 1)
        if B is None:
            hx = tuple(t[0] for t in hx) if isinstance(hx, tuple) else hx[0]
        with torch.no_grad():
            found, expected, called = direct(layer, x, hx), long_way(layer, x, hx), layer(x, hx)
        assert found is not None
        for a, b, c in zip(flat(found), flat(expected), flat(called), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("kind", LAYERS)
def test_states_and_inputs_of_any_stride(kind):
    layer, _ = pair(kind, 5, 17)
    x = torch.randn(3, 4, 10)[:, :, ::2]
    state = random_state(layer, 8)
    hx = tuple(t[:, ::2] for t in state) if isinstance(state, tuple) else state[:, ::2]
    with torch.no_grad():
        for a, b in zip(flat(direct(layer, x, hx)), flat(long_way(layer, x, hx)), strict=True):
            assert torch.equal(a, b)


def with_gradients(call, layer, x, hx):
    """Results and the gradients of x, hx and the weights."""
    x, *states = (t.detach().clone().requires_grad_() for t in (x, *flat(hx)))
    results = flat(call(layer, x, tuple(states) if len(states) == 2 else states[0]))
    weighted = sum((t * torch.linspace(0, 1, t.numel()).view(t.shape)).sum() for t in results)
    grads = torch.autograd.grad(weighted, [x, *states, *layer.parameters()])
    return [t.detach() for t in results], grads


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_layers(kind):
    for options in [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}]:
        layer, _ = pair(kind, 5, 17, **options)
        args = torch.randn(4, 4, 5), random_state(layer, 4)
        ours, theirs = (with_gradients(call, layer, *args) for call in [direct, long_way])
        for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_cells(kind):
    layer, _ = cell_pair(kind, 5, 17)
    args = torch.randn(3, 5), cell_state(layer, 3)
    ours, theirs = (with_gradients(call, layer, *args) for call in [direct, long_way])
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_returns_no_views(kind):
    """FSDP2 warns of views: it loses its hooks where they are changed in place."""
    layer, theirs = cell_pair(kind, 5, 17)
    args = torch.randn(3, 5), cell_state(layer, 3)
    loss = sum((2 * t).sin().sum() for t in flat(theirs(*args)))
    expected = torch.autograd.grad(loss, list(theirs.parameters()))
    for call in [direct, long_way]:
        results = flat(call(layer, *args))
        assert all(t.requires_grad and t._base is None for t in results)
        loss = sum(t.mul_(2).sin().sum() for t in results)
        torch.testing.assert_close(torch.autograd.grad(loss, list(layer.parameters())), expected)


def test_only_the_gradients_that_are_wanted():
    layer = fastrnn.LSTM(5, 17)
    layer.weight_hh_l0.requires_grad_(False)
    output, _ = direct(layer, torch.randn(3, 4, 5))
    output.sum().backward()
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None


def test_the_second_backward_needs_a_kept_graph():
    layer = fastrnn.LSTM(5, 17)
    output = direct(layer, torch.randn(3, 4, 5))[0].sum()
    output.backward(retain_graph=True)
    output.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()


def test_a_weight_changed_before_backward():
    layer = fastrnn.GRU(5, 17)
    output, _ = direct(layer, torch.randn(3, 4, 5))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_what_is_kept_goes_through_saved_tensor_hooks():
    layer, seen = fastrnn.LSTM(5, 17), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        output, _ = direct(layer, torch.randn(3, 4, 5))
    assert len(seen) >= 4
    output.sum().backward()
    assert layer.weight_ih_l0.grad is not None


def test_gradients_of_gradients():
    layer, _ = pair("lstm", 3, 4, dtype=torch.float64)
    found = []
    for call in [direct, long_way]:
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 2, 3).requires_grad_()
        (first,) = torch.autograd.grad(call(layer, x)[0].pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_state_is_not_touched():
    layer = fastrnn.LSTMCell(5, 17)
    x, (h, c) = torch.randn(3, 5), (torch.randn(3, 17), torch.randn(3, 17))
    before = [t.clone() for t in (x, h, c)]
    with torch.no_grad():
        new_h, _ = layer(x, (h, c))
        new_h.zero_()
    for a, b in zip((x, h, c), before, strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


LISTENERS = {
    "autocast": lambda: torch.autocast("cpu"),
    "function mode": Function,
    "dispatch mode": Dispatch,
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_left_where_somebody_listens(listener):
    for layer, x in [
        (fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)),
        (fastrnn.GRUCell(5, 17), torch.randn(4, 5)),
    ]:
        hx = None if isinstance(layer, nn.LSTM) else torch.zeros(4, 17)
        with torch.no_grad():
            assert asked(layer, x, hx) is not None
            with LISTENERS[listener]():
                assert asked(layer, x, hx) is None


@pytest.mark.parametrize("kind", CELLS)
def test_taken_under_a_default_device(kind):
    """torch.set_default_device is a mode, which changes nothing for tensors that are there."""
    for layer, x in [
        (pair(kind, 5, 17)[0], torch.randn(3, 4, 5)),
        (cell_pair(kind, 5, 17)[0], torch.randn(4, 5)),
    ]:
        expected = layer(x)
        with torch.device("meta"):
            found = asked(layer, x)
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_without_a_state(kind):
    layer, _ = cell_pair(kind, 5, 17)
    for x in (torch.randn(4, 5), torch.randn(5)):
        for a, b in zip(flat(direct(layer, x)), flat(long_way(layer, x)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj"])
def test_states_in_a_list(kind):
    layer, _ = pair(kind, 5, 17)
    x, hx = torch.randn(3, 4, 5), random_state(layer, 4)
    for a, b in zip(flat(direct(layer, x, list(hx))), flat(layer(x, hx)), strict=True):
        assert torch.equal(a, b)
    cell = fastrnn.LSTMCell(5, 17)
    hx = cell_state(cell, 4)
    for a, b in zip(direct(cell, x[0], list(hx)), cell(x[0], hx), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_left_under_autocast_of_a_gpu():
    layer, x = fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)
    with torch.no_grad():
        assert direct(layer, x) is not None
        with torch.autocast("cuda"):
            assert direct(layer, x) is None


def test_left_inside_a_transform():
    layer = fastrnn.RNN(5, 17)
    seen = []

    def call(x):
        seen.append(direct(layer, x))
        return x

    with torch.no_grad():
        torch.func.vmap(call)(torch.randn(2, 3, 4, 5))
        torch.jit.trace(call, torch.randn(3, 4, 5), check_trace=False)
    assert seen == [None, None]


LAYER = ("LSTM", 5, 17)
LEFT = {
    "a subclass": lambda: (LAYER, torch.randn(3, 4, 5).as_subclass(Subclass), None),
    "packed": lambda: (LAYER, pack([torch.randn(3, 5)]), None),
    "meta": lambda: (LAYER, torch.randn(3, 4, 5, device="meta"), None),
    "sparse": lambda: (LAYER, torch.randn(3, 4, 5).to_sparse(), None),
    "another dtype": lambda: (LAYER, torch.randn(3, 4, 5).double(), None),
    "another width": lambda: (LAYER, torch.randn(3, 4, 6), None),
    "one state": lambda: (LAYER, torch.randn(3, 4, 5), torch.zeros(1, 4, 17)),
    "a state too small": lambda: (LAYER, torch.randn(3, 4, 5), (torch.zeros(1, 3, 17),) * 2),
    "a state of a batch": lambda: (LAYER, torch.randn(3, 5), (torch.zeros(1, 1, 17),) * 2),
    "no steps": lambda: (LAYER, torch.randn(0, 4, 5), None),
    "no tensor": lambda: (LAYER, 3, None),
    "cell, another width": lambda: (("GRUCell", 5, 17), torch.randn(4, 6), torch.zeros(4, 17)),
    "cell, another batch": lambda: (("GRUCell", 5, 17), torch.randn(4, 5), torch.zeros(3, 17)),
    "cell, three dimensions": lambda: (("GRUCell", 5, 17), torch.randn(1, 4, 5), None),
    "cell, one state": lambda: (("LSTMCell", 5, 17), torch.randn(4, 5), torch.zeros(2, 4, 17)),
    "cell, unbatched state": lambda: (("GRUCell", 5, 17), torch.randn(1, 5), torch.zeros(17)),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_for_anything_else(case):
    if case == "sparse" and VIRTUAL:
        pytest.skip("the virtual GPU has no sparse tensors")
    (name, *sizes), x, hx = LEFT[case]()
    layer = getattr(fastrnn, name)(*sizes)
    with torch.no_grad():
        assert direct(layer, x, hx) is None
    assert direct(layer, x, hx) is None


def test_left_for_a_tangent():
    layer, x = fastrnn.GRU(5, 17), torch.randn(3, 4, 5)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert direct(layer, dual) is None
    assert direct(layer, x) is not None


def test_dropout_draws_the_same_masks():
    layer = fastrnn.GRU(5, 17, 3, dropout=0.5)
    x = torch.randn(3, 4, 5)
    results = []
    for call in [direct, long_way]:
        torch.manual_seed(0)
        results.append(flat(call(layer, x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0], direct(layer, x)[0])
    assert torch.equal(direct(layer.eval(), x)[0], long_way(layer, x)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_attributes_are_read_as_torch_reads_them(name):
    """They are the user's to set: what is true, and what is a number, is Python's to say."""
    layer = getattr(fastrnn, name)(5, 17, num_layers=2)
    x = torch.randn(3, 4, 5)
    for changes in [
        {"batch_first": 1},
        {"batch_first": numpy.bool_(True)},
        {"batch_first": []},
        {"num_layers": numpy.int64(2)},
        {"hidden_size": numpy.int64(17)},
        {"dropout": 0},
    ]:
        for attribute, value in changes.items():
            setattr(layer, attribute, value)
        with torch.no_grad():
            for a, b in zip(flat(layer(x)), flat(long_way(layer, x)), strict=True):
                assert torch.equal(a, b)
                assert a.shape == b.shape


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_missing_attribute_is_torchs_error(name):
    layer, x = getattr(fastrnn, name)(5, 17), torch.randn(3, 4, 5)
    del layer.batch_first
    with torch.no_grad():
        assert direct(layer, x) is None
        with pytest.raises(AttributeError, match="batch_first"):
            layer(x)


def test_a_subclass_with_steps_of_its_own():
    calls = []

    class Checked(fastrnn.LSTM):
        def check_forward_args(self, *args):
            calls.append(len(args))
            return super().check_forward_args(*args)

    class Plain(fastrnn.LSTM):
        def helper(self):
            return None

    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        Checked(5, 17)(x, (torch.zeros(1, 4, 17), torch.zeros(1, 4, 17)))
        assert calls == [3]
    assert modules._has_steps_of_its_own(Checked)
    assert not modules._has_steps_of_its_own(Plain)
    assert not modules._has_steps_of_its_own(fastrnn.GRUCell)


def test_left_for_parametrized_weights():
    layer = nn.utils.parametrizations.weight_norm(fastrnn.GRU(5, 17), "weight_hh_l0")
    with torch.no_grad():
        assert direct(layer, torch.randn(3, 4, 5)) is None


def test_seen_by_the_profiler():
    layer, x = fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert "fastrnn::forward" in {event.key for event in profile.key_averages()}


def test_inference_mode():
    layer, x = fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)
    with torch.inference_mode():
        output, _ = layer(x)
        assert direct(layer, x) is not None
    assert output.is_inference()
    with torch.no_grad():
        assert torch.equal(output, layer(x)[0])


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_in_inference_mode(kind):
    cell, _ = cell_pair(kind, 5, 17)
    x, start = torch.randn(3, 5), cell_state(cell, 3)
    found = []
    for mode in [torch.inference_mode, torch.no_grad]:
        hx = start
        with mode():
            for _ in range(3):
                hx = direct(cell, x, hx)
        found.append(flat(hx))
    for a, b in zip(*found, strict=True):
        assert a.is_inference()
        assert torch.equal(a, b)


def test_the_long_way_is_torchs_code():
    theirs = inspect.unwrap(nn.LSTM.forward)  # after keep_types=True there is one around it
    assert modules.LSTM.forward.__wrapped__.__code__ is theirs.__code__
