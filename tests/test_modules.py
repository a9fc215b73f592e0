"""The classes: torch's in everything but the computation. The numbers are in test_layers.py."""

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
from helpers import cell_state, flat, ragged
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import fastrnn
from fastrnn import functional, modules

# What is tested here comes before any kernel.
pytestmark = pytest.mark.once

I, H, T, B = 3, 4, 5, 2

LAYERS = {
    "rnn": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "lstm": ("LSTM", {}),
    "lstm_deep": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "lstm_proj": ("LSTM", {"proj_size": 2, "batch_first": True}),
    "gru": ("GRU", {"batch_first": True}),
    "gru_deep": ("GRU", {"num_layers": 3, "bidirectional": True, "bias": False}),
}
CELLS = {
    "rnn_cell": ("RNNCell", {}),
    "rnn_cell_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm_cell": ("LSTMCell", {}),
    "lstm_cell_nobias": ("LSTMCell", {"bias": False}),
    "gru_cell": ("GRUCell", {"dtype": torch.float64}),
}
ALL = {**LAYERS, **CELLS}
NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


def build(library, case, seed=0):
    """The case's module of torch.nn or of fastrnn, initialised from the seed."""
    name, options = ALL[case]
    torch.manual_seed(seed)
    return getattr(library, name)(I, H, **options)


def an_input(module, seed=1):
    """A batched input for a layer or a cell, of the module's dtype."""
    torch.manual_seed(seed)
    shape = (B, I) if isinstance(module, nn.RNNCellBase) else (T, B, I)
    return torch.randn(shape, dtype=next(module.parameters()).dtype)


def result(module, *args, seed=2):
    """The tensors that a call returns, dropout drawn from the seed."""
    torch.manual_seed(seed)
    return flat(module(*args))


def assert_same_values(ours, theirs):
    x = an_input(theirs)
    assert_close(result(ours, x), result(theirs, x))


# ---- what is inherited ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_class(name):
    ours, theirs = getattr(fastrnn, name), getattr(nn, name)
    assert ours.__bases__ == (theirs,)
    assert ours.__init__ is theirs.__init__
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


# ---- what is replaced ----------------------------------------------------------------------------


def function_of(module):
    """The name, in torch._VF and in fastrnn.functional, of what the module calls."""
    name = type(module).__name__
    kind = name.removesuffix("Cell").lower()
    cell = "_cell" if name.endswith("Cell") else ""
    return f"rnn_{module.nonlinearity}{cell}" if kind == "rnn" else kind + cell


def spied(monkeypatch, owner, name):
    """The list of (args, kwargs) with which owner.name is called from now on."""
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
def test_functional_gets_what_torch_gives_its_own(case, training, kind, monkeypatch):
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
    stand_in = types.SimpleNamespace(**{name: getattr(torch._VF, name)})
    monkeypatch.setattr(nn.modules.rnn, "_VF", stand_in)
    our_calls = spied(monkeypatch, functional, name)
    their_calls = spied(monkeypatch, stand_in, name)
    our_result = result(ours, *args)
    assert (len(our_calls), len(their_calls)) == (1, 0)
    their_result = result(theirs, *args)
    assert (len(our_calls), len(their_calls)) == (1, 1)

    assert_close(our_calls, their_calls, rtol=0, atol=0)
    assert_close(our_result, their_result)


@pytest.mark.parametrize("case", ALL)
def test_packed_padded_and_unbatched_give_torchs_structure(case):
    ours, theirs = build(fastrnn, case), build(nn, case)
    x = an_input(ours)
    inputs = [x, x[0]] + ([ragged([2, 4, 3], I)] if case in LAYERS else [])
    for given in inputs:
        torch.manual_seed(2)
        our = ours(given)
        torch.manual_seed(2)
        their = theirs(given)
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
    got = result(ours, x)
    assert_close(got, result(build(nn, case), x * 2))
    assert [t is s for t, s in zip(got, flat(seen), strict=True)] == [True] * len(got)


def test_a_torch_that_computes_otherwise_is_refused():
    def forward(self, input):
        return input

    with pytest.raises(ImportError, match=r"forward does not call torch\._VF"):
        modules._on_fastrnn(forward)


def test_names_in_a_later_torchs_forward_are_found():
    source = "def forward(self, input):\n    return _VF, only_in_a_later_torch\n"
    theirs = {"_VF": torch._VF, "only_in_a_later_torch": 1, "__name__": "later"}
    exec(source, theirs)
    try:
        assert modules._on_fastrnn(theirs["forward"])(None, None) == (functional, 1)
    finally:
        del modules.only_in_a_later_torch


# ---- copies --------------------------------------------------------------------------------------


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle0": lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
    "save": saved,
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
def test_flatten_parameters_is_harmless(case):
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


# ---- the weights of today ------------------------------------------------------------------------


