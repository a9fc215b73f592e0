"""torch.nn's recurrent layers and cells, computed by fastrnn.

Each class is a subclass of torch's class of the same name, from which it inherits constructor,
parameters, initial values, state_dict, repr and pickling. ``forward`` is torch's code with the name
``_VF`` bound to ``fastrnn.functional``, so all checks, errors and conventions are those of the
installed torch. Ordinary calls (dense tensors, no autocast, no transforms) skip that code: a fast
path in C++ computes them.

``torch.jit.script`` can't compile these layers: it compiles torch's layers on the same parameters.
It also leaves them in the model that it was called on, with a warning in the log ``fastrnn``;
``fastrnn.accelerate`` makes them fast again.
"""

import functools
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fastrnn import _C, all_states

# torch's forward code calls `_VF.lstm(...)`. It runs with the globals of this module.
from fastrnn import functional as _VF
from fastrnn.copies import deep_copy, with_class
from fastrnn.events import results_of_layer
from fastrnn.symbolic import call_of_module

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

RECOMPUTE = "_fastrnn_recompute"
"""The instance attribute of the option `recompute`, with a name that no user's class has.

The fast path in C++ reads it too.
"""

_Forward = TypeVar("_Forward", bound=Callable[..., Any])
_Module = TypeVar("_Module", bound=nn.Module)


def _rebind(forward: _Forward, **names: Any) -> _Forward:
    """Return torch's ``forward`` with ``_VF`` bound to ``fastrnn.functional``.

    Args:
        forward: a function of torch.nn that calls _VF.
        names: other bindings, in a copy of this module's globals.

    Raises:
        ImportError: if the installed torch's ``forward`` does not call _VF.
    """
    theirs = cast(types.FunctionType, forward)
    if "_VF" not in theirs.__code__.co_names:
        raise ImportError(f"{theirs.__module__}.{theirs.__qualname__} does not call torch._VF")
    # The globals of a module, not a copy of torch's: torch.compile guards on importable names.
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
    made.__qualname__ = theirs.__qualname__  # not from the code, before Python 3.11
    made.__kwdefaults__ = theirs.__kwdefaults__
    made.__annotations__ = dict(theirs.__annotations__)
    made.__doc__ = theirs.__doc__
    return cast(_Forward, made)


# Methods that torch's forward calls and the fast path does not.
_STEPS = (
    "check_input",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "check_hidden_size",
    "check_forward_args",
    "permute_hidden",
    "_update_flat_weights",
)


def _overrides_steps(cls: type[nn.Module]) -> bool:
    """Whether a user's subclass overrides one of them. C++ looks for those set on the instance."""
    classes: Any = _CLASSES  # mypy takes the classes of modules for unhashable
    if cls in classes or not issubclass(cls, nn.RNNBase):  # cells have none of them
        return False
    # The base is fastrnn's class or, for layers that keep their types, torch's.
    base: Any = next(base for base in cls.__mro__ if base in classes)
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in _STEPS)


def _without_assignments(forward: Callable[..., Any], self: nn.Module, *args: Any) -> Any:
    """Call ``forward`` and restore the attributes that it changes, such as the list of weights.

    torch.export warns of a forward that leaves other tensors in attributes. Before torch 2.10 it
    refuses such a forward.
    """
    before = dict(vars(self))
    try:
        return forward(self, *args)
    finally:
        vars(self).update(before)


