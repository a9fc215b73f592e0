"""The fast path from a module to the kernels: when it is taken, and that results are unchanged."""

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


def try_fast_path(layer, *args):
    """The fast path's results, or None if it does not apply. hx defaults to None."""
    name = type(layer).__name__.removesuffix("Cell").lower()
    if name == "rnn":
        name = f"rnn_{layer.nonlinearity}"
    call = _C.cell if isinstance(layer, nn.RNNCellBase) else _C.layer
    return call(name, layer, *args, *[None] * (2 - len(args)))


def fast_path(layer, *args):
    """try_fast_path outside of modes. On CUDA the tests' default device is a function mode."""
    with torch._C.DisableTorchFunction():
        return try_fast_path(layer, *args)


def operator_path(layer, *args):
    """The results of the operator path: torch's forward code and fastrnn's operator."""
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
                    found, expected = fast_path(layer, *args), operator_path(layer, *args)
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
        found, expected = fast_path(layer, x, hx), operator_path(layer, x, hx)
        assert fast_path(layer, x) is not None
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
            found, expected, called = (
                fast_path(layer, x, hx),
                operator_path(layer, x, hx),
                layer(x, hx),
            )
        assert found is not None
        for a, b, c in zip(flat(found), flat(expected), flat(called), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("kind", LAYERS)
def test_noncontiguous_inputs_and_states(kind):
    layer, _ = pair(kind, 5, 17)
    x = torch.randn(3, 4, 10)[:, :, ::2]
    state = random_state(layer, 8)
    hx = tuple(t[:, ::2] for t in state) if isinstance(state, tuple) else state[:, ::2]
    with torch.no_grad():
        for a, b in zip(
            flat(fast_path(layer, x, hx)), flat(operator_path(layer, x, hx)), strict=True
        ):
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
        ours, theirs = (with_gradients(call, layer, *args) for call in [fast_path, operator_path])
        for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_cells(kind):
    layer, _ = cell_pair(kind, 5, 17)
    args = torch.randn(3, 5), cell_state(layer, 3)
    ours, theirs = (with_gradients(call, layer, *args) for call in [fast_path, operator_path])
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_return_no_views(kind):
    """FSDP2 warns about views, since modifying them in place drops its hooks."""
    layer, theirs = cell_pair(kind, 5, 17)
    args = torch.randn(3, 5), cell_state(layer, 3)
    loss = sum((2 * t).sin().sum() for t in flat(theirs(*args)))
    expected = torch.autograd.grad(loss, list(theirs.parameters()))
    for call in [fast_path, operator_path]:
        results = flat(call(layer, *args))
        assert all(t.requires_grad and t._base is None for t in results)
        loss = sum(t.mul_(2).sin().sum() for t in results)
        torch.testing.assert_close(torch.autograd.grad(loss, list(layer.parameters())), expected)


def test_only_required_gradients_are_computed():
    layer = fastrnn.LSTM(5, 17)
    layer.weight_hh_l0.requires_grad_(False)
    output, _ = fast_path(layer, torch.randn(3, 4, 5))
    output.sum().backward()
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None


def test_second_backward_needs_retain_graph():
    layer = fastrnn.LSTM(5, 17)
    output = fast_path(layer, torch.randn(3, 4, 5))[0].sum()
    output.backward(retain_graph=True)
    output.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()


def test_weight_changed_in_place_before_backward():
    layer = fastrnn.GRU(5, 17)
    output, _ = fast_path(layer, torch.randn(3, 4, 5))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_saved_tensors_hooks():
    layer, seen = fastrnn.LSTM(5, 17), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        output, _ = fast_path(layer, torch.randn(3, 4, 5))
    assert len(seen) >= 4
    output.sum().backward()
    assert layer.weight_ih_l0.grad is not None


def test_double_backward():
    layer, _ = pair("lstm", 3, 4, dtype=torch.float64)
    found = []
    for call in [fast_path, operator_path]:
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 2, 3).requires_grad_()
        (first,) = torch.autograd.grad(call(layer, x)[0].pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_arguments_are_not_modified():
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


MODES = {
    "autocast": lambda: torch.autocast("cpu"),
    "function mode": Function,
    "dispatch mode": Dispatch,
}


@pytest.mark.parametrize("mode", MODES)
def test_not_taken_in_modes(mode):
    """Apart from cells under autocast."""
    for layer, x in [
        (fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)),
        (fastrnn.GRUCell(5, 17), torch.randn(4, 5)),
    ]:
        is_cell = isinstance(layer, nn.RNNCellBase)
        hx = torch.zeros(4, 17) if is_cell else None
        with torch.no_grad():
            assert try_fast_path(layer, x, hx) is not None
            with MODES[mode]():
                taken = try_fast_path(layer, x, hx) is not None
            assert taken == (is_cell and mode == "autocast" and x.is_cpu)


