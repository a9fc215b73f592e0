"""copy.deepcopy of modules, also with computed weights: EMA, SWA and early stopping need it."""

import contextlib
import copy
import io

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, flat, pair, slow_after
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

import fastrnn

# Modules are copied in Python, whatever the device.
pytestmark = [
    pytest.mark.cpu("copies of modules do not depend on the device"),
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]

MODULES = [*LAYERS, *(f"{kind}_cell" for kind in CELLS)]


class LowRank(nn.Module):
    def forward(self, a, b):
        return a @ b

    def right_inverse(self, weight):
        return weight[:, :3].clone(), weight[:3].clone()


def low_rank(module, name):
    parametrize.register_parametrization(module, name, LowRank())


def pruned(module, name):
    prune.random_unstructured(module, name, 0.5)


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "low_rank": low_rank,
}
# These set a non-leaf tensor as an attribute, with which torch's own modules cannot be copied.
HOOK_BASED = {
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": pruned,
}
REPARAMETRIZATIONS = {**PARAMETRIZED, **HOOK_BASED}


def module_pair(case):
    """fastrnn's module and torch's with equal weights."""
    if case in LAYERS:
        return pair(case, 5, 17, **({} if case == "lstm_proj" else {"bidirectional": True}))
    return cell_pair(case.removesuffix("_cell"), 5, 17)


def reparametrized(method, module):
    """The module with its recurrent weight computed from other tensors by `method`."""
    torch.manual_seed(1)
    REPARAMETRIZATIONS[method](
        module, "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"
    )
    return module


def an_input(module):
    shape = (3, 5) if isinstance(module, nn.RNNCellBase) else (4, 3, 5)
    return torch.randn(shape, dtype=next(module.parameters()).dtype)


def step(module, x):
    """Takes one training step. Returns the outputs and all gradients."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.zero_grad()
    outputs = flat(module(x))
    sum(t.square().sum() for t in outputs).backward()
    found = [*outputs, *(p.grad.clone() for p in module.parameters())]
    optimizer.step()
    return found


def assert_independent(copied, module, x):
    """Trains the copy and the module: equal results, and neither changes the other."""
    assert type(copied) is type(module)
    assert list(copied.state_dict()) == list(module.state_dict())
    before = copy.deepcopy(module.state_dict())
    found = step(copied, x)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    expected = step(module, x)
    assert any(t.any() for t in expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for name, value in module.state_dict().items():
        assert torch.equal(value, copied.state_dict()[name]), name


def untouched(module, x):
    pass


def called(module, x):
    module(x)


def called_under_autocast(module, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)


def converted(module, x):
    module.to("cpu").double().float()


def called_functionally(module, x):
    weights = {name: p * 1.5 for name, p in module.named_parameters()}
    torch.func.functional_call(module, weights, (x,))


def differentiated(module, x):
    def loss(weights):
        return flat(torch.func.functional_call(module, weights, (x,)))[0].sum()

    torch.func.grad(loss)(dict(module.named_parameters()))


def failed(module, x):
    with pytest.raises((RuntimeError, ValueError)):
        module(x[..., :2])


def cached(module, x):
    with parametrize.cached():
        module(x)


BEFORE = [
    untouched, called, step, called_under_autocast, converted, called_functionally, differentiated,
    failed, cached,
]  # fmt: skip


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("method", REPARAMETRIZATIONS)
@pytest.mark.parametrize("case", MODULES)
def test_copy_is_equal_and_independent(case, method, before):
    module = reparametrized(method, module_pair(case)[0])
    x = an_input(module)
    before(module, x)
    assert_independent(copy.deepcopy(module), module, x)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("case", MODULES)
def test_copy_without_reparametrization(case, before):
    module = module_pair(case)[0]
    x = an_input(module)
    before(module, x)
    assert_independent(copy.deepcopy(module), module, x)


def accelerated(case, method):
    return fastrnn.accelerate(reparametrized(method, module_pair(case)[1]))


def accelerated_first(case, method):
    return reparametrized(method, fastrnn.accelerate(module_pair(case)[1]))


def patched(case, method):
    with fastrnn.patch():
        return reparametrized(method, module_pair(case)[1])


class Subclass(nn.LSTM):
    pass


def subclass(case, method):
    return fastrnn.accelerate(reparametrized(method, Subclass(5, 17)))


def restored_and_accelerated(case, method):
    return fastrnn.accelerate(fastrnn.restore(reparametrized(method, module_pair(case)[0])))


CONSTRUCTIONS = [accelerated, accelerated_first, patched, subclass, restored_and_accelerated]


@pytest.mark.parametrize("make", CONSTRUCTIONS)
@pytest.mark.parametrize("method", REPARAMETRIZATIONS)
@pytest.mark.parametrize("case", ["gru", "lstm", "lstm_cell"])
def test_accelerated_and_patched_modules(case, method, make):
    module = make(case, method)
    assert isinstance(module, tuple(getattr(fastrnn, n) for n in ["LSTM", "GRU", "LSTMCell"]))
    x = an_input(module)
    step(module, x)
    assert_independent(copy.deepcopy(module), module, x)


@pytest.mark.parametrize("method", PARAMETRIZED)
@pytest.mark.parametrize("case", MODULES)
def test_restored_modules(case, method):
    """restore() makes them instances of torch's classes again."""
    # eval: in training mode each evaluation of spectral_norm is a power iteration.
    module = fastrnn.restore(reparametrized(method, module_pair(case)[0])).eval()
    x = an_input(module)
    step(module, x)
    assert_independent(copy.deepcopy(module), module, x)


