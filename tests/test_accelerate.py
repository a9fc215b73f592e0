"""accelerate() and restore(): which modules they change, what they keep, and round trips."""

import copy
import functools
import io
import pickle

import pytest
import torch
from helpers import flat
from replace_cases import (
    NAMES,
    B,
    H,
    I,
    OnOurs,
    OnOwnForward,
    OnPlain,
    OwnCall,
    OwnForward,
    OwnReduce,
    Plain,
    PlainCell,
    Registered,
    Registry,
    T,
    WithMeta,
    a_weight,
    an_input,
    result,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import fastrnn

# These tests do not depend on the kernels.
pytestmark = [pytest.mark.once, pytest.mark.cpu("replacement does not depend on the device")]

# ---- accelerate and restore ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_single_layer(name, reports):
    torch_class, our_class = getattr(nn, name), getattr(fastrnn, name)
    module = torch_class(I, H)
    expected = result(module)
    attributes = dict(vars(module))

    assert fastrnn.accelerate(module) is module
    assert type(module) is our_class
    assert vars(module) == attributes
    assert_close(result(module), expected)

    assert fastrnn.restore(module) is module
    assert type(module) is torch_class
    assert vars(module).keys() == attributes.keys()
    assert_close(result(module), expected)
    assert reports() == []


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(I, I)
        self.layers = nn.ModuleList([nn.LSTM(I, H), nn.Sequential(nn.GRU(I, H), nn.ReLU())])
        self.shared = self.layers[0]
        self.cells = nn.ModuleDict({"rnn": nn.RNNCell(I, H), "lstm": nn.LSTMCell(I, H)})
        self.rnn = nn.RNN(I, H, nonlinearity="relu")
        self.gru = nn.GRUCell(I, H)
        self.not_registered = [nn.LSTM(I, H)]

    def forward(self, x):
        x = self.embed(x)
        results = [self.layers[0](x), self.layers[1][0](x), self.shared(x), self.rnn(x)]
        return flat([results, [cell(x[0]) for cell in (*self.cells.values(), self.gru)]])


def types(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_nested_model():
    model = Model().eval()
    params = dict(model.named_parameters())
    before = types(model)
    expected = model(torch.ones(T, B, I))

    assert fastrnn.accelerate(model) is model
    ours = types(model)
    changed = {name for name in before if ours[name] is not before[name]}
    assert changed == {
        "layers.0", "layers.1.0", "shared", "cells.rnn", "cells.lstm", "rnn", "gru"
    }  # fmt: skip
    assert all(ours[name] is getattr(fastrnn, before[name].__name__) for name in changed)
    assert model.shared is model.layers[0]
    assert type(model.not_registered[0]) is nn.LSTM
    assert all(p is params[name] for name, p in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert_close(model(torch.ones(T, B, I)), expected)

    fastrnn.accelerate(model)
    assert types(model) == ours

    assert fastrnn.restore(model) is model
    assert types(model) == before
    assert all(p is params[name] for name, p in model.named_parameters())
    assert_close(model(torch.ones(T, B, I)), expected)
    fastrnn.restore(model)
    assert types(model) == before


def test_fastrnn_functional_is_called(monkeypatch, without_fast_path):
    calls = []
    lstm = fastrnn.functional.lstm
    monkeypatch.setattr(
        fastrnn.functional, "lstm", lambda *args: calls.append(len(args)) or lstm(*args)
    )
    for module in (
        nn.LSTM(I, H),
        Plain(I),
        parametrizations.weight_norm(nn.LSTM(I, H), "bias_ih_l0", dim=None),
    ):
        module(an_input(module))
        assert calls == []
        fastrnn.accelerate(module)(an_input(module))
        assert calls == [9]
        fastrnn.restore(module)(an_input(module))
        assert calls == [9]
        calls.clear()


def test_hooks_training_flag_and_optimizer_are_kept():
    module = nn.LSTM(I, H, num_layers=2, dropout=0.5)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    module.weight_hh_l0.register_hook(lambda grad: seen.append("backward"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]

    fastrnn.accelerate(module)
    assert module.training
    module(an_input(module))[0].sum().backward()
    optimizer.step()
    assert seen == ["before", "after", "backward"]
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    module.eval()
    fastrnn.restore(module)
    assert not module.training


def test_restore_of_layers_built_by_fastrnn():
    model = nn.Sequential(fastrnn.GRU(I, H))
    expected = flat(model(an_input(model)))
    assert type(fastrnn.restore(model)[0]) is nn.GRU
    assert_close(flat(model(an_input(model))), expected)


@pytest.mark.parametrize("name", NAMES)
def test_restored_layers_do_not_keep_weights_of_a_functional_call(name):
    module = fastrnn.accelerate(getattr(nn, name)(I, H))
    expected = result(module)
    other = {key: p.detach() * 2 for key, p in module.named_parameters()}
    functional_call(module, other, (an_input(module),))
    assert_close(result(fastrnn.restore(module)), expected)

    functional_call(module, other, (an_input(module),))
    assert_close(result(fastrnn.accelerate(module)), expected)


@pytest.mark.parametrize("function", [fastrnn.accelerate, fastrnn.restore])
@pytest.mark.parametrize("wrong", [None, nn.LSTM, [nn.LSTM(I, H)]], ids=["None", "class", "list"])
def test_not_a_module(function, wrong):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got (NoneType|type|list)$"):
        function(wrong)


# ---- subclasses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (lambda: Plain(I), fastrnn.LSTM),
        (lambda: OnPlain(I), fastrnn.LSTM),
        (lambda: PlainCell(I, H), fastrnn.GRUCell),
    ],
    ids=["Plain", "OnPlain", "PlainCell"],
)
def test_subclass_without_own_forward(make, ours, reports):
    module = make()
    original_class = type(module)
    expected = result(module)
    original_repr = repr(module)

    assert fastrnn.accelerate(module) is module
    assert isinstance(module, original_class)
    assert isinstance(module, ours)
    assert type(module).forward is ours.forward
    assert repr(module) == original_repr
    assert_close(result(module), expected)
    fast_class = type(module)
    assert type(fastrnn.accelerate(module)) is fast_class
    assert type(fastrnn.accelerate(make())) is fast_class

    assert type(fastrnn.restore(module)) is original_class
    assert_close(result(module), expected)
    assert reports() == []


def test_super_forward_in_a_subclass_method_is_fastrnns():
    module = Plain(I)
    expected = module.doubled(an_input(module))
    fastrnn.accelerate(module)
    assert_close(module.doubled(an_input(module)), expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_accelerated_subclass(protocol):
    module = fastrnn.accelerate(Plain(I)).eval()
    module.extra = "kept"
    twin = pickle.loads(pickle.dumps(module, protocol=protocol))
    assert type(twin) is type(module)
    assert (twin.extra, twin.training) == ("kept", False)
    assert_close(result(twin), result(module), rtol=0, atol=0)
    assert type(fastrnn.restore(twin)) is Plain


def test_save_and_deepcopy_accelerated_subclass():
    module = fastrnn.accelerate(nn.Sequential(OnPlain(I)))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(module)):
        assert type(twin[0]) is type(module[0])
        assert twin[0].weight_hh_l0 is not module[0].weight_hh_l0
        assert twin[0]._flat_weights[1] is twin[0].weight_hh_l0
        assert_close(result(twin[0]), result(module[0]), rtol=0, atol=0)


def test_unpickle_subclass_that_now_overrides_forward(monkeypatch):
    class_now = type("Later", (nn.LSTM,), {"__module__": __name__, "__qualname__": "Later"})
    monkeypatch.setitem(globals(), "Later", class_now)
    data = pickle.dumps(fastrnn.accelerate(class_now(I, H)))
    later = type("Later", (OwnForward,), {"__module__": __name__, "__qualname__": "Later"})
    monkeypatch.setitem(globals(), "Later", later)
    twin = pickle.loads(data)
    assert type(twin) is later
    assert twin.weight_hh_l0.shape == (4 * H, H)


NO_SUPER = "overrides forward and does not call super().forward"
LEFT_ALONE = {
    "OwnForward": (lambda: OwnForward(I, H), NO_SUPER),
    "OnOwnForward": (lambda: OnOwnForward(I, H), NO_SUPER),
    "OwnCall": (lambda: OwnCall(I, H), "overrides __call__"),
    "OwnReduce": (lambda: OwnReduce(I, H), "overrides __reduce__"),
    "Registered": (lambda: Registered(I, H), "overrides __init_subclass__"),
    "WithMeta": (lambda: WithMeta(I, H), "has the metaclass Meta"),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_unsupported_subclass_is_left_alone_and_reported(kind, reports):
    make, why = LEFT_ALONE[kind]
    model = nn.Sequential(nn.Linear(I, I), make(), nn.LSTM(I, H))
    before = type(model[1])
    registered = list(Registry.made)
    expected = result(model[1])

    assert fastrnn.accelerate(model) is model
    assert type(model[1]) is before
    assert type(model[2]) is fastrnn.LSTM
    assert reports() == [f"'1' ({kind}) is left alone: it {why}"]
    assert Registry.made == registered
    assert_close(result(model[1]), expected)

    fastrnn.accelerate(model[1])
    assert reports()[1:] == [f"the model ({kind}) is left alone: it {why}"]


def test_forward_set_on_the_instance_is_left_alone(reports):
    module = nn.LSTM(I, H)
    module.forward = functools.partial(lambda forward, x: forward(x * 0), module.forward)
    expected = result(module)
    fastrnn.accelerate(module)
    assert type(module) is nn.LSTM
    assert reports() == ["the model (LSTM) is left alone: it has a forward set on the instance"]
    assert_close(result(module), expected)


def test_subclass_of_a_fastrnn_class_is_left_alone(reports):
    module = OnOurs(I, H)
    fastrnn.accelerate(module)
    assert type(module) is OnOurs
    assert reports() == []
    fastrnn.restore(module)
    assert type(module) is OnOurs
    assert reports() == ["the model (OnOurs) is left alone: it is of a class written on fastrnn's"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_unchanged(reports):
    scripted = torch.jit.script(nn.Sequential(nn.LSTM(I, H)))
    expected = flat(scripted(an_input(scripted)))
    before = [type(module) for module in scripted.modules()]
    fastrnn.accelerate(scripted)
    assert [type(module) for module in scripted.modules()] == before
    assert_close(flat(scripted(an_input(scripted))), expected)
    assert reports() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_quantized_modules_are_unchanged(name, reports):
    from torch.ao.nn.quantized import dynamic

    quantized = getattr(dynamic, name)(I, H)
    model = nn.Sequential(quantized)
    fastrnn.accelerate(model)
    assert type(model[0]) is getattr(dynamic, name)
    assert reports() == []


# ---- parametrized modules -----------------------------------------------------------------------


PARAMETRIZED = {
    **{
        name: (functools.partial(getattr(nn, name), I, H), getattr(fastrnn, name)) for name in NAMES
    },
    "Plain": (lambda: Plain(I), fastrnn.LSTM),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_modules(kind, reports):
    make, ours = PARAMETRIZED[kind]
    module = make()
    original_class = type(module)
    name = a_weight(module)
    parametrizations.weight_norm(module, name)
    twin = copy.deepcopy(module)  # shares the class that parametrize created
    expected = result(module)
    original_repr = repr(module)

    assert fastrnn.accelerate(module) is module
    fast_class = type(module)
    assert issubclass(fast_class, original_class)
    assert issubclass(fast_class, ours)
    assert repr(module) == original_repr
    assert parametrize.is_parametrized(module, name)
    assert_close(result(module), expected)
    assert type(fastrnn.accelerate(module)) is fast_class
    assert type(twin).__bases__ == (original_class,)

    module.parametrizations[name].original0.data.mul_(2)
    changed = result(module)
    assert not torch.allclose(changed[0], expected[0])
    sum(t.sum() for t in changed).backward()
    assert module.parametrizations[name].original0.grad.any()

    fastrnn.restore(module)
    assert type(module).__bases__ == (original_class,)
    assert repr(module) == original_repr
    assert_close(result(module), changed)

    parametrize.remove_parametrizations(module, name)
    assert type(module) is original_class
    assert_close(result(module), changed)
    assert_close(result(twin), expected)
    assert reports() == []


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrizations_changed_while_accelerated(kind):
    make, _ = PARAMETRIZED[kind]
    module = make()
    original_class = type(module)
    name = a_weight(module)
    expected = result(module)
    parametrizations.weight_norm(module, name)
    fastrnn.accelerate(module)
    parametrize.remove_parametrizations(module, name)
    assert not parametrize.is_parametrized(module)
    assert type(module) is type(fastrnn.accelerate(make()))
    assert_close(result(module), expected)

    parametrizations.weight_norm(module, name)
    fastrnn.restore(module)
    assert_close(result(module), expected)
    parametrize.remove_parametrizations(module, name)
    assert type(module) is original_class
    assert_close(result(module), expected)


def test_unsupported_parametrized_module_is_left_alone(reports):
    module = OwnForward(I, H)
    parametrizations.weight_norm(module, "weight_hh_l0")
    before = type(module)
    fastrnn.accelerate(module)
    assert type(module) is before
    assert reports() == [f"the model (ParametrizedOwnForward) is left alone: it {NO_SUPER}"]

    module = parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0")
    module.__class__ = type("Wrapped", (type("Mixin", (), {}), type(module)), {})
    fastrnn.accelerate(module)
    assert type(module).__name__ == "Wrapped"
    assert reports()[1:] == [
        "the model (Wrapped) is left alone: it was parametrized and then given another class"
    ]


def test_several_parametrizations():
    module = nn.LSTM(I, H)
    parametrizations.weight_norm(module, "weight_hh_l0")
    parametrizations.spectral_norm(module, "weight_ih_l0")
    module.eval()  # in training mode each evaluation of spectral_norm is a power iteration
    expected = result(module)
    assert_close(result(fastrnn.accelerate(module)), expected)
    parametrize.remove_parametrizations(module, "weight_ih_l0")
    assert_close(result(module), expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fastrnn.LSTM
    assert_close(result(module), expected)
