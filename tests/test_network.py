"""A network's options and the operators' arguments: each is made from the other by name."""

import typing

import pytest
import torch

import fastrnn
from fastrnn import ops
from fastrnn.network import Network, bind, forward_arguments, signature

pytestmark = [pytest.mark.once, pytest.mark.cpu("names of arguments")]

TENSORS = {"input": 0, "h0": 1, "c0": 2, "weights": [3, 4], "batch_sizes": 5}
# No two options of the same type have the same value.
NETWORKS = [
    Network("lstm", True, 3, True, 0.25, False, False),
    Network("gru", False, 2, False, 0.5, True, True),
    Network("rnn_tanh", True, 1, bidirectional=False, dropout=0.0),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_arguments_of_forward_are_those_of_the_network(network):
    arguments = forward_arguments(network, **TENSORS)
    names = [argument.name for argument in ops.forward._schema.arguments]
    by_name = dict(zip(names, arguments, strict=True))
    assert by_name == {**TENSORS, "keep": False, **network._asdict()}
    assert bind(ops.forward, arguments, {}) == (network, {**TENSORS, "keep": False})
    assert bind(ops.forward, arguments[:6], dict(list(by_name.items())[6:])) == (
        network,
        {**TENSORS, "keep": False},
    )


def test_defaults_are_those_of_the_schema():
    arguments = forward_arguments(NETWORKS[0], **TENSORS)
    assert signature(ops.forward).parameters["recompute"].default is False
    assert bind(ops.forward, arguments[:-1], {})[0] == NETWORKS[0]
    with pytest.raises(TypeError, match="missing a required argument: 'keep'"):
        bind(ops.forward, arguments[:-2], {})


def test_backward_has_the_options_that_it_needs():
    names = [argument.name for argument in ops.backward._schema.arguments]
    values = {**dict.fromkeys(names), **NETWORKS[0]._asdict()}
    network, others = bind(ops.backward, [values[name] for name in names], {})
    assert network == NETWORKS[0]
    assert list(others) == [name for name in names if name not in Network._fields]


def test_signatures_have_the_types_of_options():
    for operator in [ops.forward, ops.backward]:
        parameters = signature(operator).parameters
        hints = typing.get_type_hints(Network)
        for name in hints.keys() & parameters.keys():
            assert parameters[name].annotation is hints[name], name


@pytest.mark.parametrize("name", fastrnn.registered.TORCH_CELLS)
def test_torchs_cells(name):
    cls = fastrnn.registered.TORCH_CELLS[name]
    assert hasattr(torch, name)
    assert issubclass(getattr(fastrnn, cls), getattr(torch.nn, cls))
    gates = fastrnn.CELLS[name]["gates"]
    assert sorted(fastrnn.registered.ONNX_GATES[cls]) == list(range(gates))
