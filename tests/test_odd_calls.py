"""Unusual uses of layers give the same results, or raise the same error, as with torch's layers.

Each test is parametrized over every class, dtype and kind of call that could fail the same way.
"""

import itertools
import re

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, pair, random_state
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch_features import skip_without_bfloat16_lstm

import fastrnn
from fastrnn import fallback, functional

KINDS = [*LAYERS, *(f"{kind}_cell" for kind in CELLS)]


def both(kind, *sizes, **options):
    """Our layer or cell and torch's, with equal weights."""
    if kind in LAYERS:
        return pair(kind, *sizes, **options)
    return cell_pair(kind.removesuffix("_cell"), *sizes, **options)


def inputs(kind, *, dtype=torch.float32):
    return torch.randn((5, 2, 3) if kind in LAYERS else (2, 3), dtype=dtype)


def states(module):
    return random_state(module, 2) if isinstance(module, nn.RNNBase) else cell_state(module, 2)


def error_of(call):
    """The exception that the call raises, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None


def assert_same(ours, theirs, **tolerances):
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, **tolerances)


@pytest.fixture
def fallbacks(monkeypatch):
    """fastrnn.fallbacks, counting from zero."""
    monkeypatch.setattr(fallback, "_counts", type(fallback._counts)())
    return fastrnn.fallbacks


# ---- weights written to _flat_weights ------------------------------------------------------------


def one_entry(layer, weights):
    layer._flat_weights[0] = weights[0]


def whole_list(layer, weights):
    layer._flat_weights = list(weights)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("write", [one_entry, whole_list])
@pytest.mark.parametrize("swap", ["built", "accelerated", "subclass"])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_written_to_flat_weights_are_used(kind, swap, write, packed):
    """Weight drop and hypernetworks write to `_flat_weights`, which torch's forward reads."""
    ours, theirs = pair(kind, 3, 4, num_layers=2, bidirectional=True)
    if swap == "accelerated":
        ours = pair(kind, 3, 4, num_layers=2, bidirectional=True)[1]
        ours.load_state_dict(theirs.state_dict())
        fastrnn.accelerate(ours)
    elif swap == "subclass":
        ours.__class__ = type("Mine", (type(ours),), {})
    x = torch.randn(5, 2, 3)
    if packed:
        x = pack_padded_sequence(x, [5, 3])
    before = ours(x)
    assert_same(before, theirs(x))
    written = [(torch.randn_like(w) / 4).requires_grad_() for w in theirs._flat_weights]
    kept = [list(layer._flat_weights) for layer in (ours, theirs)]
    for layer in (ours, theirs):
        write(layer, written)
    for _ in range(2):  # the next call still uses them
        found, expected = ours(x), theirs(x)
        assert_same(found, expected)
    count = 1 if write is one_entry else len(written)
    grads = [
        torch.autograd.grad(flat(results)[0].sum(), written[:count])
        for results in (found, expected)
    ]
    assert_same(*grads)
    for layer, weights in zip((ours, theirs), kept, strict=True):
        layer._flat_weights = weights
    assert_same(ours(x), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_new_parameter_replaces_written_flat_weights(kind):
    ours, theirs = pair(kind, 3, 4)
    x, new = torch.randn(5, 2, 3), torch.randn_like(theirs.weight_hh_l0)
    for layer in (ours, theirs):
        layer._flat_weights[0] = torch.zeros_like(layer.weight_ih_l0)
        layer(x)
        layer._parameters["weight_hh_l0"] = nn.Parameter(new)
    assert_same(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer._flat_weights[0] = torch.zeros_like(layer.weight_ih_l0)
    assert_same(ours(x), theirs(x))


# ---- dtypes, layouts and sizes without a kernel --------------------------------------------------


@pytest.mark.cpu("torch has no complex layers on a GPU")
@pytest.mark.parametrize("kind", [k for k in KINDS if "relu" not in k])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_dtypes(kind, dtype, fallbacks):
    ours, theirs = both(kind, 3, 4, dtype=dtype)
    x = inputs(kind, dtype=dtype).requires_grad_()
    found, expected = ours(x), theirs(x)
    assert_same(found, expected)
    assert_same(*(torch.autograd.grad(flat(r)[0].abs().sum(), x) for r in (found, expected)))
    assert list(fallbacks().values()) == [1]
    assert str(dtype) in next(iter(fallbacks()))


@pytest.mark.cpu("torch has no complex layers on a GPU")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_complex_dtypes_packed_and_patched(kind, fallbacks):
    theirs = pair(kind, 3, 4, dtype=torch.complex64)[1]
    with fastrnn.patch():
        ours = type(theirs)(3, 4, dtype=torch.complex64)
    ours.load_state_dict(theirs.state_dict())
    x = pack_padded_sequence(torch.randn(5, 2, 3, dtype=torch.complex64), [5, 3])
    assert_same(ours(x), theirs(x))
    assert sum(fallbacks().values()) == 1


@pytest.mark.cpu("the virtual GPU has no sparse tensors")
@pytest.mark.parametrize("kind", CELLS)
def test_sparse_input_of_a_cell(kind, fallbacks):
    ours, theirs = cell_pair(kind, 3, 4)
    x = torch.randn(2, 3).relu().to_sparse()
    hx = states(ours)
    assert_same(ours(x, hx), theirs(x, hx))
    assert sum(fallbacks().values()) == 1


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("sizes", [(5, 0), (0, 4), (0, 0)])
def test_cells_of_size_0(kind, sizes, fallbacks):
    ours, theirs = cell_pair(kind, *sizes)
    for x in (torch.ones(3, sizes[0]), torch.ones(0, sizes[0])):
        assert_same(ours(x), theirs(x))
    assert sum(fallbacks().values()) == 2


# ---- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "compiled", "grad"),
    [*itertools.product(LAYERS, [False], [False, True]), ("gru", True, False)],
)
def test_output_can_be_detached_in_place(kind, compiled, grad):
    """The output is not a view, with batch_first or without; as with torch's GRU and RNN."""
    for batch_first, layers in itertools.product([False, True], [1, 2]):
        layer = pair(kind, 3, 4, num_layers=layers, batch_first=batch_first)[0]
        call = torch.compile(layer, backend="eager") if compiled else layer
        with torch.set_grad_enabled(grad):
            output, state = call(torch.randn(5, 2, 3))
        values = output.detach().clone()
        output.detach_()
        assert not output.requires_grad
        assert torch.equal(output, values)
        assert output.shape == (5, 2, values.shape[2])
        for t in flat(state):
            t.detach_()


# ---- states of other types -----------------------------------------------------------------------

ODD_STATES = {
    "one tensor": lambda h: torch.stack([h, h]),
    "one in a tuple": lambda h: (h,),
    "three": lambda h: (h, h, h),
    "None in it": lambda h: (h, None),
    "a list": lambda h: [h, h],
    "a list of one": lambda h: [h],
    "numbers": lambda h: (0.0, 0.0),
    "numpy": lambda h: (h.numpy(), h.numpy()),
    "a string": lambda h: "hx",
    "a dict": lambda h: {"h": h},
}


@pytest.mark.cpu("arrays of numpy are on the CPU")
@pytest.mark.parametrize("odd", ODD_STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_states_raise_as_torch_does(kind, odd):
    ours, theirs = both(kind, 3, 4)
    x, hx = inputs(kind), ODD_STATES[odd](torch.zeros(*([1] if kind in LAYERS else []), 2, 4))
    error = error_of(lambda: theirs(x, hx))
    if error is None:
        assert_same(ours(x, hx), theirs(x, hx))
    else:
        with pytest.raises(type(error), match=re.escape(str(error))):
            ours(x, hx)


# ---- tensors not needed by backward --------------------------------------------------------------


def gradients_after_overwriting(layer, x, hx, name, grads_of):
    """The gradients if the named tensor, or None, is zeroed between forward and backward."""
    for p in layer.parameters():
        p.requires_grad_(False)
    x = x.clone().requires_grad_(grads_of == "input")
    states = [t.clone().requires_grad_(grads_of == "state") for t in flat(hx)]
    result = flat(layer(x, tuple(states) if len(states) == 2 else states[0]))[0]
    buffers = {"input": x, "h": states[0], **dict(layer.named_parameters())}
    if name:
        with torch.no_grad():
            buffers[name].zero_()
    return torch.autograd.grad(result.sum(), x if grads_of == "input" else states)


@pytest.mark.parametrize("kind", [k for k in KINDS if "lstm" not in k])
@pytest.mark.parametrize("direct", [True, False])
def test_tensor_not_needed_by_backward_may_be_overwritten(kind, direct, request):
    """With frozen weights: the input if only a state requires grad, and a bias always."""
    if not direct:
        request.getfixturevalue("without_fast_path")
    x, hx = inputs(kind), states(both(kind, 3, 4)[0])
    suffix = "_l0" if kind in LAYERS else ""
    names = {
        "state": ["input", f"weight_ih{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}"],
        "input": [f"bias_ih{suffix}", *(["h"] if kind.startswith("rnn") else [])],
    }
    for grads_of, overwritable in names.items():
        for name in overwritable:
            ours, theirs = both(kind, 3, 4)
            found = gradients_after_overwriting(ours, x, hx, name, grads_of)
            # torch's GRU on a GPU needs its biases.
            assert_same(found, gradients_after_overwriting(theirs, x, hx, None, grads_of))


@pytest.mark.parametrize("kind", KINDS)
def test_overwriting_a_tensor_needed_by_backward_raises(kind):
    layer, _ = both(kind, 3, 4)
    x = inputs(kind)
    hx = states(layer)
    suffix = "_l0" if kind in LAYERS else ""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_after_overwriting(layer, x, hx, f"weight_hh{suffix}", "state")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_after_overwriting(layer, x, hx, f"weight_ih{suffix}", "input")
    # The weights' gradients need the input, and second derivatives need every tensor.
    for p in layer.parameters():
        p.requires_grad_(True)
    result = flat(layer(x, hx))[0]
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
    h = flat(hx)[0].clone().requires_grad_()
    layer.requires_grad_(False)
    result = flat(layer(x, (h, flat(hx)[1]) if isinstance(hx, tuple) else h))[0]
    x.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), h, create_graph=True)