@pytest.mark.parametrize("compiled_by", slow_after(1, ["function", "method"]))
@pytest.mark.parametrize("method", [None, "weight_norm", "orthogonal", "old_weight_norm", "pruned"])
@pytest.mark.parametrize("case", ["gru", "lstm_cell"])
def test_compiled_modules(case, method, compiled_by):
    module = module_pair(case)[0]
    if method:
        reparametrized(method, module)
    x = an_input(module)
    if compiled_by == "function":
        run = torch.compile(module, backend="aot_eager")
    else:
        module.compile(backend="aot_eager")
        run = module
    step(run, x)
    assert_independent(copy.deepcopy(module), module, x)
    torch.testing.assert_close(flat(copy.deepcopy(run)(x)), flat(module(x)))


@pytest.mark.parametrize("method", REPARAMETRIZATIONS)
@pytest.mark.parametrize("case", MODULES)
def test_averaged_model(case, method):
    """AveragedModel deep-copies the model. Its average is over the trained parameters."""
    module = nn.ModuleDict({"rnn": reparametrized(method, module_pair(case)[0])})
    x = an_input(module["rnn"])
    step(module["rnn"], x)
    first = copy.deepcopy(list(module.parameters()))
    averaged = swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    step(module["rnn"], x)
    averaged.update_parameters(module)
    for mean, old, new in zip(averaged.parameters(), first, module.parameters(), strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)
    averaged.module["rnn"](x)


@pytest.mark.parametrize("method", HOOK_BASED)
@pytest.mark.parametrize("case", MODULES)
def test_pickled_modules(case, method):
    module = reparametrized(method, module_pair(case)[0])
    x = an_input(module)
    step(module, x)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    assert_independent(torch.load(saved, weights_only=False), module, x)


def test_subclass_with_own_pickling():
    """copy.deepcopy follows __getstate__ and __reduce__ of a subclass."""

    class OwnGetstate(fastrnn.GRU):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.handle = contextlib.nullcontext(lambda: None)  # cannot be pickled

        def __getstate__(self):
            return {**super().__getstate__(), "handle": None}

    class OwnReduce(fastrnn.GRU):
        def __reduce__(self):
            return OwnReduce, (self.input_size, self.hidden_size)

    module = OwnGetstate(5, 17)
    copied = copy.deepcopy(module)
    assert module.handle is not None
    assert copied.handle is None
    assert torch.equal(copied.weight_hh_l0, module.weight_hh_l0)
    copied = copy.deepcopy(OwnReduce(5, 17))
    assert isinstance(copied, OwnReduce)


def test_shared_modules_stay_shared():
    layer = reparametrized("weight_norm", module_pair("lstm")[0])
    layer(an_input(layer))
    model = nn.ModuleList([layer, nn.Sequential(layer)])
    model.also = [layer]
    copied = copy.deepcopy(model)
    assert copied[0] is copied[1][0] is copied.also[0] is not layer
