"""No stale copy of a weight is used, however the weights were changed between two calls."""

import copy
import ctypes
import io

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    cell_pair,
    cell_state,
    flat,
    gradients,
    leaves,
    pair,
    random_state,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

# Python code chooses the weights of a call, in the same way on every device.
pytestmark = pytest.mark.cpu("which weights are used does not depend on the device")

F64 = torch.float64


def every(change):
    """Applies a change to each parameter."""

    def apply(module):
        for p in list(module.parameters()):
            change(p)

    return apply


@torch.no_grad()
def in_place(p):
    p.mul_(1.5).add_(0.01)


@torch.no_grad()
def one_element(p):
    p.view(-1)[-1] += 0.5


def through_data(p):
    p.data.mul_(1.5)


def through_a_slice_of_data(p):
    p.data[: (len(p) + 1) // 2] += 0.25


def new_data(p):
    p.data = p.data * 1.5


def through_numpy(p):
    view = p.detach().numpy()
    view *= 1.5


def through_numpy_of_data(p):
    p.data.numpy()[...] += 0.25


def through_the_pointer(p):
    count = p.numel()
    memory = (ctypes.c_double * count).from_address(p.data_ptr())
    memory[count - 1] += 0.5


def through_the_storage(p):
    other = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
    other.mul_(1.5)


@torch.no_grad()
def by_copy(p):
    p.copy_(p * 1.5)


@torch.no_grad()
def by_set(p):
    p.set_((p * 1.5).clone())


def by_load_state_dict(module):
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()})


def by_assigned_state_dict(module):
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()}, assign=True)


def by_new_parameters(module):
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * 1.5))


def by_vector(module):
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.5, module.parameters())


def by_reset(module):
    torch.manual_seed(hash(next(module.parameters()).sum().item()))  # a new seed in each call
    module.reset_parameters()


def by_dtype_and_back(module):
    module.float()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    module.double()


def by_optimizer(make):
    def step(module):
        torch.manual_seed(5)
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        make(module.parameters()).step()
        module.zero_grad()

    return step


CHANGES = {
    **{
        f.__name__: every(f)
        for f in [
            in_place, one_element, through_data, through_a_slice_of_data, new_data, through_numpy,
            through_numpy_of_data, through_the_pointer, through_the_storage, by_copy, by_set,
        ]
    },
    **{
        f.__name__: f
        for f in [
            by_load_state_dict, by_assigned_state_dict, by_new_parameters, by_vector, by_reset,
            by_dtype_and_back,
        ]
    },
    "by_sgd": by_optimizer(lambda ps: torch.optim.SGD(ps, lr=0.1)),
    "by_adam": by_optimizer(lambda ps: torch.optim.Adam(ps, lr=0.1)),
    "by_fused_adam": by_optimizer(lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True)),
    "by_foreach_adam": by_optimizer(lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True)),
}  # fmt: skip


def results_in_all_modes(module, args):
    """The results with grad mode, under no_grad and in inference mode."""
    with_grad = flat(module(*args))
    with torch.no_grad():
        without_grad = flat(module(*args))
    with torch.inference_mode():
        inference = flat(module(*args))
    return [with_grad, without_grad, inference]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_change(ours, theirs, args, change):
    """The layers still agree after the same change, made after calls that would fill any cache."""
    for _ in range(2):
        before = results_in_all_modes(ours, args)
        torch.testing.assert_close(before, results_in_all_modes(theirs, args))
        change(ours)
        change(theirs)
        after = results_in_all_modes(ours, args)
        assert not any(equal(a, b) for a, b in zip(before, after, strict=True))
        torch.testing.assert_close(after, results_in_all_modes(theirs, args))
        # Backward uses its own layout of the weights.
        torch.testing.assert_close(
            gradients(ours(*args), [*flat(args), *ours.parameters()]),
            gradients(theirs(*args), [*flat(args), *theirs.parameters()]),
        )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, change):
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    args = leaves((torch.randn(4, 3, 5, dtype=F64), random_state(theirs, 3)))
    check_change(ours, theirs, args, CHANGES[change])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, change):
    ours, theirs = cell_pair(kind, 5, 17, dtype=F64)
    args = leaves((torch.randn(3, 5, dtype=F64), cell_state(theirs, 3)))
    check_change(ours, theirs, args, CHANGES[change])


