"""torch.fx.symbolic_trace and tools based on it: a layer, cell or function is one node, as torch's.

So are accelerated layers of users' subclasses, which torch's tracer rejects before acceleration.
"""

import copy

import pytest
import torch
from helpers import (
    LAYERS,
    cell_pair,
    cell_state,
    flat,
    gradients,
    leaves,
    pair,
    random_state,
)
from replace_cases import ByName, OnOurs, OwnCall, Plain, PlainCell
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from training_cases import CASES, H, I, module_pair

import fastrnn
from fastrnn import functional

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once

BOTH = [False, True]


class Zeros(nn.Module):
    """A model of a layer or cell that is called without states."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.finish(self.module(x * 2))

    def finish(self, result):
        return (result[0] + 1, result[1]) if isinstance(self.module, nn.RNNBase) else result


class OneState(Zeros):
    def forward(self, x, h):
        return self.finish(self.module(x * 2, h))


class TwoStates(Zeros):
    def forward(self, x, h, c):
        return self.finish(self.module(x * 2, hx=(h, c)))


def operations(graph_module):
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes]


def model_of(module, args):
    return [Zeros, OneState, TwoStates][len(args) - 1](module)


def traced(module, args):
    """The traced model of the module, with as many inputs as there are arguments."""
    return fx.symbolic_trace(model_of(module, args))


def arguments(case, state):
    ours, theirs, (x, hx) = module_pair(case)
    return ours, theirs, leaves([x, *flat(hx)] if state else [x])


@pytest.mark.parametrize("how", ["built", "accelerated", "recompute"])
@pytest.mark.parametrize("state", BOTH, ids=["zeros", "state"])
@pytest.mark.parametrize("case", CASES)
def test_one_node(case, state, how):
    """Graph, results and gradients are those of torch's; the traced graph can be traced again."""
    ours, theirs, args = arguments(case, state)
    if how == "accelerated":
        ours = fastrnn.accelerate(copy.deepcopy(theirs))
    elif how == "recompute" and case in LAYERS:
        ours.recompute = True
    found, expected = (traced(m, args) for m in [ours, theirs])
    assert operations(found) == operations(expected)
    assert ("call_module", "module") in operations(found)
    assert found.module is ours

    results, torchs_results = flat(found(*args)), flat(expected(*args))
    assert_close(results, torchs_results)
    assert_close(
        gradients(results, [*args, *ours.parameters()]),
        gradients(torchs_results, [*args, *theirs.parameters()]),
    )

    again = fx.symbolic_trace(found)
    assert operations(again) == operations(found)
    assert_close(flat(again(*args)), torchs_results)
    assert_close(flat(fx.Transformer(found).transform()(*args)), torchs_results)
    ShapeProp(found).propagate(*args)
    shapes = [n.meta["tensor_meta"] for n in found.graph.nodes if n.op == "call_module"]
    assert [t.shape for t in flat_meta(shapes)] == [t.shape for t in flat(ours(*call(args)))]


def flat_meta(nested):
    """The TensorMetadata in ShapeProp's nested result."""
    if hasattr(nested, "memory_format"):
        return [nested]
    return [part for inner in nested for part in flat_meta(inner)]


def call(args):
    """(x, hx) from x and the single states."""
    return args if len(args) < 3 else (args[0], tuple(args[1:]))


@pytest.mark.parametrize("case", CASES)
def test_any_tracer(case):
    """Tracers with their own is_leaf_module, and a layer deep in a model."""

    class Calls(fx.Tracer):
        def is_leaf_module(self, m, name):
            return False

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, nn.RNNBase | nn.RNNCellBase)

    ours, _, args = arguments(case, state=False)
    model = nn.Sequential(nn.Identity(), nn.Sequential(ours))
    for tracer in [Calls(), Leaves()]:
        graph_module = fx.GraphModule(model, tracer.trace(model))
        assert ("call_module", "1.0") in operations(graph_module)
        assert_close(flat(graph_module(*args)), flat(ours(*args)))


def pack(x, lengths):
    return pack_padded_sequence(x, lengths, enforce_sorted=False)


def pad(packed):
    return pad_packed_sequence(packed)


fx.wrap("pack")
fx.wrap("pad")


class Packing(nn.Module):
    """Packing and padding, each as one node, around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths, h=None, c=None):
        output, _ = self.layer(pack(x, lengths), h if c is None else (h, c))
        return pad(output)[0]


@pytest.mark.parametrize("state", BOTH, ids=["zeros", "state"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed(kind, state):
    """PackedSequences, and arguments fixed by concrete_args."""
    ours, theirs = pair(kind, I, H, num_layers=2, bidirectional=True)
    args = [torch.randn(4, 3, I), torch.tensor([2, 4, 1], device="cpu")]
    args += flat(random_state(theirs, 3)) if state else []
    constants = dict.fromkeys(["h", "c"][len(args) - 2 :])
    found, expected = (fx.symbolic_trace(Packing(m), constants) for m in [ours, theirs])
    assert operations(found) == operations(expected)
    assert_close(found(*args, *constants.values()), expected(*args, *constants.values()))


def test_users_subclasses():
    """Subclasses with fastrnn's forward are nodes; those with their own forward do not trace."""
    x = torch.randn(5, 2, 3)
    for module in [fastrnn.accelerate(Plain(3)), OnOurs(3, 4)]:
        found = fx.symbolic_trace(nn.Sequential(module))
        assert ("call_module", "0") in operations(found)
        assert_close(flat(found(x)), flat(module(x)))
    cell = fastrnn.accelerate(PlainCell(3, 4))
    assert_close(fx.symbolic_trace(nn.Sequential(cell))(x[0]), cell(x[0]))

    class Doubling(fastrnn.GRU):
        def forward(self, input, hx=None):
            return super().forward(input * 2, hx)

    class DoublingCall(fastrnn.GRU):
        def __call__(self, input):
            return super().__call__(input * 2)

    replaced = fastrnn.GRU(3, 4)
    replaced.forward = lambda x: fastrnn.GRU.forward(replaced, x * 2)
    others = [Doubling(3, 4), DoublingCall(3, 4), replaced, ByName(3, 4), OwnCall(3, 4)]
    for module in others:
        with pytest.raises(fx.proxy.TraceError):
            fx.symbolic_trace(nn.Sequential(module))


