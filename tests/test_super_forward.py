"""Users' subclasses whose forward calls super().forward get fastrnn's forward there."""

import abc
import copy
import functools
import pickle

import pytest
import torch
from helpers import flat, leaves, mapped
from replace_cases import B, ByName, H, I, T, ops_called
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import fastrnn

# Runs before any kernel, so one instruction set is enough.
pytestmark = [pytest.mark.once, pytest.mark.cpu("replacement does not depend on the device")]


class Reversed(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input.flip(0), hx)
        return output.flip(0), state


class ByClass(nn.GRU):
    def forward(self, input, scale=2.0):
        return super(ByClass, self).forward(hx=None, input=input * scale)  # noqa: UP008


class OnReversed(Reversed):
    def forward(self, input):
        return super().forward(input)[0]


def doubled(forward):
    @functools.wraps(forward)
    def twice(self, input):
        return mapped(forward(self, input), lambda t: 2 * t)

    return twice


class Decorated(nn.RNN):
    @doubled
    def forward(self, input):
        return super().forward(input)


class InAFunction(nn.LSTM):
    def forward(self, input):
        def run(part):
            return super(InAFunction, self).forward(part)[0]

        return torch.cat([run(part) for part in input.split(2)])


class VariableLengthRNNBase(abc.ABC, nn.RNNBase):
    """As in pytorch-forecasting: derives from RNNBase, not from one of torch's six classes."""

    @abc.abstractmethod
    def initial_state(self, x):
        pass

    def forward(self, x, hx=None, lengths=None, enforce_sorted=True):
        if isinstance(x, PackedSequence) or lengths is None:
            return super().forward(x, hx=hx)
        if lengths.max() == 0:
            return torch.zeros(*x.shape[:2], self.hidden_size), self.initial_state(x)
        packed = pack_padded_sequence(x, lengths.clip(1), enforce_sorted=enforce_sorted)
        packed, hidden = super().forward(packed, hx=hx)
        return pad_packed_sequence(packed)[0], hidden


class VariableGRU(VariableLengthRNNBase, nn.GRU):
    def initial_state(self, x):
        return torch.zeros(self.num_layers, x.size(1), self.hidden_size)


class VariableLSTM(VariableLengthRNNBase, nn.LSTM):
    def initial_state(self, x):
        return (torch.zeros(self.num_layers, x.size(1), self.hidden_size),) * 2


class Scored(abc.ABC):  # noqa: B024
    """A mixin unrelated to modules."""

    def score(self):
        return sum(p.numel() for p in self.parameters())


class ScoredRNN(nn.RNN, Scored):
    pass


class Cell(nn.LSTMCell):
    def forward(self, input, hx=None):
        h, c = super().forward(input, hx)
        return h + input.mean(), c


class WarmGRUCell(Scored, nn.GRUCell):
    def forward(self, input):
        return super().forward(input, super().forward(input))


class RNNCell(nn.RNNCell):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


CLASSES = [
    Reversed, ByClass, OnReversed, Decorated, InAFunction, VariableGRU, VariableLSTM, ScoredRNN,
    Cell, WarmGRUCell, RNNCell,
]  # fmt: skip


def accelerated(cls):
    torch.manual_seed(0)
    return fastrnn.accelerate(cls(I, H))


def patched(cls):
    torch.manual_seed(0)
    with fastrnn.patch():
        return cls(I, H)


def parametrized(cls):
    module = accelerated(cls)
    name = next(name for name, _ in module.named_parameters() if name.startswith("weight_hh"))
    return fastrnn.accelerate(parametrizations.weight_norm(fastrnn.restore(module), name))


HOWS = {
    "accelerated": accelerated,
    "patched": patched,
    "parametrized": parametrized,
    "deepcopy": lambda cls: copy.deepcopy(accelerated(cls)),
    "pickled": lambda cls: pickle.loads(pickle.dumps(accelerated(cls))),
    "restored and accelerated": lambda cls: fastrnn.accelerate(fastrnn.restore(accelerated(cls))),
}


def pair(how, cls):
    ours = HOWS[how](cls)
    torch.manual_seed(0)
    return ours, cls(I, H)