# ---- calls seen by function modes, autocast and parametrizations ---------------------------------


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_function_mode_sees_the_same_calls_as_with_torch(kind):
    """One call of fastrnn.functional for one of torch._VF, and no calls inside it."""
    ours, theirs = both(kind, 3, 4)
    x = inputs(kind)
    seen = []
    for module in (theirs, ours):
        with Recorder() as recorder:
            result = module(x)
        seen.append([getattr(function, "__name__", "") for function in recorder.seen])
        assert_same(result, theirs(x))
    assert seen[1] == seen[0]
    assert getattr(functional, "lstm" if kind == "lstm_proj" else kind) in recorder.seen


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_weights_and_autocast_use_the_fast_path(kind, monkeypatch):
    """They call the kernels through fastrnn._C, without the operator, and give torch's results."""
    suffix = "_l0" if kind in LAYERS else ""
    if kind == "lstm":
        skip_without_bfloat16_lstm()
    for scaled, autocast in [(True, False), (False, True), (True, True)]:
        ours, theirs = both(kind, 3, 4)
        for module in (ours, theirs) if scaled else ():
            parametrize.register_parametrization(module, f"weight_hh{suffix}", Scaled())
        x = inputs(kind)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            expected = theirs(x)
            with monkeypatch.context() as patched:
                patched.setattr(functional, "run", None)
                found = ours(x)
        low = {"rtol": 0.02, "atol": 0.02} if autocast else {}  # bfloat16 has 8 bits of precision
        assert_same(found, expected, **low)