def _with_fast_path(fast_path: Callable[..., Any], theirs: _Forward) -> _Forward:
    """Return torch's ``forward`` computed by fastrnn, with a fast path before it.

    ``fast_path(self, input, hx)`` returns None where it does not apply. torch.compile traces
    torch's ``forward`` only.
    """
    forward = _rebind(theirs)
    recomputing = _rebind(theirs, _VF=_VF.recomputing)
    wide = _rebind(theirs, _VF=_VF.with_states)
    recomputing_wide = _rebind(theirs, _VF=_VF.recomputing_with_states)

    @functools.wraps(forward)
    def fast_forward(
        self: nn.Module,
        input: Any,
        hx: Any = None,
        *,
        resets: Any = None,
        lengths: Any = None,
        return_states: bool = False,
    ) -> Any:
        if resets is not None or lengths is not None or return_states:
            given = {"resets": resets, "lengths": lengths, "return_states": return_states}
            if not isinstance(self, nn.RNNBase):
                name = next(n for n, v in given.items() if v is not None and v is not False)
                raise TypeError(
                    f"{fast_forward.__qualname__}() got an unexpected keyword argument '{name}'"
                )
            return all_states.call(fast_forward, with_options, self, input, hx, **given)
        cls: Any = type(self)  # mypy takes the classes of modules for unhashable
        if not torch.compiler.is_compiling():
            result = None if _overrides_steps(cls) else fast_path(self, input, hx)
            if result is None:
                result = call_of_module(fast_forward, self, input, hx)
            if result is not None:
                return result
        of_torch = recomputing if getattr(self, RECOMPUTE, False) else forward
        if _is_exporting():
            return _without_assignments(of_torch, self, input, hx)
        return of_torch(self, input, hx)

    def with_options(
        self: nn.RNNBase, input: Any, hx: Any, events: Any = None, return_states: bool = False
    ) -> Any:
        """The output, in rows as wide as those of the operator, and the last states."""
        cls: Any = type(self)
        if not torch.compiler.is_compiling() and not _overrides_steps(cls):
            result = fast_path(self, input, hx, return_states, events)
            if result is not None:
                return result
        recompute = getattr(self, RECOMPUTE, False)
        call: Callable[..., Any]
        args: tuple[Any, ...] = ()
        if events is not None:
            call, args = results_of_layer, (events, return_states, recompute)
        elif return_states:
            call = recomputing_wide if recompute else wide
        else:
            call = recomputing if recompute else forward
        if _is_exporting():
            return _without_assignments(call, self, input, hx, *args)
        return call(self, input, hx, *args)

    return cast(_Forward, fast_forward)


def _is_exporting() -> bool:
    """Whether torch.export(strict=False) traces."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _with_recompute(init: _Forward) -> _Forward:
    """Return torch's ``__init__`` with the option ``recompute``."""

    @functools.wraps(init)
    def init_with_recompute(
        self: nn.Module, *args: Any, recompute: bool = False, **kw: Any
    ) -> None:
        init(self, *args, **kw)
        if recompute:  # else the instance has only torch's attributes
            setattr(self, RECOMPUTE, True)

    return cast(_Forward, init_with_recompute)


def _with_options(extra_repr: _Forward) -> _Forward:
    """Return torch's ``extra_repr`` with the option ``recompute`` where it is on."""

    @functools.wraps(extra_repr)
    def extra_repr_with_options(self: nn.Module) -> str:
        text: str = extra_repr(self)
        return f"{text}, recompute=True" if getattr(self, RECOMPUTE, False) else text

    return cast(_Forward, extra_repr_with_options)


def _get_recompute(self: nn.Module) -> Any:
    own = vars(self)
    # A user may have set an attribute of this name before the layer became fastrnn's.
    return own["recompute"] if "recompute" in own else own.get(RECOMPUTE, False)


def _set_recompute(self: nn.Module, value: bool) -> None:
    own = vars(self)
    own["recompute" if "recompute" in own else RECOMPUTE] = value


_recompute = property(
    _get_recompute, _set_recompute, doc="Whether only the outputs are saved for backward."
)


def _read_weights(self: nn.RNNBase) -> None:
    """Update ``self._flat_weights``, the weights that forward computes with, by torch's rule.

    All attributes are read again when one is no longer the tensor in ``_flat_weight_refs``. Until
    then, code may write weights into the list. torch evaluates a parametrization up to three times
    a call; here each attribute is read once.
    """
    params = self._parameters
    names = self._flat_weights_names
    weights: list[Any]
    try:
        weights = [params[name] for name in names]
    except KeyError:  # parametrized, under the old weight_norm, or a replica of DataParallel
        weights = [getattr(self, name, None) for name in names]
    refs = self._flat_weight_refs
    if any(
        w is not None and ref is not None and ref() is not w
        for w, ref in zip(weights, refs, strict=True)
    ):
        self._flat_weights = weights
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
        self.flatten_parameters()