@pytest.mark.parametrize(
    "name", ["weight_ih_l0", "weight_hh_l1_reverse", "bias_hh_l0", "bias_ih_l1"]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_one_weight_alone(kind, name):
    ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=F64)
    args = leaves((torch.randn(4, 3, 5, dtype=F64), random_state(theirs, 3)))

    def change(layer):
        getattr(layer, name).data.neg_()

    torch.testing.assert_close(results_in_all_modes(ours, args), results_in_all_modes(theirs, args))
    change(ours)
    change(theirs)
    torch.testing.assert_close(results_in_all_modes(ours, args), results_in_all_modes(theirs, args))


def test_another_layer_at_the_same_address():
    """Freed memory is reused, so an address does not identify a weight."""
    for seed in range(5):
        torch.manual_seed(seed)
        ours, theirs = pair("lstm", 5, 17, dtype=F64)
        args = torch.randn(4, 3, 5, dtype=F64), random_state(theirs, 3)
        torch.testing.assert_close(
            results_in_all_modes(ours, args), results_in_all_modes(theirs, args)
        )
        del ours, theirs


@pytest.mark.parametrize("kind", LAYERS)
def test_training(kind):
    """Twenty steps of Adam from equal weights end at equal weights."""
    ours, theirs = pair(kind, 5, 17, num_layers=2, dropout=0.3, dtype=F64)
    x, y = torch.randn(6, 8, 5, dtype=F64), torch.randn(6, 8, 1, dtype=F64)
    losses = []
    for layer in [ours, theirs]:
        torch.manual_seed(2)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (flat(layer(x))[0].mean(-1, keepdim=True) - y).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[19] < losses[0]
    torch.testing.assert_close(losses[:20], losses[20:])
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize(
    "parametrized",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_parametrizations(kind, parametrized):
    ours, theirs = pair(kind, 5, 17, dtype=F64)
    args = leaves((torch.randn(4, 3, 5, dtype=F64), random_state(theirs, 3)))
    for layer in [ours, theirs]:
        torch.manual_seed(1)
        parametrized(layer, "weight_hh_l0")
        layer.eval()  # in training mode spectral_norm does a power iteration in each call
    for _ in range(2):
        found, expected = (
            gradients(layer(*args), [*flat(args), *layer.parameters()]) for layer in [ours, theirs]
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            results_in_all_modes(ours, args), results_in_all_modes(theirs, args)
        )
        for layer in [ours, theirs]:
            with torch.no_grad():
                for p in layer.parametrizations.weight_hh_l0.parameters():
                    p.mul_(0.7).add_(0.01)
    with parametrize.cached():
        torch.testing.assert_close(
            results_in_all_modes(ours, args), results_in_all_modes(theirs, args)
        )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_hook_based_weight_norm(kind):
    """A hook that makes weight_hh_l0 a new tensor, not a Parameter, before each call."""
    ours, theirs = pair(kind, 5, 17, dtype=F64)
    x = torch.randn(4, 3, 5, dtype=F64)
    for layer in [ours, theirs]:
        nn.utils.weight_norm(layer, "weight_hh_l0")
    for _ in range(2):
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)))
        for layer in [ours, theirs]:
            layer.weight_hh_l0_g.data.mul_(2)


@pytest.mark.parametrize("kind", LAYERS)
def test_functional_call(kind):
    ours, theirs = pair(kind, 5, 17, num_layers=2, dtype=F64)
    x = torch.randn(4, 3, 5, dtype=F64)
    own = flat(ours(x))
    other = {k: (v * 1.5).detach() for k, v in ours.named_parameters()}
    found = flat(torch.func.functional_call(ours, other, (x,)))
    torch.testing.assert_close(found, flat(torch.func.functional_call(theirs, other, (x,))))
    assert not torch.equal(found[0], own[0])
    assert equal(flat(ours(x)), own)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_are_independent(kind):
    ours, theirs = pair(kind, 5, 17, dtype=F64)
    x = torch.randn(4, 3, 5, dtype=F64)
    own = flat(ours(x))
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in [copy.deepcopy(ours), torch.load(saved, weights_only=False)]:
        assert equal(flat(other(x)), own)
        changed = copy.deepcopy(theirs)
        CHANGES["through_data"](other)
        CHANGES["through_data"](changed)
        torch.testing.assert_close(flat(other(x)), flat(changed(x)))
    assert equal(flat(ours(x)), own)


def test_shared_memory():
    ours, theirs = pair("gru", 5, 17, dtype=F64)
    args = leaves((torch.randn(4, 3, 5, dtype=F64), random_state(theirs, 3)))
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    check_change(ours, theirs, args, CHANGES["through_data"])