@pytest.mark.parametrize("library", [fastrnn, nn])
def test_bare_layer_does_not_trace(library):
    for name in ["GRU", "LSTMCell"]:
        with pytest.raises(fx.proxy.TraceError, match="control flow"):
            fx.symbolic_trace(getattr(library, name)(3, 4))


@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")  # for a Proxy
@pytest.mark.parametrize("case", CASES)
def test_hooks(case):
    """Backward hooks run once. Forward hooks raise: they would be traced and then run again."""
    ours, _, args = arguments(case, state=True)
    calls = []
    ours.register_full_backward_hook(lambda *_: calls.append("backward"))
    gradients(traced(ours, args)(*args), args)
    assert calls == ["backward"]
    global_hooks = nn.modules.module
    for register in [
        ours.register_forward_hook,
        ours.register_forward_pre_hook,
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_forward_pre_hook,
    ]:
        handle = register(lambda *_: None)
        with pytest.raises(fx.proxy.TraceError, match=r"the forward hooks of .* can't be traced"):
            traced(ours, args)
        handle.remove()
    assert ("call_module", "module") in operations(traced(ours, args))


@pytest.mark.parametrize("case", CASES)
def test_parametrized(case):
    ours, _, args = arguments(case, state=True)
    name = "weight_hh" if case.endswith("_cell") else "weight_hh_l0"
    nn.utils.parametrizations.weight_norm(ours, name)
    found = traced(ours, args)
    assert ("call_module", "module") in operations(found)
    before = flat(found(*args))
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.1
    assert_close(flat(found(*args)), flat(model_of(ours, args)(*args)))
    assert not torch.allclose(flat(found(*args))[0], before[0])


# ---- functions -----------------------------------------------------------------------------------


class Calling(nn.Module):
    """Calls a function of torch or fastrnn with a layer's or a cell's parameters."""

    def __init__(self, module, function, *options):
        super().__init__()
        self.module, self.function, self.options = module, function, options

    def forward(self, x, h, c=None):
        state = h if c is None else (h, c)
        if isinstance(self.module, nn.RNNCellBase):
            m = self.module
            return self.function(x, state, m.weight_ih, m.weight_hh, b_ih=m.bias_ih, b_hh=m.bias_hh)
        weights = [getattr(self.module, name) for name in self.module._flat_weights_names]
        return self.function(x, state, weights, *self.options)


@pytest.mark.parametrize("case", CASES)
def test_functions(case):
    if case in LAYERS:
        _, module = pair(case, I, H, num_layers=2, bidirectional=True)
        args = torch.randn(4, 3, I), *flat(random_state(module, 3))
        name, options = case.removesuffix("_proj"), (True, 2, 0.0, True, True, False)
    else:
        _, module = cell_pair(case.removesuffix("_cell"), I, H)
        args = torch.randn(3, I), *flat(cell_state(module, 3))
        name, options = case, ()
    found, expected = (
        fx.symbolic_trace(
            Calling(module, getattr(library, name), *options), {} if args[2:] else {"c": None}
        )
        for library in [functional, torch]
    )
    assert getattr(functional, name) in [n.target for n in found.graph.nodes]
    assert [op for op, _ in operations(found)] == [op for op, _ in operations(expected)]
    assert_close(flat(found(*args)), flat(expected(*args)))


def test_function_of_any_cell():
    layer = fastrnn.LSTM(I, H)

    def call(x, h, c):
        weights = [w.detach() for w in layer._flat_weights]
        return functional.rnn(
            "lstm", x, h, c, weights, has_biases=True, num_layers=1, bidirectional=False
        )

    args = torch.randn(4, 3, I), *random_state(layer, 3)
    found = fx.symbolic_trace(call)
    assert functional.rnn in [n.target for n in found.graph.nodes]
    assert_close(flat(found(*args)), flat(layer(args[0], args[1:])))


# ---- quantization --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.ao's deprecation warnings
@pytest.mark.cpu("torch.ao's kernels run on the CPU")
@pytest.mark.parametrize("dynamic", BOTH, ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_quantization(name, dynamic):
    """The modules around the layer are quantized, the layer is not."""
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(I, I), nn.Linear(H, 3)
            self.layer = getattr(fastrnn, name)(I, H)

        def forward(self, x):
            found = self.layer(self.before(x))
            return self.after(found if name in ("RNNCell", "GRUCell") else found[0])

    model = Model().eval()
    x = torch.randn(4, I) if name.endswith("Cell") else torch.randn(5, 4, I)
    mapping = (
        quantization.QConfigMapping().set_global(quantization.default_dynamic_qconfig)
        if dynamic
        else quantization.get_default_qconfig_mapping()
    )
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    converted = quantize_fx.convert_fx(prepared)
    assert type(converted.layer) is getattr(fastrnn, name)
    assert type(converted.before) is not nn.Linear
    assert_close(converted(x), model(x), rtol=0, atol=0.05)