def _with_batch_check(permute: _Forward) -> _Forward:
    """Return torch's ``permute_hidden``, which sorts the states of a PackedSequence, with a check.

    On a GPU, a state with too few rows would fail a device-side assertion, and the process could
    not use the GPU any more. A compiler knows neither size; the code that it generates checks
    indices itself.
    """

    @functools.wraps(permute)
    def permute_hidden(self: nn.Module, hx: Any, permutation: Any) -> Any:
        if permutation is not None and not torch.compiler.is_compiling():
            for state in hx if isinstance(hx, (tuple, list)) else (hx,):
                if not isinstance(state, torch.Tensor):
                    continue  # torch's own error
                if state.is_cuda and state.dim() == 3 and state.size(1) < permutation.numel():
                    expected = (state.size(0), permutation.numel(), state.size(2))
                    raise RuntimeError(f"Expected hidden size {expected}, got {list(state.size())}")
        return permute(self, hx, permutation)

    return cast(_Forward, permute_hidden)


def _without_compiled_batch(check: _Forward) -> _Forward:
    """Return torch's ``check_forward_args``, which skips a PackedSequence that is being compiled.

    The batch size of a PackedSequence is a value in a tensor, which a compiler does not know. The
    operator compares it with the states at each call.
    """

    @functools.wraps(check)
    def check_forward_args(self: nn.Module, input: Any, hidden: Any, batch_sizes: Any) -> None:
        if batch_sizes is None or not torch.compiler.is_compiling():
            check(self, input, hidden, batch_sizes)

    return cast(_Forward, check_forward_args)


def _for_jit_script(self: _Module) -> _Module:
    """Return torch's layer on the same parameters, for torch.jit.script to compile."""
    cls = type(self)
    if cls not in FAST.values():
        return self
    logging.getLogger("fastrnn").warning(
        "torch.jit.script compiles torch.nn's %s and leaves it in the model it was called on",
        cls.__name__,
    )
    return with_class(self, cls.__base__)


class RNN(nn.RNN):
    """Drop-in for :class:`torch.nn.RNN`: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    and this option:

    Args:
        recompute: whether to save only the outputs for backward, which computes the gates again: a
            fraction of the memory, at the cost of another forward pass. Also an attribute.

    Shape:
        - input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence
        - hx: [L*D, B, H], or [L*D, H] unbatched; zeros if not given
        - resets, lengths: see `fastrnn.segments`
        - return_states: whether to return all states too, see `fastrnn.all_states`
        - output: [T, B, D*H], in the layout of the input
        - h_n: as hx

    T is the number of steps, B the batch size, I ``input_size``, H ``hidden_size``, L
    ``num_layers``, and D is 2 if ``bidirectional``, else 1.

    All tensors have the dtype of the parameters: float32, float64, bfloat16 or float16.
    """

    recompute = _recompute
    __init__ = _with_recompute(nn.RNN.__init__)
    extra_repr = _with_options(nn.RNN.extra_repr)
    forward = _with_fast_path(
        lambda self, input, hx, *options: _C.layer(self.mode.lower(), self, input, hx, *options),
        nn.RNN.forward,
    )
    permute_hidden = _with_batch_check(nn.RNN.permute_hidden)
    check_forward_args = _without_compiled_batch(nn.RNN.check_forward_args)
    _update_flat_weights = _read_weights
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _for_jit_script


