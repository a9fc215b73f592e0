"""torch.nn's recurrent layers and cells, with the computation replaced and nothing else.

Each class here is a subclass of torch's class of the same name. Constructor, parameters, initial
values, state_dict, repr and pickling are inherited. ``forward`` is torch's own code, run with the
name ``_VF`` standing for ``fastrnn.functional``, so that every check, message and convention is the
installed torch's own. Where only the numbers are wanted (no gradient, autocast or transform, plain
tensors on the CPU) it is skipped for a direct call of the kernels, csrc/direct.cpp.

``torch.jit.script`` can't compile these layers, so it is given torch's in their place, on the same
parameters. It leaves those in the model it was called on, too: a warning in the log ``fastrnn``
says so, and ``fastrnn.accelerate`` brings ours back.
"""

import copy
import functools
import logging
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastrnn import _C

# torch's forward code says `_VF.lstm(...)` and runs with the globals of this module: this name is
# the whole replacement.
from fastrnn import functional as _VF
from fastrnn.symbolic import call_of_module

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

RECOMPUTE = "_fastrnn_recompute"
"""The instance attribute that holds the option `recompute`, by a name that no user's class has.

csrc/direct.cpp reads it too.
"""

_Forward = TypeVar("_Forward", bound=Callable[..., Any])
_Module = TypeVar("_Module", bound=nn.Module)


def _on_fastrnn(forward: _Forward, **names: Any) -> _Forward:
    """Return torch's ``forward`` with ``_VF`` bound to ``fastrnn.functional``.

    Or, in a copy of this module's globals, with other ``names`` bound.
    """
    theirs = cast(types.FunctionType, forward)
    if "_VF" not in theirs.__code__.co_names:
        raise ImportError(f"{theirs.__module__}.{theirs.__qualname__} does not call torch._VF")
    # A real module's globals and not a copy of torch's: torch.compile guards on importable names.
    ours = globals()
    for name in theirs.__code__.co_names:
        if name in theirs.__globals__:
            ours.setdefault(name, theirs.__globals__[name])
    made = types.FunctionType(
        theirs.__code__,
        {**ours, **names} if names else ours,
        theirs.__name__,
        theirs.__defaults__,
        theirs.__closure__,
    )
    made.__kwdefaults__ = theirs.__kwdefaults__
    made.__annotations__ = dict(theirs.__annotations__)
    made.__doc__ = theirs.__doc__
    return cast(_Forward, made)


# What torch's forward calls of its own class, and a direct call does not.
_STEPS = (
    "check_input",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "check_hidden_size",
    "check_forward_args",
    "permute_hidden",
    "_update_flat_weights",
)


@functools.lru_cache(maxsize=128)  # bounded: parametrized modules have a class each
def _has_steps_of_its_own(cls: type[nn.Module]) -> bool:
    """Whether a user's subclass overrides one of them."""
    # Of the six classes, fastrnn's or, for layers that keep their types, torch's.
    base: Any = next(base for base in cls.__mro__ if base in FAST or base in FAST.values())
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in _STEPS)


def _directly(direct: Callable[..., Any], theirs: _Forward) -> _Forward:
    """Return torch's ``forward`` on fastrnn, before which ``direct(self, input, hx)`` is asked.

    It returns None where it does not apply. torch.compile sees ``forward`` alone.
    """
    forward = _on_fastrnn(theirs)
    recomputing = _on_fastrnn(theirs, _VF=_VF.recomputing)

    @functools.wraps(forward)
    def direct_or_forward(self: nn.Module, input: Any, hx: Any = None) -> Any:
        cls: Any = type(self)  # mypy doubts that the classes of modules are hashable
        if not torch.compiler.is_compiling():
            result = None if _has_steps_of_its_own(cls) else direct(self, input, hx)
            if result is None:
                result = call_of_module(direct_or_forward, self, input, hx)
            if result is not None:
                return result
        if getattr(self, RECOMPUTE, False):
            return recomputing(self, input, hx)
        return forward(self, input, hx)

    return cast(_Forward, direct_or_forward)


def _with_recompute(init: _Forward) -> _Forward:
    """Return torch's ``__init__`` with the option of fastrnn's layers beside torch's."""

    @functools.wraps(init)
    def init_with_recompute(
        self: nn.Module, *args: Any, recompute: bool = False, **kw: Any
    ) -> None:
        init(self, *args, **kw)
        if recompute:  # else the instance has torch's attributes alone
            setattr(self, RECOMPUTE, True)

    return cast(_Forward, init_with_recompute)


def _with_options(extra_repr: _Forward) -> _Forward:
    """Return torch's ``extra_repr`` with that option where it is on."""

    @functools.wraps(extra_repr)
    def extra_repr_with_options(self: nn.Module) -> str:
        text: str = extra_repr(self)
        return f"{text}, recompute=True" if getattr(self, RECOMPUTE, False) else text

    return cast(_Forward, extra_repr_with_options)


