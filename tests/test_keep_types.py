"""keep_types=True: layers of torch's own classes, computed by fastrnn."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import flat, leaves, random_state, slow_after
from replace_cases import (
    NAMES,
    B,
    ByName,
    H,
    I,
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
    ops_called,
    result,
)
from test_super_forward import CLASSES, inputs
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch_features import NO_RNN, needs_compiled_packed, needs_strict_export_of_layers

import fastrnn

# Runs before any kernel, so one instruction set is enough.
pytestmark = [pytest.mark.once, pytest.mark.cpu("replacement does not depend on the device")]

OURS = {"fastrnn::forward"}


def accelerated(cls, *args):
    torch.manual_seed(0)
    return fastrnn.accelerate(cls(*args or (I, H)), keep_types=True)


def patched(cls, *args):
    torch.manual_seed(0)
    with fastrnn.patch(keep_types=True):
        return cls(*args or (I, H))


def replica(cls, *args):
    module = accelerated(cls, *args)
    copied = module._replicate_for_data_parallel()
    for name, p in module.named_parameters():
        setattr(copied, name, p)
    return copied


HOWS = {
    "accelerated": accelerated,
    "patched": patched,
    "deepcopy": lambda *args: copy.deepcopy(accelerated(*args)),
    "pickled": lambda *args: pickle.loads(pickle.dumps(patched(*args))),
    "replica": replica,
    "restored and accelerated": lambda *args: fastrnn.accelerate(
        fastrnn.restore(fastrnn.accelerate(accelerated(*args))), keep_types=True
    ),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", NAMES)
def test_type_is_torchs_and_results_are_fastrnns(name, how, reports):
    cls = getattr(nn, name)
    module = HOWS[how](cls)
    assert type(module) is cls
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(I, H)
    args = leaves((an_input(ours),))
    results = [flat(m(*args)) for m in (module, ours)]
    grads = [torch.autograd.grad(sum(t.sum() for t in r), args) for r in results]
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(*grads[0], *grads[1])
    assert ops_called(module, *args) == OURS
    assert repr(module) == repr(cls(I, H))
    assert module.state_dict().keys() == ours.state_dict().keys()
    assert reports() == []


@pytest.mark.parametrize("name", NAMES)
def test_unmarked_layer_stays_torchs(name):
    accelerated(nn.LSTM)
    module = getattr(nn, name)(I, H)
    assert ops_called(module, an_input(module)).isdisjoint(OURS)
    with pytest.raises(TypeError, match=rf"^{name}\.forward\(\) got an unexpected keyword"):
        module(an_input(module), hidden=None)


@pytest.mark.parametrize("name", NAMES)
def test_restore(name):
    module = accelerated(getattr(nn, name))
    expected = result(module)
    attributes = vars(getattr(nn, name)(I, H)).keys()
    assert fastrnn.restore(module) is module
    assert vars(module).keys() == attributes
    assert ops_called(module, an_input(module)).isdisjoint(OURS)
    assert_close(result(module), expected)


def test_layers_already_accelerated_are_unchanged():
    model = nn.ModuleList([accelerated(nn.GRU), fastrnn.GRU(I, H), fastrnn.accelerate(Plain(I))])
    before = [(type(module), set(vars(module))) for module in model]
    for keep_types in [False, True]:
        fastrnn.accelerate(model, keep_types=keep_types)
        assert [(type(module), set(vars(module))) for module in model] == before
    with fastrnn.patch(keep_types=True):
        assert type(fastrnn.LSTMCell(I, H)) is fastrnn.LSTMCell


def test_innermost_patch_decides():
    def new_layer():
        module = nn.GRU(I, H)
        return type(module), ops_called(module, an_input(module)) == OURS

    with fastrnn.patch(keep_types=True) as outer:
        assert new_layer() == (nn.GRU, True)
        with fastrnn.patch() as inner:
            assert new_layer() == (fastrnn.GRU, True)
            inner.undo()
            assert new_layer() == (nn.GRU, True)
        with fastrnn.patch():
            outer.undo()
            assert new_layer() == (fastrnn.GRU, True)
    assert new_layer() == (nn.GRU, False)


# ---- subclasses and parametrized layers ---------------------------------------------------------

ALL_CLASSES = [
    OwnCall,
    OwnReduce,
    Registered,
    WithMeta,
    ByName,
    PlainCell,
    *CLASSES,
    Plain,
    OnPlain,
]
SUBCLASSES = [(cls, how) for cls in ALL_CLASSES for how in ["accelerated", "patched", "deepcopy"]]
SUBCLASSES.remove((OwnReduce, "deepcopy"))  # its copy is a new layer, built by the constructor


@pytest.mark.parametrize(("cls", "how"), SUBCLASSES)
def test_subclasses_keep_their_classes(cls, how, reports):
    registered = list(Registry.made)
    sizes = [I] if issubclass(cls, Plain) else [I, H]
    module = HOWS[how](cls, *sizes)
    assert type(module) is cls
    assert Registry.made == registered
    assert reports() == []
    args = inputs(module)[0]
    assert ops_called(module, *args) == OURS
    torch.manual_seed(0)
    assert_close(flat(module(*args)), flat(cls(*sizes)(*args)))


class OverridesCheck(nn.GRU):
    def check_forward_args(self, input, hidden, batch_sizes):
        raise NotImplementedError("the user's")


@pytest.mark.parametrize("how", HOWS)
def test_overridden_methods_are_called(how):
    module = HOWS[how](OverridesCheck)
    with pytest.raises(NotImplementedError, match="the user's"):
        module(an_input(module))


def test_skipped_layers_are_reported(reports):
    why = "is left alone: it overrides forward and does not call super().forward"
    own = accelerated(OwnForward)
    replaced = nn.GRU(I, H)
    replaced.forward = lambda x: x
    fastrnn.accelerate(replaced, keep_types=True)
    assert "_fastrnn" not in {*vars(own), *vars(replaced)}
    assert reports() == [
        f"the model (OwnForward) {why}",
        "the model (GRU) is left alone: it has a forward set on the instance",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_parametrized(name):
    module = getattr(nn, name)(I, H)
    weight = a_weight(module)
    parametrizations.weight_norm(module, weight)
    expected, cls = result(module), type(module)
    fastrnn.accelerate(module, keep_types=True)
    assert type(module) is cls
    assert_close(result(module), expected)
    assert ops_called(module, an_input(module)) >= OURS
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(nn, name)
    assert_close(result(module), expected)


@needs_strict_export_of_layers
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_recompute(name, recompute):
    module = getattr(nn, name)(I, H, num_layers=2)
    fastrnn.accelerate(module, keep_types=True, recompute=recompute)
    option = ", recompute=True" if recompute else ""
    assert repr(module) == f"{name}({I}, {H}, num_layers=2{option})"
    assert not hasattr(module, "recompute")
    graph = str(torch.export.export(module, (an_input(module),), strict=True).graph)
    assert f", {recompute})" in graph.split("fastrnn.forward")[1].splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_functional_call(name):
    module = accelerated(getattr(nn, name))
    x = an_input(module)
    other = {key: p.detach() * 2 for key, p in module.named_parameters()}
    ours = getattr(fastrnn, name)(I, H)
    ours.load_state_dict(other)
    for found, expected in zip(
        flat(functional_call(module, other, (x,))), flat(ours(x)), strict=True
    ):
        assert torch.equal(found, expected)
    assert_close(result(module), result(fastrnn.restore(module)))


# ---- torch's tools ------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "packed", [False, pytest.param(True, marks=needs_compiled_packed)], ids=["padded", "packed"]
)
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, packed, dynamo):
    module = accelerated(getattr(nn, name))
    x = an_input(module)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    if packed and isinstance(module, nn.RNNBase):
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
        args = (x, random_state(module, 2))
    else:
        args = (x,)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for a, b in zip(flat(compiled(*args)), flat(module(*args)), strict=True):
        assert torch.equal(a, b)
    assert ["fastrnn.forward" in graph for graph in graphs] == [True]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_unmarked_layers_compile_as_before(name, dynamo):
    accelerated(nn.LSTM)
    module = getattr(nn, name)(I, H)
    with pytest.raises(dynamo.exc.Unsupported, match=NO_RNN):
        torch.compile(module, backend="eager", fullgraph=True)(an_input(module))
    with dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_close(flat(compiled(an_input(module))), result(module))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=needs_strict_export_of_layers)])
@pytest.mark.parametrize("name", NAMES)
def test_export(name, strict, dynamo):
    module = accelerated(getattr(nn, name))
    program = torch.export.export(module, (an_input(module),), strict=strict)
    assert "fastrnn.forward" in str(program.graph)
    assert_close(flat(program.module()(an_input(module))), result(module))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", NAMES)
def test_script(name, marked):
    module = accelerated(getattr(nn, name))
    if not marked:
        fastrnn.restore(module)
    model = nn.Sequential(module)
    scripted = torch.jit.script(model)
    assert_close(flat(scripted(an_input(module))), result(module))
    assert model[0] is module
    assert (ops_called(module, an_input(module)) == OURS) == marked


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NAMES)
def test_trace(name):
    module = accelerated(getattr(nn, name))
    traced = torch.jit.trace(module, an_input(module))
    assert "fastrnn::forward" in str(traced.inlined_graph)
    assert_close(flat(traced(an_input(module))), result(module))


@pytest.mark.parametrize("name", NAMES)
def test_fx_traces_them_as_leaf_modules(name):
    module = accelerated(getattr(nn, name))
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert ops_called(traced, an_input(module)) == OURS


@pytest.mark.parametrize("name", NAMES)
def test_explain(name, capsys):
    cls = getattr(nn, name)
    module = accelerated(cls)
    fastrnn.explain(module, an_input(module))
    assert "layer 0, forward" in capsys.readouterr().out
    with pytest.raises(TypeError, match=f"got {name}; fastrnn.accelerate makes"):
        fastrnn.explain(cls(I, H), an_input(module))


# ---- another process ----------------------------------------------------------------------------

LOADING = """
import pickle, sys, torch
{before}
module, x, expected = pickle.load(open(sys.argv[1], "rb"))
assert type(module) is torch.nn.{name}
with torch.profiler.profile() as profile:
    found = module(x)
