"""The modules used by test_modules, test_module_weights and test_misuse."""

import torch
from helpers import flat
from torch import nn
from torch.testing import assert_close

I, H, T, B = 3, 4, 5, 2

LAYERS = {
    "rnn": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "lstm": ("LSTM", {}),
    "lstm_deep": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "lstm_proj": ("LSTM", {"proj_size": 2, "batch_first": True}),
    "gru": ("GRU", {"batch_first": True}),
    "gru_deep": ("GRU", {"num_layers": 3, "bidirectional": True, "bias": False}),
}
CELLS = {
    "rnn_cell": ("RNNCell", {}),
    "rnn_cell_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm_cell": ("LSTMCell", {}),
    "lstm_cell_nobias": ("LSTMCell", {"bias": False}),
    "gru_cell": ("GRUCell", {"dtype": torch.float64}),
}
ALL = {**LAYERS, **CELLS}
NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


def build(library, case, seed=0):
    """The case's module from `library` (torch.nn or fastrnn), initialised with the seed."""
    name, options = ALL[case]
    torch.manual_seed(seed)
    return getattr(library, name)(I, H, **options)


def an_input(module, seed=1):
    """A batched input of the module's dtype."""
    torch.manual_seed(seed)
    shape = (B, I) if isinstance(module, nn.RNNCellBase) else (T, B, I)
    return torch.randn(shape, dtype=next(module.parameters()).dtype)


def result(module, *args, seed=2):
    """The tensors that a call returns, with the generator seeded for dropout."""
    torch.manual_seed(seed)
    return flat(module(*args))


def assert_same_values(ours, theirs):
    x = an_input(theirs)
    assert_close(result(ours, x), result(theirs, x))


def set_new_parameters(module):
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * 2))
