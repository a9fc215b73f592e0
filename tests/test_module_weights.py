"""However a module's weights are changed, the next forward uses the new ones."""

import pytest
import torch
from helpers import cell_state, flat
from module_cases import ALL, CELLS, LAYERS, B, an_input, build, result, set_new_parameters
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import fastrnn

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once


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


def write_to_parameters_dict(module):
    for name, p in list(module.named_parameters()):
        module._parameters[name] = nn.Parameter(p.detach() * 2)


def delete_and_register(module):
    for name, p in list(module.named_parameters()):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(p.detach() * 2))


def replace_one(module):
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
    pytest.param(change_numpy_view, marks=pytest.mark.cpu("numpy arrays are on the CPU")),
    change_in_no_grad,
    set_new_parameters,
    write_to_parameters_dict,
    delete_and_register,
    replace_one,
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
    found = result(ours, x)
    assert_close(found, result(theirs, x))
    assert not torch.allclose(found[0], before[0])

    # torch's own layer may use stale weights, so also compare with a newly built one.
    names = build(nn, case).state_dict()
    fresh = build(nn, case, seed=4)
    fresh.load_state_dict({name: getattr(ours, name).detach() for name in names})
    assert_close(found, result(fresh, x))


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
        if case in CELLS:  # with a zero state weight_hh would have no gradient
            args += (cell_state(module, B),)
        for _ in range(2):  # the second backward must not need the first call's graph
            module.zero_grad()
            sum(t.square().sum() for t in result(module, *args)).backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert all(g is not None and g.any() for g in grads[0].values())
    assert_close(*grads)


@pytest.mark.parametrize("case", LAYERS)
def test_parametrization_is_evaluated_once_per_call(case):
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
    found = flat(functional_call(ours, other, (x,)))
    torch.manual_seed(2)
    expected = flat(functional_call(theirs, other, (x,)))
    assert_close(found, expected)
    assert not torch.allclose(found[0], before[0])

    inputs = list(other.values())
    assert_close(
        torch.autograd.grad(sum(t.sum() for t in found), inputs),
        torch.autograd.grad(sum(t.sum() for t in expected), inputs),
    )
    assert_close(result(ours, x), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", ALL)
def test_replica_of_data_parallel(case):
    # As torch.nn.parallel.replicate does, which does not support the CPU.
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
