"""Code that checks a layer's exact type, and the log message about it."""

import logging

import pytest
import torch
from replace_cases import H, I, Plain, an_input, ops_called
from torch import nn

import fastrnn

# These tests do not depend on the kernels.
pytestmark = [pytest.mark.once, pytest.mark.cpu("types do not depend on the device")]


@pytest.fixture
def messages(caplog):
    fastrnn.replace._log_changed_types.cache_clear()
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
def test_logged_once_per_process(change, messages):
    fastrnn.accelerate(nn.Linear(1, 1))
    fastrnn.accelerate(fastrnn.GRU(I, H))
    CHANGES[change](keep_types=True)
    assert messages() == []
    for _ in range(2):
        CHANGES[change]()
        (message,) = messages()
        assert "type(layer)" in message
        assert "keep_types=True" in message
    fastrnn.accelerate(nn.LSTM(I, H))
    assert len(messages()) == 1


def initialised(module):
    """Initialises by exact type, as many training scripts do."""
    if type(module) == nn.GRU:  # noqa: E721
        nn.init.ones_(module.weight_hh_l0)
    return module


TYPE_CHECKS = {
    "initialiser": lambda module: bool((initialised(module).weight_hh_l0 == 1).all()),
    "table": lambda module: {nn.GRU: True}.get(type(module), False),
    "fx": lambda module: torch.fx.Tracer().is_leaf_module(module, "0"),
}


@pytest.mark.parametrize("type_check", TYPE_CHECKS)
@pytest.mark.parametrize("change", ["accelerate", "patch"])
def test_code_that_checks_the_exact_type(change, type_check):
    recognises, change_layer = TYPE_CHECKS[type_check], CHANGES[change]
    assert recognises(nn.GRU(I, H))
    assert not recognises(change_layer())
    module = change_layer(keep_types=True)
    assert recognises(module)
    assert ops_called(module, an_input(module)) == {"fastrnn::forward"}