# ---- what follows from these rules ---------------------------------------------------------------


def test_a_tangent_of_a_gradient_reads_every_tensor():
    """Forward mode over backward computes by the formulas, from the input too."""
    layer = fastrnn.GRU(3, 4).requires_grad_(False)
    x, h = torch.ones(5, 2, 3), torch.ones(1, 2, 4, requires_grad=True)
    output = layer(x, h)[0]
    x.fill_(7)
    with torch.autograd.forward_ad.dual_level():
        ones = torch.ones_like(output)
        dual = torch.autograd.forward_ad.make_dual(ones, ones)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output, h, dual)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.endswith("_cell")])
def test_a_cells_recurrent_weight_may_change_where_no_state_needs_a_gradient(kind):
    grads = []
    for module in both(kind, 3, 4):
        output = flat(module(torch.ones(2, 3)))[0]
        with torch.no_grad():
            module.weight_hh.add_(1)
        grads.append(torch.autograd.grad(output.sum(), [module.weight_ih, module.bias_ih]))
    assert_same(*grads)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_input_of_batch_first_may_change_before_backward(kind):
    """A residual that is added in place: torch's layers on a CPU keep a copy, by steps.

    Without cuDNN those on a GPU keep views, so torch's residual is added out of place.
    """
    grads = []
    for layer, add in zip(pair(kind, 4, 4, batch_first=True), ["add_", "add"], strict=True):
        start = torch.linspace(-1, 1, 40).view(2, 5, 4).requires_grad_()
        x = start * 1
        x = getattr(x, add)(layer(x)[0].sum())
        grads.append(torch.autograd.grad(x.sum(), [start, *layer.parameters()]))
    assert_same(*grads, rtol=1e-5, atol=1e-4)  # sums of 40 gradients


