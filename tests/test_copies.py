"""copy.deepcopy where weights are computed from other tensors: EMA, SWA and early stopping copy."""

import contextlib
import copy
import io

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, flat, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

import fastrnn

# Which tensors a module holds is decided in Python, the same way for every device.
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
# These make the weight an attribute that is no leaf: torch's own modules can't be copied with it.
BY_HOOKS = {
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": pruned,
}
WAYS = {**PARAMETRIZED, **BY_HOOKS}


def two(case):
    """Ours and torch's module with equal weights."""
    if case in LAYERS:
        return pair(case, 5, 17, **({} if case == "lstm_proj" else {"bidirectional": True}))
    return cell_pair(case.removesuffix("_cell"), 5, 17)


def computed(way, module):
    """The module with a weight computed in this way."""
    torch.manual_seed(1)
    WAYS[way](module, "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0")
    return module


def an_input(module):
    shape = (3, 5) if isinstance(module, nn.RNNCellBase) else (4, 3, 5)
    return torch.randn(shape, dtype=next(module.parameters()).dtype)


def step(module, x):
    """One of training. The outputs and all gradients."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.zero_grad()
    outputs = flat(module(x))
    sum(t.square().sum() for t in outputs).backward()
    found = [*outputs, *(p.grad.clone() for p in module.parameters())]
    optimizer.step()
    return found


def assert_independent(copied, module, x):
    """Both train to the same, one after the other, from the same weights."""
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
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MODULES)
def test_a_copy_computes_the_same_and_trains_by_itself(case, way, before):
    module = computed(way, two(case)[0])
    x = an_input(module)
    before(module, x)
    assert_independent(copy.deepcopy(module), module, x)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("case", MODULES)
def test_a_module_of_parameters_alone(case, before):
    module = two(case)[0]
    x = an_input(module)
    before(module, x)
    assert_independent(copy.deepcopy(module), module, x)


def accelerated(case, way):
    return fastrnn.accelerate(computed(way, two(case)[1]))


def accelerated_first(case, way):
    return computed(way, fastrnn.accelerate(two(case)[1]))


def patched(case, way):
    with fastrnn.patch():
        return computed(way, two(case)[1])


class Mine(nn.LSTM):
    pass


def subclass(case, way):
    return fastrnn.accelerate(computed(way, Mine(5, 17)))


def of_torch_and_back(case, way):
    return fastrnn.accelerate(fastrnn.restore(computed(way, two(case)[0])))


MADE = [accelerated, accelerated_first, patched, subclass, of_torch_and_back]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["gru", "lstm", "lstm_cell"])
def test_accelerated_and_patched_modules(case, way, make):
    module = make(case, way)
    assert isinstance(module, tuple(getattr(fastrnn, n) for n in ["LSTM", "GRU", "LSTMCell"]))
    x = an_input(module)
    step(module, x)
    assert_independent(copy.deepcopy(module), module, x)


@pytest.mark.parametrize("way", PARAMETRIZED)
@pytest.mark.parametrize("case", MODULES)
def test_restored_modules(case, way):
    """Which are of torch's classes again."""
    module = fastrnn.restore(computed(way, two(case)[0])).eval()  # or spectral_norm takes steps
    x = an_input(module)
    step(module, x)
    assert_independent(copy.deepcopy(module), module, x)


@pytest.mark.parametrize("compiled_by", ["function", "method"])
@pytest.mark.parametrize("way", [None, "weight_norm", "orthogonal", "old_weight_norm", "pruned"])
@pytest.mark.parametrize("case", ["gru", "lstm_cell"])
def test_compiled_modules(case, way, compiled_by):
    module = two(case)[0]
    if way:
        computed(way, module)
    x = an_input(module)
    if compiled_by == "function":
        run = torch.compile(module, backend="aot_eager")
    else:
        module.compile(backend="aot_eager")
        run = module
    step(run, x)
    assert_independent(copy.deepcopy(module), module, x)
    torch.testing.assert_close(flat(copy.deepcopy(run)(x)), flat(module(x)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", MODULES)
def test_averaged_models(case, way):
    """They average what is trained: copies of the parameters, from before and after a step."""
    module = nn.ModuleDict({"rnn": computed(way, two(case)[0])})
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


@pytest.mark.parametrize("way", BY_HOOKS)
@pytest.mark.parametrize("case", MODULES)
def test_pickled_modules(case, way):
    module = computed(way, two(case)[0])
    x = an_input(module)
    step(module, x)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    assert_independent(torch.load(saved, weights_only=False), module, x)


def test_a_subclass_says_how_it_is_copied():
    """By its own rules of pickling, as ever."""

    class Locked(fastrnn.GRU):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.opened = contextlib.nullcontext(lambda: None)

        def __getstate__(self):
            return {**super().__getstate__(), "opened": None}

    class Made(fastrnn.GRU):
        def __reduce__(self):
            return Made, (self.input_size, self.hidden_size)

    module = Locked(5, 17)
    copied = copy.deepcopy(module)
    assert module.opened is not None
    assert copied.opened is None
    assert torch.equal(copied.weight_hh_l0, module.weight_hh_l0)
    made = copy.deepcopy(Made(5, 17))
    assert isinstance(made, Made)


def test_shared_modules_stay_shared():
    layer = computed("weight_norm", two("lstm")[0])
    layer(an_input(layer))
    model = nn.ModuleList([layer, nn.Sequential(layer)])
    model.also = [layer]
    copied = copy.deepcopy(model)
    assert copied[0] is copied[1][0] is copied.also[0] is not layer
