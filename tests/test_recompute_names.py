"""The option `recompute` of a layer, and attributes of that name in users' own classes."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from helpers import flat
from replace_cases import H, I, T, an_input
from torch import nn
from torch.nn.utils import parametrizations

import fastrnn

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from memory import saved_bytes

# Runs before any kernel, so one instruction set is enough.
pytestmark = [pytest.mark.once, pytest.mark.cpu("the option does not depend on the device")]

LAYERS = ["RNN", "LSTM", "GRU"]


class Method(nn.LSTM):
    def recompute(self):
        return self.hidden_size


class ClassAttribute(nn.GRU):
    recompute = "the user's"


class InInit(nn.RNN):
    def __init__(self, *args):
        super().__init__(*args)
        self.recompute = "the user's"


class AModule(nn.LSTM):
    def __init__(self, *args):
        super().__init__(*args)
        self.recompute = nn.Linear(1, 1)


class AParameter(nn.GRU):
    def __init__(self, *args):
        super().__init__(*args)
        self.recompute = nn.Parameter(torch.ones(1))


class ACell(nn.LSTMCell):
    recompute = True


class NoAttribute(nn.LSTM):
    pass


USERS = [Method, ClassAttribute, InInit, AModule, AParameter, ACell]


def make(cls, how):
    if how == "patched":
        with fastrnn.patch():
            return cls(I, H)
    module = cls(I, H)
    if how == "parametrized":
        name = next(name for name, _ in module.named_parameters() if name.startswith("weight_ih"))
        parametrizations.weight_norm(module, name)
    return fastrnn.accelerate(module)


def saved(layer):
    """The bytes that a training step saves for backward."""
    return saved_bytes(layer, an_input(layer))


HOWS = ["accelerated", "patched", "parametrized"]
COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
}


HOWS_AND_COPIES = [(how, copied) for how in HOWS for copied in COPIES]
HOWS_AND_COPIES.remove(("parametrized", "pickled"))  # torch does not support it


@pytest.mark.parametrize(("how", "copied"), HOWS_AND_COPIES)
@pytest.mark.parametrize("cls", USERS)
def test_users_attribute_is_kept(cls, how, copied):
    theirs = cls(I, H)
    module = COPIES[copied](make(cls, how))
    assert isinstance(module, getattr(fastrnn, cls.__base__.__name__))
    assert "recompute=True" not in repr(module)
    if cls is Method:
        assert module.recompute() == H
    else:
        assert type(module.recompute) is type(theirs.recompute)
    if how != "parametrized":
        assert module.state_dict().keys() == theirs.state_dict().keys()
        assert saved(module) == saved(getattr(fastrnn, cls.__base__.__name__)(I, H))
    if cls not in (AModule, AParameter):  # torch stores these in _modules and _parameters
        module.recompute = "new"
        assert vars(module)["recompute"] == "new"


@pytest.mark.parametrize("how", HOWS)
def test_unused_name_is_no_attribute(how):
    module = make(NoAttribute, how)
    assert not hasattr(module, "recompute")
    assert not hasattr(type(module), "recompute")
    with pytest.raises(AttributeError, match="no attribute 'recompute'"):
        _ = module.recompute
    before = saved_bytes(module, torch.randn(T, 2, I))
    for value in [True, nn.Linear(1, 1), nn.Parameter(torch.ones(1))]:
        module.recompute = value
        assert module.recompute is value
        assert saved_bytes(module, torch.randn(T, 2, I)) == before
        del module.recompute
        assert not hasattr(module, "recompute")


@pytest.mark.parametrize("name", LAYERS)
def test_attribute_set_on_torchs_layer(name):
    module = getattr(nn, name)(I, H)
    module.recompute = "the user's"
    fastrnn.accelerate(module)
    assert module.recompute == "the user's"
    assert "recompute" not in repr(module)
    assert saved(module) == saved(getattr(fastrnn, name)(I, H))
    module.recompute = "still"
    assert vars(fastrnn.restore(module))["recompute"] == "still"


class OnOurs(fastrnn.LSTM):
    def recompute(self):
        return "the user's"


def test_subclass_of_fastrnns_layer():
    keeping, recomputing = OnOurs(I, H), OnOurs(I, H, recompute=True)
    assert recomputing.recompute() == "the user's"
    assert "recompute=True" not in repr(keeping)
    assert "recompute=True" in repr(recomputing)
    assert saved(recomputing) < saved(keeping)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU, *USERS[:5], NoAttribute])
def test_accelerate_sets_recompute(cls, copied):
    module = cls(I, H)
    base = cls if cls.__module__.startswith("torch") else cls.__base__
    keeping = getattr(fastrnn, base.__name__)(I, H)
    model = fastrnn.accelerate(nn.Sequential(module), recompute=True)
    assert model[0] is module
    module = COPIES[copied](model)[0]
    assert "recompute=True" in repr(module)
    if base is not nn.RNN:  # an RNN saves only its outputs anyway
        assert saved(module) < saved(keeping)
    expected = flat(fastrnn.restore(copy.deepcopy(module))(an_input(module)))
    torch.testing.assert_close(flat(module(an_input(module))), expected)
    assert module.state_dict().keys() == cls(I, H).state_dict().keys()


def test_accelerate_sets_recompute_of_fastrnns_layers_but_not_of_cells():
    model = nn.ModuleList([fastrnn.GRU(I, H), fastrnn.LSTMCell(I, H), nn.LSTMCell(I, H)])
    attributes = [set(vars(module)) for module in model]
    fastrnn.accelerate(model, recompute=True)
    assert model[0].recompute
    assert [set(vars(module)) for module in model[1:]] == attributes[1:]
    fastrnn.accelerate(model)
    assert model[0].recompute
    model[0].recompute = False
    assert "recompute" not in repr(model)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layer_sees_a_changed_option(name):
    layer = getattr(fastrnn, name)(I, H)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for recompute in [False, True]:
        layer.recompute = recompute
        compiled(an_input(layer))
        assert f", {recompute})" in graphs[-1].split("fastrnn")[1].splitlines()[0]
    torch._dynamo.reset()