@pytest.mark.parametrize("how", ["instance", "subclass", "class, after a call"])
def test_methods_that_forward_calls_are_the_users(how):
    class Mine(nn.GRU):
        pass

    layer = fastrnn.accelerate(Mine(3, 4))
    x = torch.ones(5, 2, 3)
    layer(x)

    def refuse(*args):
        raise ValueError("the user's")

    if how == "instance":
        layer.check_forward_args = refuse
    elif how == "subclass":
        layer = fastrnn.accelerate(type("Other", (nn.GRU,), {"check_forward_args": refuse})(3, 4))
    else:
        Mine.check_forward_args = refuse
    with pytest.raises(ValueError, match="the user's"):
        layer(x)


def test_weights_of_a_wrong_shape_are_refused():
    """torch's LSTM reads out of bounds on some: what the kernels refuse does not go there.

    On a GPU torch's raises an error of its own.
    """
    layer = fastrnn.LSTM(3, 4)
    layer.weight_ih_l0 = nn.Parameter(torch.zeros(8, 3))
    with pytest.raises(RuntimeError, match=r"Expected weight_ih size|The size of tensor a"):
        layer(torch.ones(5, 2, 3))


@pytest.mark.parametrize("kind", LAYERS)
def test_written_weights_of_deleted_attributes(kind):
    results = []
    for layer in pair(kind, 3, 4):
        raw = layer.weight_hh_l0
        del layer.weight_hh_l0
        layer._flat_weights[1] = raw * 0.5
        results.append(layer(torch.ones(5, 2, 3)))
    assert_same(*results)


def test_states_in_a_list_beside_packed_data_of_any_order():
    ours, theirs = pair("lstm", 3, 4)
    x = pack_padded_sequence(torch.ones(5, 2, 3), [3, 5], enforce_sorted=False)
    hx = [torch.ones(1, 2, 4)] * 2
    assert_same(ours(x, hx), theirs(x, hx))


@pytest.mark.cpu("the CPU's autocast")
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "lstm_cell"])
def test_autocast_with_the_states_of_the_step_before(kind):
    if kind == "lstm":
        skip_without_bfloat16_lstm()
    ours, theirs = both(kind, 6, 8)
    x, results = inputs(kind).repeat_interleave(2, -1), []
    for module in (ours, theirs):
        hx = None
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                found = module(x, hx)
                hx = found if kind == "lstm_cell" else found[1]
        results.append(found)
    assert_same(*results, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits; dtypes are compared too