@pytest.mark.parametrize("kind", CELLS)
def test_taken_under_a_default_device(kind):
    """torch.set_default_device is a function mode, but does not affect existing tensors."""
    for layer, x in [
        (pair(kind, 5, 17)[0], torch.randn(3, 4, 5)),
        (cell_pair(kind, 5, 17)[0], torch.randn(4, 5)),
    ]:
        expected = layer(x)
        with torch.device("meta"):
            found = try_fast_path(layer, x)
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_without_state(kind):
    layer, _ = cell_pair(kind, 5, 17)
    for x in (torch.randn(4, 5), torch.randn(5)):
        for a, b in zip(flat(fast_path(layer, x)), flat(operator_path(layer, x)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj"])
def test_states_as_a_list(kind):
    layer, _ = pair(kind, 5, 17)
    x, hx = torch.randn(3, 4, 5), random_state(layer, 4)
    for a, b in zip(flat(fast_path(layer, x, list(hx))), flat(layer(x, hx)), strict=True):
        assert torch.equal(a, b)
    cell = fastrnn.LSTMCell(5, 17)
    hx = cell_state(cell, 4)
    for a, b in zip(fast_path(cell, x[0], list(hx)), cell(x[0], hx), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_not_taken_under_cuda_autocast():
    layer, x = fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)
    with torch.no_grad():
        assert fast_path(layer, x) is not None
        with torch.autocast("cuda"):
            assert fast_path(layer, x) is None


def test_not_taken_inside_transforms():
    layer = fastrnn.RNN(5, 17)
    seen = []

    def call(x):
        seen.append(fast_path(layer, x))
        return x

    with torch.no_grad():
        torch.func.vmap(call)(torch.randn(2, 3, 4, 5))
        torch.jit.trace(call, torch.randn(3, 4, 5), check_trace=False)
    assert seen == [None, None]


LAYER = ("LSTM", 5, 17)
NOT_TAKEN = {
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


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_not_taken_for_other_arguments(case):
    if case == "sparse" and VIRTUAL:
        pytest.skip("the virtual GPU has no sparse tensors")
    (name, *sizes), x, hx = NOT_TAKEN[case]()
    layer = getattr(fastrnn, name)(*sizes)
    with torch.no_grad():
        assert fast_path(layer, x, hx) is None
    assert fast_path(layer, x, hx) is None


def test_not_taken_for_dual_tensors():
    layer, x = fastrnn.GRU(5, 17), torch.randn(3, 4, 5)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert fast_path(layer, dual) is None
    assert fast_path(layer, x) is not None


def test_same_dropout_masks():
    layer = fastrnn.GRU(5, 17, 3, dropout=0.5)
    x = torch.randn(3, 4, 5)
    results = []
    for call in [fast_path, operator_path]:
        torch.manual_seed(0)
        results.append(flat(call(layer, x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0], fast_path(layer, x)[0])
    assert torch.equal(fast_path(layer.eval(), x)[0], operator_path(layer, x)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_attributes_are_read_as_torch_reads_them(name):
    """Users may set them to any object: truth and integer conversion follow Python's rules."""
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
            for a, b in zip(flat(layer(x)), flat(operator_path(layer, x)), strict=True):
                assert torch.equal(a, b)
                assert a.shape == b.shape


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_missing_attribute_raises_torchs_error(name):
    layer, x = getattr(fastrnn, name)(5, 17), torch.randn(3, 4, 5)
    del layer.batch_first
    with torch.no_grad():
        assert fast_path(layer, x) is None
        with pytest.raises(AttributeError, match="batch_first"):
            layer(x)


def test_subclass_that_overrides_steps_of_forward():
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
    assert modules._overrides_steps(Checked)
    assert not modules._overrides_steps(Plain)
    assert not modules._overrides_steps(fastrnn.GRUCell)


def test_not_taken_for_parametrized_weights():
    layer = nn.utils.parametrizations.weight_norm(fastrnn.GRU(5, 17), "weight_hh_l0")
    with torch.no_grad():
        assert fast_path(layer, torch.randn(3, 4, 5)) is None


def test_visible_to_the_profiler():
    layer, x = fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert "fastrnn::forward" in {event.key for event in profile.key_averages()}


def test_inference_mode():
    layer, x = fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)
    with torch.inference_mode():
        output, _ = layer(x)
        assert fast_path(layer, x) is not None
    assert output.is_inference()
    with torch.no_grad():
        assert torch.equal(output, layer(x)[0])


@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_inference_mode(kind):
    cell, _ = cell_pair(kind, 5, 17)
    x, start = torch.randn(3, 5), cell_state(cell, 3)
    found = []
    for mode in [torch.inference_mode, torch.no_grad]:
        hx = start
        with mode():
            for _ in range(3):
                hx = fast_path(cell, x, hx)
        found.append(flat(hx))
    for a, b in zip(*found, strict=True):
        assert a.is_inference()
        assert torch.equal(a, b)


def test_operator_path_is_torchs_code():
    theirs = inspect.unwrap(nn.LSTM.forward)  # keep_types=True wraps it
    assert modules.LSTM.forward.__wrapped__.__code__ is theirs.__code__
