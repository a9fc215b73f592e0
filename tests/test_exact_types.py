"""What goes by the exact type of a layer, and what is said of it."""

import logging

import pytest
import torch
from replace_cases import H, I, Plain, an_input, ops_called
from torch import nn

import fastrnn

# What is tested here comes before any kernel.
pytestmark = [pytest.mark.once, pytest.mark.cpu("types do not depend on the device")]


@pytest.fixture
def told(caplog):
    fastrnn.replace._tell_of_types.cache_clear()
    caplog.set_level(logging.INFO, logger="fastrnn")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]


def build(**options):
    with fastrnn.patch(**options):
        return nn.GRU(I, H)


CHANGES = {
    "accelerate": lambda **options: fastrnn.accelerate(nn.GRU(I, H), **options),
    "a subclass": lambda **options: fastrnn.accelerate(Plain(I), **options),
    "patch": build,
}


@pytest.mark.parametrize("change", CHANGES)
def test_said_once_a_process(change, told):
    fastrnn.accelerate(nn.Linear(1, 1))
    fastrnn.accelerate(fastrnn.GRU(I, H))
    CHANGES[change](keep_types=True)
    assert told() == []
    for _ in range(2):
        CHANGES[change]()
        (message,) = told()
        assert "type(layer)" in message
        assert "keep_types=True" in message
    fastrnn.accelerate(nn.LSTM(I, H))
    assert len(told()) == 1


def initialised(module):
    """As many training scripts do it."""
    if type(module) == nn.GRU:  # noqa: E721
        nn.init.ones_(module.weight_hh_l0)
    return module


FINDERS = {
    "initialiser": lambda module: bool((initialised(module).weight_hh_l0 == 1).all()),
    "table": lambda module: {nn.GRU: True}.get(type(module), False),
    "fx": lambda module: torch.fx.Tracer().is_leaf_module(module, "0"),
}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("change", ["accelerate", "patch"])
def test_code_that_goes_by_the_type(change, finder):
    find, made = FINDERS[finder], CHANGES[change]
    assert find(nn.GRU(I, H))
    assert not find(made())
    module = made(keep_types=True)
    assert find(module)
    assert ops_called(module, an_input(module)) == {"fastrnn::forward"}