def inputs(module):
    """Arguments of a few calls."""
    if isinstance(module, nn.RNNCellBase):
        return [(torch.randn(B, I),)]
    calls = [(torch.randn(T, B, I),)]
    if isinstance(module, VariableLengthRNNBase):
        x = torch.randn(T, 3, I)
        state = mapped(module.initial_state(x), torch.randn_like)
        calls += [(x, state, torch.tensor([5, 0, 3]), False), (x, state, torch.tensor([0, 0, 0]))]
    return calls


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cls", CLASSES)
def test_forward_is_fastrnns(cls, how, reports):
    ours, theirs = pair(how, cls)
    assert isinstance(ours, cls)
    assert isinstance(ours, fastrnn.replace._OURS)
    assert reports() == []
    assert ops_called(ours, *inputs(ours)[0]) == {"fastrnn::forward"}
    for args in inputs(ours):
        args = leaves(args[0]), *args[1:]
        found, expected = (flat(module(*args)) for module in (ours, theirs))
        assert_close(found, expected)
        if not any(t.requires_grad for t in expected):
            continue
        found, expected = (
            torch.autograd.grad(sum(t.square().sum() for t in results), [args[0]])
            for results in (found, expected)
        )
        assert_close(found, expected)
    if isinstance(ours, Scored):
        assert ours.score() == sum(p.numel() for p in ours.parameters())
    restored = fastrnn.restore(ours)
    assert cls in (type(restored), *type(restored).__bases__)
    assert not isinstance(restored, fastrnn.replace._OURS)


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not InAFunction])
def test_compiled(cls):
    torch._dynamo.reset()
    module = accelerated(cls)
    args = inputs(module)[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, b in zip(flat(compiled(*args)), flat(module(*args)), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()


def test_abstract_classes_and_virtual_subclasses():
    module = accelerated(VariableLSTM)
    assert isinstance(module, VariableLengthRNNBase)
    assert isinstance(module, abc.ABC)
    Scored.register(Reversed)
    assert isinstance(accelerated(Reversed), Scored)
    with pytest.raises(TypeError, match="abstract"), fastrnn.patch():
        VariableLengthRNNBase("LSTM", I, H)


class OverridesCheck(VariableGRU):
    """Overrides a method that torch's forward calls and the fast path does not."""

    def check_forward_args(self, input, hidden, batch_sizes):
        raise NotImplementedError("the user's")


@pytest.mark.parametrize("how", ["accelerated", "patched"])
def test_overridden_methods_are_called(how):
    module = HOWS[how](OverridesCheck)
    assert isinstance(module, fastrnn.GRU)
    with pytest.raises(NotImplementedError, match="the user's"):
        module(torch.randn(T, B, I))


class BreaksTheChain(OnReversed):
    """The last of a chain of forwards does not call super().forward."""

    def forward(self, input):
        return input


class OwnClass(nn.GRU):
    def forward(self, input):
        return super(self.__class__, self).forward(input)


class OtherMethod(nn.LSTM):
    def forward(self, input):
        super().check_input(input, None)
        return self.head.forward(input)


class Partial(nn.LSTM):
    def run(self, scale, input):
        return super().forward(input * scale)

    forward = functools.partialmethod(run, 2.0)


class OtherMeta(abc.ABCMeta):
    pass


class WithOtherMeta(nn.RNNCell, metaclass=OtherMeta):
    pass


NO_SUPER = "overrides forward and does not call super().forward"
SKIPPED = {
    BreaksTheChain: NO_SUPER,
    OwnClass: NO_SUPER,
    OtherMethod: NO_SUPER,
    Partial: NO_SUPER,
    ByName: "overrides forward and calls LSTM.forward and not super().forward: keep_types=True "
    "makes it fast",
    WithOtherMeta: "has the metaclass OtherMeta",
}


@pytest.mark.parametrize("cls", SKIPPED)
def test_skipped_classes_are_reported(cls, reports):
    message = f"is left alone: it {SKIPPED[cls]}"
    module = accelerated(cls)
    assert type(module) is cls
    assert reports() == [f"the model ({cls.__name__}) {message}"]
    assert [type(patched(cls)) for _ in range(2)] == [cls, cls]
    assert reports()[1:] == [f"{cls.__name__} {message}"]


class PlainCell(nn.GRUCell):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_of_a_subclass():
    """torch.jit.script compiles torch's forward, for the subclasses that it supports."""
    module = accelerated(PlainCell)
    x = torch.randn(B, I)
    assert_close(torch.jit.script(module)(x), module(x))