def _get_recompute(self: nn.Module) -> Any:
    own = vars(self)
    # An attribute of this name that somebody gave a torch.nn.LSTM before it became ours is theirs.
    return own["recompute"] if "recompute" in own else own.get(RECOMPUTE, False)


def _set_recompute(self: nn.Module, value: bool) -> None:
    own = vars(self)
    own["recompute" if "recompute" in own else RECOMPUTE] = value


_recompute = property(
    _get_recompute, _set_recompute, doc="Whether only the outputs are kept for backward."
)


def _read_weights(self: nn.RNNBase) -> None:
    """Bring ``self._flat_weights``, which forward computes with, up to date by torch's rule.

    The list counts as it is, so that code may write weights into it, until an attribute is no
    longer the tensor of ``_flat_weight_refs``: then all attributes are read. torch evaluates a
    parametrization up to three times a call to find out; here each attribute is read once.
    """
    params = self._parameters
    names = self._flat_weights_names
    weights: list[Any]
    try:
        weights = [params[name] for name in names]
    except KeyError:  # parametrized, under the old weight_norm, or a replica of DataParallel
        weights = [getattr(self, name, None) for name in names]
    refs = [None if ref is None else ref() for ref in self._flat_weight_refs]
    if len(refs) != len(weights) or any(map(operator.is_not, weights, refs)):
        self._flat_weights = weights
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
        self.flatten_parameters()


def _within_bounds(permute: _Forward) -> _Forward:
    """Return torch's ``permute_hidden``, which sorts the states of a PackedSequence, with a check.

    On a GPU a state of too few rows would end the process's use of it, with an assertion. To a
    compiler neither number is known; the code it generates checks what it selects.
    """

    @functools.wraps(permute)
    def permute_hidden(self: nn.Module, hx: Any, permutation: Any) -> Any:
        if permutation is not None and not torch.compiler.is_compiling():
            for state in hx if isinstance(hx, tuple) else (hx,):
                if state.is_cuda and state.dim() == 3 and state.size(1) < permutation.numel():
                    wanted = (state.size(0), permutation.numel(), state.size(2))
                    raise RuntimeError(f"Expected hidden size {wanted}, got {list(state.size())}")
        return permute(self, hx, permutation)

    return cast(_Forward, permute_hidden)


def _known_at_run_time(check: _Forward) -> _Forward:
    """Return torch's ``check_forward_args``, but for a PackedSequence that is being compiled.

    Its batch is a value in a tensor, of which a compiler knows no more than a name. The operator
    compares it with the states at every call.
    """

    @functools.wraps(check)
    def check_forward_args(self: nn.Module, input: Any, hidden: Any, batch_sizes: Any) -> None:
        if batch_sizes is None or not torch.compiler.is_compiling():
            check(self, input, hidden, batch_sizes)

    return cast(_Forward, check_forward_args)


