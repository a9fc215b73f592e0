"""torch.ao's dynamic quantization, which looks layers up by their exact type."""

import pytest
import torch
from helpers import flat
from replace_cases import H, I, Plain, an_input
from torch import nn
from torch.ao import quantization
from torch.ao.nn.quantized import dynamic
from torch.ao.quantization import quantize_fx
from torch.testing import assert_close

import fastrnn

pytestmark = [
    pytest.mark.once,
    pytest.mark.cpu("torch's quantized layers run on the CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]

NAMES = ["LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]  # torch has no quantized RNN
DTYPES = [torch.qint8, torch.float16]


def build_both(name):
    """The same model with fastrnn's layer and with torch's."""
    torch.manual_seed(0)
    theirs = nn.Sequential(getattr(nn, name)(I, H))
    torch.manual_seed(0)
    return nn.Sequential(getattr(fastrnn, name)(I, H)), theirs


def result(model, name):
    return flat(model(an_input(getattr(nn, name)(I, H))))


SPECS = {
    "by our type": lambda layer, _: {type(layer)},
    "by name": lambda _, qconfig: {"0": qconfig},
    "all": lambda _, qconfig: {"": qconfig},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_layers_with_a_qconfig(name, spec, dtype):
    ours, theirs = build_both(name)
    before = type(ours[0])
    qconfig = {
        torch.qint8: quantization.default_dynamic_qconfig,
        torch.float16: quantization.float16_dynamic_qconfig,
    }[dtype]
    found = quantization.quantize_dynamic(ours, SPECS[spec](ours[0], qconfig), dtype)
    expected = quantization.quantize_dynamic(theirs, dtype=dtype)
    assert type(found[0]) is type(expected[0]) is getattr(dynamic, name)
    for a, b in zip(result(found, name), result(expected, name), strict=True):
        assert torch.equal(a, b)
    assert type(ours[0]) is before


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_kept(name):
    ours, _ = build_both(name)
    seen = []
    ours[0].register_forward_hook(lambda *_: seen.append("after"))
    result(quantization.quantize_dynamic(ours, {type(ours[0])}), name)
    assert seen == ["after"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["class", "keep_types", "restore"])
@pytest.mark.parametrize("name", NAMES)
def test_default_spec_looks_for_torchs_types(name, how, dtype):
    _, model = build_both(name)
    expected = quantization.quantize_dynamic(model, dtype=dtype)
    fastrnn.accelerate(model, keep_types=how == "keep_types")
    if how == "restore":
        fastrnn.restore(model)
    found = quantization.quantize_dynamic(model, dtype=dtype)
    # quantize_dynamic's default list has only torch's types: see docs/swapping.md.
    if how == "class":
        assert type(found[0]) is getattr(fastrnn, name)
    else:
        assert type(found[0]) is type(expected[0])
        assert_close(result(found, name), result(expected, name))


def test_subclass_is_not_quantized():
    model = nn.Sequential(Plain(I))
    found = quantization.quantize_dynamic(model, {"0": quantization.default_dynamic_qconfig})
    assert type(found[0]) is Plain
    fastrnn.accelerate(model)
    found = quantization.quantize_dynamic(model, {"0": quantization.default_dynamic_qconfig})
    assert type(found[0]) is type(model[0])


def test_mapping_has_the_same_layers_as_torchs():
    table = quantization.get_default_dynamic_quant_module_mappings()
    for name in [*NAMES, "RNN"]:
        assert (getattr(fastrnn, name) in table) == (getattr(nn, name) in table)


@pytest.mark.parametrize("how", ["keep_types", "restore"])
@pytest.mark.parametrize("name", NAMES)
def test_fx_graph_mode(name, how):
    _, model = build_both(name)
    fastrnn.accelerate(model.eval(), keep_types=how == "keep_types")
    if how == "restore":
        fastrnn.restore(model)
    mapping = quantization.QConfigMapping().set_global(quantization.default_dynamic_qconfig)
    prepared = quantize_fx.prepare_fx(model, mapping, (an_input(getattr(nn, name)(I, H)),))
    assert type(quantize_fx.convert_fx(prepared).get_submodule("0")) is getattr(dynamic, name)


def test_a_graph_leaves_fastrnns_layers_in_float():
    """A layer is a node of the graph; its class is in none of the tables, as a user's is not."""
    model = nn.Sequential(fastrnn.LSTM(I, H))
    mapping = quantization.QConfigMapping().set_global(quantization.default_dynamic_qconfig)
    prepared = quantize_fx.prepare_fx(model, mapping, (an_input(model[0]),))
    assert type(quantize_fx.convert_fx(prepared).get_submodule("0")) is fastrnn.LSTM