def weight_names(module):
    return [name for name, _ in module.named_parameters() if name.startswith("weight")]


class Scaled(nn.Module):
    """A parametrization that counts how often it is evaluated."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.count = 0

    def forward(self, w):
        self.count += 1
        return w * self.factor.to(w.dtype)


def set_data(module):
    for p in module.parameters():
        p.data = p.data * 2


def change_data_in_place(module):
    for p in module.parameters():
        p.data.mul_(2)


def change_numpy_view(module):
    for p in module.parameters():
        p.detach().numpy()[...] *= 2


def change_in_no_grad(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p * 2)


def set_new_parameters(module):
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * 2))


def put_into_the_dict(module):
    for name, p in list(module.named_parameters()):
        module._parameters[name] = nn.Parameter(p.detach() * 2)


def delete_and_register(module):
    for name, p in list(module.named_parameters()):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(p.detach() * 2))


def swap_in_one(module):
    name = weight_names(module)[0]
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))


def train_a_step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    sum(t.square().sum() for t in result(module, an_input(module))).backward()
    optimizer.step()


def parametrize_new(module):
    for name in weight_names(module):
        parametrizations.weight_norm(module, name)
        module(an_input(module))
        module.parametrizations[name].original0.data.mul_(2)


def parametrize_and_change(module):
    for name in weight_names(module):
        parametrize.register_parametrization(module, name, Scaled(3.0))
    module(an_input(module))
    for p in module.parameters():
        p.data.mul_(0.5)


def parametrize_and_remove(module):
    for name in weight_names(module):
        parametrize.register_parametrization(module, name, Scaled(3.0))
        module(an_input(module))
        parametrize.remove_parametrizations(module, name)


def old_weight_norm(module):
    names = weight_names(module)
    for name in names:
        nn.utils.weight_norm(module, name)
    module(an_input(module))
    for name in names:
        getattr(module, f"{name}_g").data.mul_(2)


def old_weight_norm_removed(module):
    names = weight_names(module)
    old_weight_norm(module)
    module(an_input(module))
    for name in names:
        nn.utils.remove_weight_norm(module, name)


CHANGES = [
    set_data,
    change_data_in_place,
    change_numpy_view,
    change_in_no_grad,
    set_new_parameters,
    put_into_the_dict,
    delete_and_register,
    swap_in_one,
    train_a_step,
    parametrize_new,
    parametrize_and_change,
    parametrize_and_remove,
    old_weight_norm,
    old_weight_norm_removed,
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", ALL)
def test_changed_weights_are_used(case, change):
    ours, theirs = build(fastrnn, case), build(nn, case)
    x = an_input(ours)
    before = result(ours, x)
    for module in (ours, theirs):
        torch.manual_seed(3)
        change(module)
    got = result(ours, x)
    assert_close(got, result(theirs, x))
    assert not torch.allclose(got[0], before[0])

    # And torch's class may be behind with the weights itself: one that never had others is not.
    names = build(nn, case).state_dict()
    fresh = build(nn, case, seed=4)
    fresh.load_state_dict({name: getattr(ours, name).detach() for name in names})
    assert_close(got, result(fresh, x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("case", ALL)
def test_gradients_reach_the_originals(case, how):
    grads = []
    for library in (fastrnn, nn):
        module = build(library, case)
        for name in weight_names(module):
            how(module, name)
        args = (an_input(module),)
        if case in CELLS:  # from a state of zeros weight_hh would have no gradient
            args += (cell_state(module, B),)
        for _ in range(2):  # the second call must not run through the first one's graph
            module.zero_grad()
            sum(t.square().sum() for t in result(module, *args)).backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert all(g is not None and g.any() for g in grads[0].values())
    assert_close(*grads)


@pytest.mark.parametrize("case", LAYERS)
def test_a_parametrization_is_evaluated_once_a_call(case):
    ours = build(fastrnn, case)
    scaled = [Scaled(2.0) for _ in weight_names(ours)]
    for name, one in zip(weight_names(ours), scaled, strict=True):
        parametrize.register_parametrization(ours, name, one)
    x = an_input(ours)
    for one in scaled:
        one.count = 0
    ours(x)
    assert [one.count for one in scaled] == [1] * len(scaled)


@pytest.mark.parametrize("case", ALL)
def test_functional_call(case):
    ours, theirs = build(fastrnn, case), build(nn, case)
    x = an_input(ours)
    before = result(ours, x)
    other = {name: (p.detach() * 2).requires_grad_() for name, p in ours.named_parameters()}
    torch.manual_seed(2)
    got = flat(functional_call(ours, other, (x,)))
    torch.manual_seed(2)
    want = flat(functional_call(theirs, other, (x,)))
    assert_close(got, want)
    assert not torch.allclose(got[0], before[0])

    inputs = list(other.values())
    assert_close(
        torch.autograd.grad(sum(t.sum() for t in got), inputs),
        torch.autograd.grad(sum(t.sum() for t in want), inputs),
    )
    assert_close(result(ours, x), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", ALL)
def test_replica_of_data_parallel(case):
    # What torch.nn.parallel.replicate does, which has no CPU devices to do it for.
    results = []
    for library in (fastrnn, nn):
        module = build(library, case)
        replica = module._replicate_for_data_parallel()
        for name, p in module._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, p * 2)
        x = an_input(module)
        results.append((result(replica, x), result(module, x)))
        sum(t.sum() for t in results[-1][0]).backward()
        results[-1] += ([p.grad for p in module.parameters()],)
    assert_close(*results)


# ---- misuse --------------------------------------------------------------------------------------

BAD_LAYERS = {
    "nothing": lambda new: new(),
    "one_size": lambda new: new(I),
    "float_size": lambda new: new(1.5, H),
    "float_hidden": lambda new: new(I, 4.0),
    "zero_input": lambda new: new(0, H),
    "negative_input": lambda new: new(-1, H),
    "zero_hidden": lambda new: new(I, 0),
    "zero_layers": lambda new: new(I, H, num_layers=0),
    "bias_number": lambda new: new(I, H, bias=1),
    "batch_first_text": lambda new: new(I, H, batch_first="yes"),
    "dropout_above_1": lambda new: new(I, H, dropout=1.5),
    "dropout_negative": lambda new: new(I, H, dropout=-0.1),
    "dropout_bool": lambda new: new(I, H, dropout=True),
    "dropout_text": lambda new: new(I, H, dropout="half"),
    "unknown_argument": lambda new: new(I, H, heads=2),
    "bad_dtype": lambda new: new(I, H, dtype=torch.int64),
    "bad_device": lambda new: new(I, H, device="abacus"),
}
BAD_CELLS = {
    "nothing": lambda new: new(),
    "one_size": lambda new: new(I),
    "negative_input": lambda new: new(-1, H),
    "text_hidden": lambda new: new(I, "four"),
    "unknown_argument": lambda new: new(I, H, num_layers=2),
    "bad_dtype": lambda new: new(I, H, dtype=torch.int64),
}
BAD_CONSTRUCTIONS = [
    *((name, how, BAD_LAYERS[how]) for name in ("RNN", "LSTM", "GRU") for how in BAD_LAYERS),
    *((name, how, BAD_CELLS[how]) for name in NAMES[3:] for how in BAD_CELLS),
    ("RNN", "unknown_nonlinearity", lambda new: new(I, H, nonlinearity="sin")),
    ("RNN", "unknown_nonlinearity_positional", lambda new: new(I, H, 1, "sin")),
    ("RNN", "proj_size", lambda new: new(I, H, proj_size=2)),
    ("GRU", "proj_size", lambda new: new(I, H, proj_size=2)),
    ("LSTM", "proj_size_too_large", lambda new: new(I, H, proj_size=H)),
    ("LSTM", "proj_size_negative", lambda new: new(I, H, proj_size=-1)),
]


def assert_same_error(ours, theirs):
    """Both raise, the same type with the same message."""
    with pytest.raises(Exception) as their_error:
        theirs()
    with pytest.raises(their_error.type) as our_error:
        ours()
    assert our_error.type is their_error.type
    assert str(our_error.value) == str(their_error.value)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize(
    ("name", "misuse"),
    [pytest.param(name, misuse, id=f"{name}-{how}") for name, how, misuse in BAD_CONSTRUCTIONS],
)
def test_construction_errors(name, misuse):
    assert_same_error(lambda: misuse(getattr(fastrnn, name)), lambda: misuse(getattr(nn, name)))


def states(module, *batch, H=H, dtype=torch.float32, rows=None):
    """States of the given sizes as the module takes them, one tensor or two."""
    lstm = isinstance(module, nn.LSTM | nn.LSTMCell)
    if isinstance(module, nn.RNNBase):
        rows = module.num_layers * (1 + module.bidirectional) if rows is None else rows
        batch = (rows, *batch)
    h = torch.zeros(*batch, getattr(module, "proj_size", 0) or H, dtype=dtype)
    return (h, torch.zeros(*batch, H, dtype=dtype)) if lstm else h


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def only_c_wrong(m):
    h, c = states(m, B)
    return m(zeros(B, B, I), (h, c[..., 1:]))


BAD_LAYER_CALLS = {
    "no_input": lambda m: m(),
    "none": lambda m: m(None),
    "a_list": lambda m: m([1.0, 2.0]),
    "unknown_argument": lambda m: m(zeros(B, B, I), lengths=[1]),
    "0d": lambda m: m(zeros()),
    "1d": lambda m: m(zeros(I)),
    "4d": lambda m: m(zeros(1, B, B, I)),
    "input_size": lambda m: m(zeros(B, B, I + 1)),
    "input_size_unbatched": lambda m: m(zeros(T, I + 1)),
    "input_size_packed": lambda m: m(ragged([2, 3], I + 1)),
    "dtype_double": lambda m: m(zeros(B, B, I, dtype=torch.float64)),
    "dtype_long": lambda m: m(zeros(B, B, I, dtype=torch.int64)),
    "dtype_packed": lambda m: m(ragged([2, 3], I, torch.float64)),
    "state_size": lambda m: m(zeros(B, B, I), states(m, B, H=H + 1)),
    "state_batch": lambda m: m(zeros(B, B, I), states(m, B + 1)),
    "state_layers": lambda m: m(zeros(B, B, I), states(m, B, rows=9)),
    "state_layers_packed": lambda m: m(ragged([2, 3], I), states(m, B, rows=9)),
    "state_batch_packed": lambda m: m(ragged([2, 3], I), states(m, 1)),
    "state_unbatched_for_batch": lambda m: m(zeros(B, B, I), states(m)),
    "state_batched_for_unbatched": lambda m: m(zeros(T, I), states(m, 1)),
    "state_rows_unbatched": lambda m: m(zeros(T, I), states(m, rows=9)),
    "state_dtype": lambda m: m(zeros(B, B, I), states(m, B, dtype=torch.float64)),
    "state_of_a_number": lambda m: m(zeros(B, B, I), 0.0),
}
BAD_CELL_CALLS = {
    "no_input": lambda m: m(),
    "none": lambda m: m(None),
    "a_list": lambda m: m([1.0, 2.0]),
    "unknown_argument": lambda m: m(zeros(B, I), lengths=[1]),
    "0d": lambda m: m(zeros()),
    "3d": lambda m: m(zeros(T, B, I)),
    "input_size": lambda m: m(zeros(B, I + 1)),
    "input_size_unbatched": lambda m: m(zeros(I + 1)),
    "dtype_double": lambda m: m(zeros(B, I, dtype=torch.float64)),
    "dtype_long": lambda m: m(zeros(B, I, dtype=torch.int64)),
    "state_size": lambda m: m(zeros(B, I), states(m, B, H=H + 1)),
    "state_batch": lambda m: m(zeros(B, I), states(m, B + 1)),
    "state_1d_for_batch": lambda m: m(zeros(B, I), states(m)),
    "state_3d": lambda m: m(zeros(B, I), states(m, 1, B)),
    "state_2d_for_unbatched": lambda m: m(zeros(I), states(m, B)),
    "state_dtype": lambda m: m(zeros(B, I), states(m, B, dtype=torch.float64)),
    "state_of_a_number": lambda m: m(zeros(B, I), 0.0),
}
BAD_CALLS = [
    *((case, how, BAD_LAYER_CALLS[how]) for case in LAYERS for how in BAD_LAYER_CALLS),
    *((case, how, BAD_CELL_CALLS[how]) for case in CELLS for how in BAD_CELL_CALLS),
    ("lstm", "c_size", only_c_wrong),
    ("lstm_proj", "c_size", only_c_wrong),
]


@pytest.mark.parametrize(
    ("case", "misuse"),
    [pytest.param(case, misuse, id=f"{case}-{how}") for case, how, misuse in BAD_CALLS],
)
def test_call_errors(case, misuse):
    ours, theirs = build(fastrnn, case).float(), build(nn, case).float()
    assert_same_error(lambda: misuse(ours), lambda: misuse(theirs))


def test_unknown_nonlinearity_set_later():
    ours, theirs = build(fastrnn, "rnn_cell"), build(nn, "rnn_cell")
    ours.nonlinearity = theirs.nonlinearity = "sin"
    assert_same_error(lambda: ours(zeros(B, I)), lambda: theirs(zeros(B, I)))


# ---- torch's compilers ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["rnn", "lstm_proj", "gru_deep", "rnn_cell", "lstm_cell"])
def test_script_compiles_torchs_layer(case, caplog):
    model = nn.Sequential(build(fastrnn, case))
    x = an_input(model)
    if case in CELLS:
        x = x[0]
    want = result(model, x)
    params = list(model.parameters())
    scripted = torch.jit.script(model)
    assert_close(result(scripted, x), want)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    # It is the model that keeps torch's layer, on the parameters that it had.
    assert type(model[0]) is getattr(nn, ALL[case][0])
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize("case", ["rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell"])
def test_compile_with_the_eager_backend(case):
    ours = build(fastrnn, case)
    x = an_input(ours)
    want = result(ours, x)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    assert_close(result(compiled, x), want)
    set_new_parameters(ours)
    assert_close(result(compiled, x), result(ours, x))