def deep_copy(self: _Module, memo: dict[int, Any]) -> _Module:
    """Copy as copy.deepcopy does, also where weights are computed from other tensors.

    copy.deepcopy refuses tensors that were, which a parametrization leaves in ``_flat_weights``,
    and pruning and the old weight_norm as attributes. The copy has the values of the latter, and
    computes its own weights at every call, as the original does.

    A copy of a module whose ``compile()`` was called is not compiled, like that of an nn.Linear: in
    torch's layers it goes on computing with the original's parameters.
    """
    for value in vars(self).values():
        if isinstance(value, torch.Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    if parametrize.is_parametrized(self):  # it can't be pickled, and torch copies its attributes
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = vars(self).copy()
        if "_flat_weights" in state:  # the weak references say that it is to be read again
            state["_flat_weights"] = [None] * len(state["_flat_weights"])
        vars(copied).update(copy.deepcopy(state, memo))
    else:
        make, arguments, *rest = cast(tuple[Any, ...], self.__reduce_ex__(4))
        copied = make(*copy.deepcopy(arguments, memo))
        memo[id(self)] = copied
        if rest and rest[0] is not None:
            copied.__setstate__(copy.deepcopy(rest[0], memo))
    vars(copied).pop("_compiled_call_impl", None)
    return copied


def _torch_twin(self: _Module) -> _Module:
    """Return torch's layer on the same parameters: what torch.jit.script compiles."""
    cls = type(self)
    if cls not in FAST.values():
        return self
    logging.getLogger("fastrnn").warning(
        "torch.jit.script compiles torch.nn's %s and leaves it in the model it was called on",
        cls.__name__,
    )
    return as_torchs(self, cls.__base__)


def as_torchs(self: _Module, cls: Any) -> _Module:
    """Return a module of the class ``cls`` on the same parameters."""
    twin = copy.copy(self)
    twin.__class__ = cls
    return twin


class RNN(nn.RNN):
    """Drop-in for :class:`torch.nn.RNN`: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Shapes, for T steps, batch B, I = input_size, H = hidden_size, L layers,
    D = 2 if bidirectional else 1:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence
        hx: [L*D, B, H], or [L*D, H] unbatched; zeros if not given
        returns output: [T, B, D*H] in the layout of the input, and h_n: as hx

    ``recompute=True`` (an attribute too) keeps the outputs alone for backward.
    """

    recompute = _recompute
    __init__ = _with_recompute(nn.RNN.__init__)
    extra_repr = _with_options(nn.RNN.extra_repr)
    forward = _directly(
        lambda self, input, hx: _C.layer(self.mode.lower(), self, input, hx),
        nn.RNN.forward,
    )
    permute_hidden = _within_bounds(nn.RNN.permute_hidden)
    check_forward_args = _known_at_run_time(nn.RNN.check_forward_args)
    _update_flat_weights = _read_weights
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _torch_twin


class LSTM(nn.LSTM):
    """Drop-in for :class:`torch.nn.LSTM`, gates in torch's order i, f, g, o.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Shapes, for T steps, batch B, I = input_size, H = hidden_size, L layers,
    D = 2 if bidirectional else 1, and P = proj_size, or H where there is no projection:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence
        hx: (h_0, c_0) of [L*D, B, P] and [L*D, B, H], without B if unbatched; zeros if not given
        returns output: [T, B, D*P] in the layout of the input, and (h_n, c_n): as hx

    ``recompute=True`` (an attribute too) keeps the outputs alone for backward, which computes the
    gates again: a fraction of the memory, for another forward pass.
    """

    recompute = _recompute
    __init__ = _with_recompute(nn.LSTM.__init__)
    extra_repr = _with_options(nn.LSTM.extra_repr)
    forward = _directly(functools.partial(_C.layer, "lstm"), nn.LSTM.forward)
    permute_hidden = _within_bounds(nn.LSTM.permute_hidden)
    check_forward_args = _known_at_run_time(nn.LSTM.check_forward_args)
    _update_flat_weights = _read_weights
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _torch_twin


class GRU(nn.GRU):
    """Drop-in for :class:`torch.nn.GRU`, gates in torch's order r, z, n.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Shapes, for T steps, batch B, I = input_size, H = hidden_size, L layers,
    D = 2 if bidirectional else 1:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence
        hx: [L*D, B, H], or [L*D, H] unbatched; zeros if not given
        returns output: [T, B, D*H] in the layout of the input, and h_n: as hx

    ``recompute=True`` (an attribute too) keeps the outputs alone for backward.
    """

    recompute = _recompute
    __init__ = _with_recompute(nn.GRU.__init__)
    extra_repr = _with_options(nn.GRU.extra_repr)
    forward = _directly(functools.partial(_C.layer, "gru"), nn.GRU.forward)
    permute_hidden = _within_bounds(nn.GRU.permute_hidden)
    check_forward_args = _known_at_run_time(nn.GRU.check_forward_args)
    _update_flat_weights = _read_weights
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _torch_twin


class RNNCell(nn.RNNCell):
    """Drop-in for :class:`torch.nn.RNNCell`: one step of :class:`RNN`.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Shapes, for batch B, I = input_size, H = hidden_size:
        input: [B, I] or [I]
        hx: [B, H] or [H]; zeros if not given
        returns h: as hx
    """

    forward = _directly(
        lambda self, input, hx: _C.cell(f"rnn_{self.nonlinearity}", self, input, hx),
        nn.RNNCell.forward,
    )
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _torch_twin


class LSTMCell(nn.LSTMCell):
    """Drop-in for :class:`torch.nn.LSTMCell`: one step of :class:`LSTM`.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Shapes, for batch B, I = input_size, H = hidden_size:
        input: [B, I] or [I]
        hx: (h, c), both [B, H] or [H]; zeros if not given
        returns (h, c): as hx
    """

    forward = _directly(functools.partial(_C.cell, "lstm"), nn.LSTMCell.forward)
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _torch_twin


class GRUCell(nn.GRUCell):
    """Drop-in for :class:`torch.nn.GRUCell`: one step of :class:`GRU`.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Shapes, for batch B, I = input_size, H = hidden_size:
        input: [B, I] or [I]
        hx: [B, H] or [H]; zeros if not given
        returns h: as hx
    """

    forward = _directly(functools.partial(_C.cell, "gru"), nn.GRUCell.forward)
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _torch_twin


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
"""torch's class -> fastrnn's."""
