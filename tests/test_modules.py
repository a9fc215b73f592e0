"""The classes behave like torch's. test_layers.py compares the numerical results."""

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
from helpers import flat, ragged
from module_cases import (
    ALL,
    CELLS,
    LAYERS,
    NAMES,
    H,
    I,
    an_input,
    assert_same_values,
    build,
    result,
    set_new_parameters,
)
from torch import nn
from torch.testing import assert_close

import fastrnn
from fastrnn import functional, modules

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once

# ---- inherited behaviour ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_class(name):
    ours, theirs = getattr(fastrnn, name), getattr(nn, name)
    assert ours.__bases__ == (theirs,)
    # A layer's __init__ is wrapped to take the option `recompute`.
    assert getattr(ours.__init__, "__wrapped__", ours.__init__) is theirs.__init__
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert ours.forward.__qualname__ == f"{name}.forward"
    assert ours.forward.__annotations__ == theirs.forward.__annotations__
    assert ours.forward.__doc__ == theirs.forward.__doc__
    assert f"torch.nn.{name}" in ours.__doc__


@pytest.mark.parametrize("case", ALL)
def test_construction(case):
    ours, theirs = build(fastrnn, case), build(nn, case)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_device_and_dtype(name):
    kind = getattr(fastrnn, name)
    args = (I, H, 2) if issubclass(kind, nn.RNNBase) else (I, H)
    if name == "RNN":
        args += ("relu",)
    elif name == "RNNCell":
        args += (True, "relu")
    ours = kind(*args, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.float64)}
    assert repr(ours) == repr(getattr(nn, name)(*args))
    if name.startswith("RNN"):
        assert ours.nonlinearity == "relu"


@pytest.mark.parametrize("case", ALL)
def test_state_dict_both_ways(case):
    ours, theirs = build(fastrnn, case, seed=0), build(nn, case, seed=1)
    weights = {name: w.clone() for name, w in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    assert_same_values(ours, theirs)
    ours.load_state_dict(weights)
    theirs.load_state_dict(weights)
    assert_same_values(ours, theirs)


# ---- forward ------------------------------------------------------------------------------------


def function_of(module):
    """The name of the function that forward calls, in torch._VF and in fastrnn.functional."""
    name = type(module).__name__
    kind = name.removesuffix("Cell").lower()
    cell = "_cell" if name.endswith("Cell") else ""
    return f"rnn_{module.nonlinearity}{cell}" if kind == "rnn" else kind + cell


def record_calls(monkeypatch, owner, name):
    """A list that gets the (args, kwargs) of every later call of owner.name."""
    calls, function = [], getattr(owner, name)

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in ALL for kind in ("batched", "unbatched", "states")]
    + [(case, "packed") for case in LAYERS],
)
def test_functional_gets_the_arguments_that_torch_passes(
    case, training, kind, monkeypatch, without_fast_path
):
    ours, theirs = build(fastrnn, case).train(training), build(nn, case).train(training)
    x = an_input(ours)
    args = (x,)
    if kind == "unbatched":
        args = (x[0],)
    elif kind == "packed":
        args = (ragged([2, 4, 3], I),)
    elif kind == "states":
        returned = theirs(x)
        args = (x, returned[1] if case in LAYERS else returned)

    name = function_of(ours)
    fake_vf = types.SimpleNamespace(**{name: getattr(torch._VF, name)})
    monkeypatch.setattr(nn.modules.rnn, "_VF", fake_vf)
    our_calls = record_calls(monkeypatch, functional, name)
    their_calls = record_calls(monkeypatch, fake_vf, name)
    # Without function modes, such as --device cuda's default device: one calls functional again.
    with torch._C.DisableTorchFunction():
        our_result = result(ours, *args)
    assert (len(our_calls), len(their_calls)) == (1, 0)
    their_result = result(theirs, *args)
    assert (len(our_calls), len(their_calls)) == (1, 1)

    assert_close(our_calls, their_calls, rtol=0, atol=0)
    assert_close(our_result, their_result)


@pytest.mark.parametrize("case", ALL)
def test_output_structure_is_torchs(case):
    ours, theirs = build(fastrnn, case), build(nn, case)
    x = an_input(ours)
    inputs = [x, x[0]] + ([ragged([2, 4, 3], I)] if case in LAYERS else [])
    for x in inputs:
        torch.manual_seed(2)
        our = ours(x)
        torch.manual_seed(2)
        their = theirs(x)
        assert type(our) is type(their)
        if case in LAYERS:
            assert [type(part) for part in our] == [type(part) for part in their]
        assert_close(our, their)