class LSTM(nn.LSTM):
    """Drop-in for :class:`torch.nn.LSTM`, with gates in torch's order i, f, g, o.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    and this option:

    Args:
        recompute: whether to save only the outputs for backward, which computes the gates again: a
            fraction of the memory, at the cost of another forward pass. Also an attribute.

    Shape:
        - input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence
        - hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), without B if unbatched; zeros if not given
        - resets, lengths: see `fastrnn.segments`
        - return_states: whether to return all states too, see `fastrnn.all_states`
        - output: [T, B, D*P], in the layout of the input
        - (h_n, c_n): as hx

    T is the number of steps, B the batch size, I ``input_size``, H ``hidden_size``, L
    ``num_layers``, and D is 2 if ``bidirectional``, else 1; P is ``proj_size``, or H without a
    projection.

    All tensors have the dtype of the parameters: float32, float64, bfloat16 or float16.
    """

    recompute = _recompute
    __init__ = _with_recompute(nn.LSTM.__init__)
    extra_repr = _with_options(nn.LSTM.extra_repr)
    forward = _with_fast_path(functools.partial(_C.layer, "lstm"), nn.LSTM.forward)
    permute_hidden = _with_batch_check(nn.LSTM.permute_hidden)
    check_forward_args = _without_compiled_batch(nn.LSTM.check_forward_args)
    _update_flat_weights = _read_weights
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _for_jit_script


class GRU(nn.GRU):
    """Drop-in for :class:`torch.nn.GRU`, with gates in torch's order r, z, n.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    and this option:

    Args:
        recompute: whether to save only the outputs for backward, which computes the gates again: a
            fraction of the memory, at the cost of another forward pass. Also an attribute.

    Shape:
        - input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence
        - hx: [L*D, B, H], or [L*D, H] unbatched; zeros if not given
        - resets, lengths: see `fastrnn.segments`
        - return_states: whether to return all states too, see `fastrnn.all_states`
        - output: [T, B, D*H], in the layout of the input
        - h_n: as hx

    T is the number of steps, B the batch size, I ``input_size``, H ``hidden_size``, L
    ``num_layers``, and D is 2 if ``bidirectional``, else 1.

    All tensors have the dtype of the parameters: float32, float64, bfloat16 or float16.
    """

    recompute = _recompute
    __init__ = _with_recompute(nn.GRU.__init__)
    extra_repr = _with_options(nn.GRU.extra_repr)
    forward = _with_fast_path(functools.partial(_C.layer, "gru"), nn.GRU.forward)
    permute_hidden = _with_batch_check(nn.GRU.permute_hidden)
    check_forward_args = _without_compiled_batch(nn.GRU.check_forward_args)
    _update_flat_weights = _read_weights
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _for_jit_script


class RNNCell(nn.RNNCell):
    """Drop-in for :class:`torch.nn.RNNCell`: one step of :class:`RNN`.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Shape:
        - input: [B, I] or [I]
        - hx: [B, H] or [H]; zeros if not given
        - h': as hx

    B is the batch size, I ``input_size``, H ``hidden_size``. All tensors have the dtype of the
    parameters: float32, float64, bfloat16 or float16.
    """

    forward = _with_fast_path(
        lambda self, input, hx: _C.cell(f"rnn_{self.nonlinearity}", self, input, hx),
        nn.RNNCell.forward,
    )
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _for_jit_script


class LSTMCell(nn.LSTMCell):
    """Drop-in for :class:`torch.nn.LSTMCell`: one step of :class:`LSTM`.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Shape:
        - input: [B, I] or [I]
        - hx: (h, c), both [B, H] or [H]; zeros if not given
        - (h', c'): as hx

    B is the batch size, I ``input_size``, H ``hidden_size``. All tensors have the dtype of the
    parameters: float32, float64, bfloat16 or float16.
    """

    forward = _with_fast_path(functools.partial(_C.cell, "lstm"), nn.LSTMCell.forward)
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _for_jit_script


class GRUCell(nn.GRUCell):
    """Drop-in for :class:`torch.nn.GRUCell`: one step of :class:`GRU`.

    Arguments, attributes, errors and results are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Shape:
        - input: [B, I] or [I]
        - hx: [B, H] or [H]; zeros if not given
        - h': as hx

    B is the batch size, I ``input_size``, H ``hidden_size``. All tensors have the dtype of the
    parameters: float32, float64, bfloat16 or float16.
    """

    forward = _with_fast_path(functools.partial(_C.cell, "gru"), nn.GRUCell.forward)
    __deepcopy__ = deep_copy
    __prepare_scriptable__ = _for_jit_script


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
_CLASSES = frozenset([*FAST, *FAST.values()])
"""torch's class -> fastrnn's."""
