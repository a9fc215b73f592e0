"""The direct way from a module to the kernels: where it is taken, and that it changes nothing."""

import contextlib
import itertools

import pytest
import torch
from helpers import CELLS, FULL, LAYERS, LOW, cell_pair, cell_state, flat, pair, random_state
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, modules


def direct(layer, *args):
    """The direct call's results, or None; hx is None where it is not given."""
    name = type(layer).__name__.removesuffix("Cell").lower()
    if name == "rnn":
        name = f"rnn_{layer.nonlinearity}"
    call = _C.cell if isinstance(layer, nn.RNNCellBase) else _C.layer
    return call(name, layer, *args, *[None] * (2 - len(args)))


@pytest.fixture
def long_way(monkeypatch):
    """Calls a layer as if there were no direct way."""

    def call(layer, *args):
        return type(layer).forward.__wrapped__(layer, *args)

    return call


@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_give_the_same_bits(kind, dtype, long_way):
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
def test_unbatched_layers(kind, long_way):
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
def test_cells_give_the_same_bits(kind, dtype, long_way):
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
def test_states_and_inputs_of_any_stride(kind, long_way):
    layer, _ = pair(kind, 5, 17)
    x = torch.randn(3, 4, 10)[:, :, ::2]
    state = random_state(layer, 8)
    hx = tuple(t[:, ::2] for t in state) if isinstance(state, tuple) else state[:, ::2]
    with torch.no_grad():
        for a, b in zip(flat(direct(layer, x, hx)), flat(long_way(layer, x, hx)), strict=True):
            assert torch.equal(a, b)


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
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "function mode": Function,
    "dispatch mode": Dispatch,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_left_where_somebody_listens(listener):
    for layer, x in [
        (fastrnn.LSTM(5, 17), torch.randn(3, 4, 5)),
        (fastrnn.GRUCell(5, 17), torch.randn(4, 5)),
    ]:
        hx = None if isinstance(layer, nn.LSTM) else torch.zeros(4, 17)
        with torch.no_grad():
            assert direct(layer, x, hx) is not None
            with LISTENERS[listener]():
                assert direct(layer, x, hx) is None


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
    "a gradient of the input": lambda: (LAYER, torch.randn(3, 4, 5, requires_grad=True), None),
    "a subclass": lambda: (LAYER, torch.randn(3, 4, 5).as_subclass(Subclass), None),
    "packed": lambda: (LAYER, pack_sequence([torch.randn(3, 5)]), None),
    "meta": lambda: (LAYER, torch.randn(3, 4, 5, device="meta"), None),
    "sparse": lambda: (LAYER, torch.randn(3, 4, 5).to_sparse(), None),
    "another dtype": lambda: (LAYER, torch.randn(3, 4, 5).double(), None),
    "another width": lambda: (LAYER, torch.randn(3, 4, 6), None),
    "one state": lambda: (LAYER, torch.randn(3, 4, 5), torch.zeros(1, 4, 17)),
    "states in a list": lambda: (LAYER, torch.randn(3, 4, 5), [torch.zeros(1, 4, 17)] * 2),
    "a state too small": lambda: (LAYER, torch.randn(3, 4, 5), (torch.zeros(1, 3, 17),) * 2),
    "a state of a batch": lambda: (LAYER, torch.randn(3, 5), (torch.zeros(1, 1, 17),) * 2),
    "no steps": lambda: (LAYER, torch.randn(0, 4, 5), None),
    "no tensor": lambda: (LAYER, 3, None),
    "cell, another width": lambda: (("GRUCell", 5, 17), torch.randn(4, 6), torch.zeros(4, 17)),
    "cell, another batch": lambda: (("GRUCell", 5, 17), torch.randn(4, 5), torch.zeros(3, 17)),
    "cell, no state": lambda: (("GRUCell", 5, 17), torch.randn(4, 5), None),
    "cell, unbatched state": lambda: (("GRUCell", 5, 17), torch.randn(1, 5), torch.zeros(17)),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_for_anything_else(case):
    (name, *sizes), x, hx = LEFT[case]()
    layer = getattr(fastrnn, name)(*sizes)
    enabled = contextlib.nullcontext() if "gradient" in case else torch.no_grad()
    with enabled:
        assert direct(layer, x, hx) is None


def test_left_for_dropout_in_training():
    layer = fastrnn.GRU(5, 17, 2, dropout=0.5)
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        assert direct(layer, x) is None
        assert direct(layer.eval(), x) is not None


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


def test_the_long_way_is_torchs_code():
    assert modules.LSTM.forward.__wrapped__.__code__ is nn.LSTM.forward.__code__