@pytest.mark.parametrize("case", ALL)
def test_gradients_reach_parameters_and_input(case):
    grads = []
    for library in (fastrnn, nn):
        module = build(library, case)
        x = an_input(module).requires_grad_()
        sum(t.square().sum() for t in result(module, x)).backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    assert_close(*grads)


@pytest.mark.parametrize("case", ALL)
def test_hooks(case):
    seen = []
    ours = build(fastrnn, case)
    ours.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ours.register_forward_hook(lambda module, args, output: seen.append(output))
    x = an_input(ours)
    found = result(ours, x)
    assert_close(found, result(build(nn, case), x * 2))
    assert [t is s for t, s in zip(found, flat(seen), strict=True)] == [True] * len(found)


def test_unknown_forward_of_torch_is_rejected():
    def forward(self, input):
        return input

    with pytest.raises(ImportError, match=r"forward does not call torch\._VF"):
        modules._rebind(forward)


def test_globals_of_a_later_torchs_forward_resolve():
    source = "def forward(self, input):\n    return _VF, only_in_a_later_torch\n"
    theirs = {"_VF": torch._VF, "only_in_a_later_torch": 1, "__name__": "later"}
    exec(source, theirs)
    try:
        assert modules._rebind(theirs["forward"])(None, None) == (functional, 1)
    finally:
        del modules.only_in_a_later_torch


# ---- copies -------------------------------------------------------------------------------------


def save_and_load(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle0": lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
    "save": save_and_load,
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", ALL)
def test_copies(case, how, used):
    ours = build(fastrnn, case).eval()
    x = an_input(ours)
    if used:
        ours(x)
    twin = COPIES[how](ours)
    assert type(twin) is type(ours)
    assert twin.training is False
    before = result(ours, x)
    assert_close(result(twin, x), before, rtol=0, atol=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert_close(result(ours, x), before, rtol=0, atol=0)
    theirs = build(nn, case).eval()
    theirs.load_state_dict(twin.state_dict())
    assert_close(result(twin, x), result(theirs, x))


@pytest.mark.parametrize("case", ALL)
def test_saved_state_dict_loads_weights_only(case):
    buffer = io.BytesIO()
    torch.save(build(fastrnn, case).state_dict(), buffer)
    buffer.seek(0)
    theirs = build(nn, case, seed=5)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_values(build(fastrnn, case), theirs)


@pytest.mark.parametrize("case", ALL)
def test_share_memory(case):
    ours = build(fastrnn, case)
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    assert_same_values(ours, build(nn, case))


@pytest.mark.parametrize("case", LAYERS)
def test_flatten_parameters_changes_nothing(case):
    ours = build(fastrnn, case)
    params = list(ours.parameters())
    pointers = [p.data_ptr() for p in params]
    assert ours.flatten_parameters() is None
    assert [p.data_ptr() for p in ours.parameters()] == pointers
    assert all(a is b for a, b in zip(params, ours.parameters(), strict=True))
    assert_same_values(ours, build(nn, case))


@pytest.mark.parametrize("case", ALL)
def test_conversion(case):
    ours, theirs = build(fastrnn, case).double(), build(nn, case).double()
    assert ours(an_input(ours))[0].dtype == torch.float64
    assert_same_values(ours, theirs)
    assert_same_values(ours.float(), theirs.float())


# ---- torch's compilers --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["rnn", "lstm_proj", "gru_deep", "rnn_cell", "lstm_cell"])
def test_script_compiles_torchs_layer(case, caplog):
    model = nn.Sequential(build(fastrnn, case))
    x = an_input(model)
    if case in CELLS:
        x = x[0]
    expected = result(model, x)
    params = list(model.parameters())
    scripted = torch.jit.script(model)
    assert_close(result(scripted, x), expected)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    # Scripting replaced the model's layer by torch's, with the same parameters.
    assert type(model[0]) is getattr(nn, ALL[case][0])
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize("case", ["rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell"])
def test_compile_with_the_eager_backend(case):
    ours = build(fastrnn, case)
    x = an_input(ours)
    expected = result(ours, x)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    assert_close(result(compiled, x), expected)
    set_new_parameters(ours)
    assert_close(result(compiled, x), result(ours, x))
