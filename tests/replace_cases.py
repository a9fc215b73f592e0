"""User-defined subclasses used by test_accelerate, test_patch and others."""

import torch
from helpers import flat
from torch import nn

import fastrnn

I, H, T, B = 3, 4, 5, 2
NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


def an_input(module):
    torch.manual_seed(1)
    cell = isinstance(module, nn.RNNCellBase)
    return torch.randn((B, I) if cell else (T, B, I))


def result(module):
    return flat(module(an_input(module)))


def a_weight(module):
    return next(name for name, _ in module.named_parameters() if name.startswith("weight_ih"))


def ops_called(module, *args):
    """The names of fastrnn's operators and torch's recurrent operators that a call runs."""
    with torch.profiler.profile() as profile:
        module(*args)
    names = {event.name for event in profile.events()}
    return {n for n in names if n.startswith(("fastrnn::", "aten::lstm", "aten::gru", "aten::rnn"))}


class Plain(nn.LSTM):
    """A subclass that does not override forward."""

    def __init__(self, size):
        super().__init__(size, H)
        self.scale = nn.Parameter(torch.ones(()))

    def doubled(self, x):
        return super().forward(x)[0] * 2


class PlainCell(nn.GRUCell):
    pass


class OnPlain(Plain):
    kind = "on plain"


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return input @ self.weight_ih_l0.T, input @ self.weight_hh_l0[:, :I].T


class OnOwnForward(OwnForward):
    pass


class ByName(nn.LSTM):
    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, input * 2, hx)


class OwnCall(nn.GRU):
    def __call__(self, *args):
        return super().__call__(*args)


class OwnReduce(nn.GRU):
    def __reduce__(self):
        return OwnReduce, (self.input_size, self.hidden_size)


class Registry(nn.GRU):
    made = []  # noqa: RUF012

    def __init_subclass__(cls):
        Registry.made.append(cls)


class Registered(Registry):
    pass


class Meta(type):
    pass


class WithMeta(nn.GRU, metaclass=Meta):
    pass


class OnOurs(fastrnn.LSTM):
    pass