assert ("fastrnn::forward" in {{event.name for event in profile.events()}}) is {ours}
torch.testing.assert_close(found, expected)
"""
USES = {
    "without fastrnn": ("assert 'fastrnn' not in sys.modules", False),
    "importing it": ("import fastrnn", False),
    "keeping types too": ("import fastrnn; fastrnn.patch(keep_types=True).undo()", True),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", slow_after(1, ["LSTM", "GRUCell"]))
def test_in_another_process(name, use, tmp_path):
    module = accelerated(getattr(nn, name))
    x = an_input(module)
    (tmp_path / "module").write_bytes(pickle.dumps((module, x, module(x))))
    before, ours = USES[use]
    code = LOADING.format(before=before, name=name, ours=ours)
    subprocess.run([sys.executable, "-c", code, tmp_path / "module"], check=True)


def test_accelerate_accepts_layers_marked_in_another_process(tmp_path):
    """The unpickled layer is marked before this process has changed torch's classes."""
    path = tmp_path / "module"
    path.write_bytes(pickle.dumps((accelerated(nn.LSTM), torch.zeros(T, B, I))))
    code = (
        "import pickle, sys, torch, fastrnn\n"
        "module, x = pickle.load(open(sys.argv[1], 'rb'))\n"
        "fastrnn.accelerate(module)\n"
        "assert type(module) is torch.nn.LSTM\n"
        "fastrnn.explain(module, x)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
