"""Stateless networks: torch.lstm, gru, rnn_tanh, rnn_relu and their cells, by fused kernels.

Each function has torch's own signatures. Sizes: T steps, B batch, I input, H hidden, P projection
(`proj_size`), L layers, D directions (2 if `bidirectional`), G gates (4 for an LSTM, 3 for a GRU, 1
for an RNN).

`params` is a flat list, for each layer and direction: weight_ih [G*H, I or D*H], weight_hh [G*H,
H], then bias_ih [G*H] and bias_hh [G*H] if `has_biases`, then weight_hr [P, H] if there is a
projection. dtypes: float32, float64, bfloat16, float16, one for all tensors; the 16-bit types
compute in float32 and round h_t once a step.
"""

from __future__ import annotations

import collections
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastrnn import _C
from fastrnn.autograd import Network, run
from fastrnn.symbolic import one_node

_log = logging.getLogger("fastrnn")
_fallbacks: collections.Counter[str] = collections.Counter()


def fallbacks() -> dict[str, int]:
    """How many calls went to torch's own kernels because this build has none for their arguments.

    Reason -> calls: a device without kernels, a dtype or layout without kernels (complex, sparse),
    or sizes of 0.
    """
    return dict(_fallbacks)


@one_node
def rnn(
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    *,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float = 0.0,
    train: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A network of any registered cell.

    Args:
        cell: a name in `fastrnn.CELLS`.
        input: [T, B, I], or packed data [N, I] with `batch_sizes`.
        h0: [L*D, B, H or P].
        c0: [L*D, B, H] for a cell that has a second state, else None.
        weights: the flat list described above.
        batch_sizes: [T] int64 on the CPU, non-increasing, as in a PackedSequence.
        dropout: probability of zeroing an output between two layers, if `train`.
        recompute: keep only the layers' outputs for backward, and compute each layer's gates again
            there: a fraction of the memory, for another forward pass.

    Returns:
        output [T, B, D*(H or P)] or [N, D*(H or P)], h_n and c_n (None for a cell without one),
        shaped as h0 and c0.

    Raises:
        ValueError, RuntimeError: as torch's layers do, naming what was wrong and what was expected.
    """
    network = Network(cell, has_biases, num_layers, dropout, train, bidirectional, recompute)
    output, h_n, c_n = run(network, input, h0, c0, weights, batch_sizes)
    return output, h_n, None if c0 is None else c_n


# Those that this build has kernels for; on meta, the fake ones.
_DEVICES = ("cpu", "meta", *(["cuda"] if _C.has_cuda else []))
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _why_torch(input: Tensor) -> str | None:
    """Why there are no kernels for such an input, or None if there are."""
    if input.device.type not in _DEVICES:
        return f"on {input.device.type}"
    if input.is_complex():
        return f"of {input.dtype}"
    if input.layout is not torch.strided:
        return f"of {input.layout}"
    return None


def _by_torch(function: Callable[..., Any], why: str, *args: Any) -> Any:
    """The results of torch's own function, counted as a fallback if it takes the arguments."""
    results = function(*args)
    call = f"{function.__name__} {why}"
    if not _fallbacks[call]:
        _log.warning("%s: this build of fastrnn has no kernels for it, torch's own are used", call)
    _fallbacks[call] += 1
    return results


def _modes_active() -> bool:
    """Whether a TorchFunctionMode is to see a call: once, as it would torch's, not its parts."""
    return torch._C._is_torch_function_mode_enabled() and not torch.compiler.is_compiling()


def _autocast(
    cell: str, padded: bool, projected: bool, h0: Tensor, input: Tensor, weights: Sequence[Tensor]
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes that torch's layers give output and c under autocast, or None if they do not
    change.

    On CUDA everything comes out in the lower precision. On the CPU, nn.RNN, the fused LSTM and
    projections are products last and do; a GRU's and an unfused LSTM's states are sums with the
    state before, and keep the promoted type of both.
    """
    device = input.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None, None
    if any(t.dtype == torch.float64 for t in (input, h0, *weights)):
        return None, None  # autocast leaves these alone
    low = torch.get_autocast_dtype(device)
    if device == "cuda":
        return low, low
    promoted = torch.promote_types(h0.dtype, low)
    if cell.startswith("rnn") or (cell == "lstm" and padded and not projected):
        return low, low
    return (low if projected else promoted), promoted


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors as autocast casts them: weights once in its context."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return [t.to(dtype) for t in tensors]
    return _C.autocast_to(tensors, dtype)


def _autocast_dtypes(
    cell: str,
    padded: bool,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype that autocast has a network run in, and that of c_n if it differs; None if it has
    none.

    It is the lower precision where all results have that or a projection rounds them, else float32.
    """
    if not torch.is_autocast_enabled(input.device.type):
        return None, None
    h0, *rest = states
    c0 = rest[0] if rest else None
    projected = c0 is not None and c0.dim() == 3 and h0.dim() == 3 and c0.size(2) != h0.size(2)
    return _autocast(cell, padded, projected, h0, input, params)


_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PADDED = ("input", "hx", "params", *_OPTIONS, "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", *_OPTIONS)


def named(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torch.lstm and its like by name, in their order.

    Those of packed data have batch_sizes among them.
    """
    # The packed overload has batch_sizes, a tensor, where the other has hx (a pair, for an LSTM),
    # or hx where it has params.
    place = 1 if cell == "lstm" else 2
    packed = "batch_sizes" in kwargs or (len(args) > place and isinstance(args[place], Tensor))
    names = _PACKED if packed else _PADDED
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs) or set(given) != set(names):
        raise TypeError(
            f"{cell}() expects the arguments {', '.join(names)}, "
            f"got {len(args)} by position and {list(kwargs)}"
        )
    return {name: given[name] for name in names}


def network_of(
    cell: str, given: dict[str, Any], recompute: bool = False
) -> tuple[Network, Tensor, Sequence[Tensor]]:
    """The network that `named` arguments describe, its input [T, B, I] or [N, I], and its states.

    Raises:
        TypeError, RuntimeError: torch's own where the states are not tensors, two for an LSTM.
    """
    hx = given["hx"]
    states = hx if cell == "lstm" else (hx,)
    if not _are_states(states, 2 if cell == "lstm" else 1):
        _raise_as_torch(getattr(torch, cell), *given.values())
        raise RuntimeError(
            f"{cell} expects {'two hidden states' if cell == 'lstm' else 'a tensor'}"
        )
    network = Network(cell, **{name: given[name] for name in _OPTIONS}, recompute=recompute)
    input = given["data"] if "data" in given else given["input"]
    if _is_batch_first(given):
        input = input.transpose(0, 1)
    return network, input, states


def _are_states(states: Any, count: int) -> bool:
    return (
        isinstance(states, list | tuple)
        and len(states) == count
        and all(isinstance(state, Tensor) for state in states)
    )


def _is_batch_first(given: dict[str, Any]) -> bool:
    return bool(given.get("batch_first")) and given["input"].dim() == 3


def _layer(
    cell: str, args: tuple[Any, ...], kwargs: dict[str, Any], recompute: bool = False
) -> Any:
    if _modes_active():
        function = getattr(recomputing, cell) if recompute else globals()[cell]
        return torch.overrides.handle_torch_function(function, (), *args, **kwargs)
    given = named(cell, args, kwargs)
    data: Tensor = given["data"] if "data" in given else given["input"]
    batch_sizes: Tensor | None = given.get("batch_sizes")
    why = _why_torch(data)
    if why is not None:
        return _by_torch(getattr(torch, cell), why, *given.values())
    network, input, states = network_of(cell, given, recompute)
    try:
        return _layer_results(network, input, batch_sizes, states, given)
    except (RuntimeError, ValueError, IndexError) as error:
        if _transforms_active() or (batch_sizes is not None and not _is_sound(batch_sizes, data)):
            raise
        refused = error
    return _torchs_answer(getattr(torch, cell), refused, *given.values())


def _layer_results(
    network: Network,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    given: dict[str, Any],
) -> tuple[Tensor, ...]:
    params: Sequence[Tensor] = given["params"]
    dtype, c_dtype = _autocast_dtypes(network.cell, batch_sizes is None, input, states, params)
    found = None
    if not torch.compiler.is_compiling():
        n = network
        found = _C.network(
            n.cell, input, states if len(states) == 2 else states[0], params, batch_sizes,
            (n.has_biases, n.num_layers, n.bidirectional, n.dropout), n.train, n.recompute, dtype,
        )  # fmt: skip
    if found is None:
        if dtype is not None:
            input, *states = _cast([input, *states], dtype)
            params = _cast(params, dtype)
        h0, *c0 = states
        found = run(network, input, h0, c0[0] if c0 else None, params, batch_sizes)
    output, h_n, *c_n = found[: 1 + len(states)]
    if _is_batch_first(given):
        output = output.transpose_(0, 1)  # in place, as torch's: no view, which refuses detach_()
    return output, h_n, *(c if c_dtype is None else c.to(c_dtype) for c in c_n)


def _transforms_active() -> bool:
    """Whether a transform of torch.func is active: torch's functions would raise for that alone."""
    return bool(torch._C._are_functorch_transforms_active())


def _is_sound(batch_sizes: Tensor, data: Tensor) -> bool:
    """Whether torch's functions can be given these batch_sizes.

    They read out of bounds on some others.
    """
    if (
        batch_sizes.device.type != "cpu"
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
    ):
        return False
    sizes = batch_sizes.tolist()
    return (
        bool(sizes)
        and sizes == sorted(sizes, reverse=True)
        and sizes[-1] >= 0
        and sum(sizes) == len(data)
    )


def _raise_as_torch(function: Callable[..., Any], *args: Any) -> None:
    """Raise what torch's function says of arguments that ours refused.

    Its texts depend on torch's version and on the kernel it would have chosen. It returns None
    where torch takes them, and inside transforms, where torch's function would say that of them.
    """
    if _transforms_active():
        return
    with torch.no_grad():
        try:
            function(*args)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            raise error from None


def _torchs_answer(function: Callable[..., Any], refused: Exception, *args: Any) -> Any:
    """What torch's function makes of arguments that ours refused: its error, or its results.

    Sizes of 0 are such, and weights of a layout without kernels.
    """
    try:
        return _by_torch(function, "of arguments without kernels", *args)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        _log.debug("refused: %s", refused)
        raise error from None


_Three = tuple[Tensor, Tensor, Tensor]
_Two = tuple[Tensor, Tensor]


@overload
def lstm(
    input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> _Three: ...  # fmt: skip
@overload
def lstm(
    data: Tensor, batch_sizes: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor],
    has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> _Three: ...  # fmt: skip
@one_node
def lstm(*args: Any, **kwargs: Any) -> Any:
    """torch.lstm: a long short-term memory network.

    Args:
        input: [T, B, I], or [B, T, I] if batch_first; or `data` [N, I] with `batch_sizes` [T], as
            in a PackedSequence.
        hx: (h0 [L*D, B, H or P], c0 [L*D, B, H]).
        params, has_biases, num_layers, dropout, train, bidirectional: see the top of this module.

    Returns:
        output [T, B, D*(H or P)] (or [B, T, ...], or [N, ...]), h_n and c_n shaped as h0 and c0.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit, with torch's text where torch
        has one.
    """
    return _layer("lstm", args, kwargs)


@overload
def gru(
    input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> _Two: ...  # fmt: skip
@overload
def gru(
    data: Tensor, batch_sizes: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> _Two: ...  # fmt: skip
@one_node
def gru(*args: Any, **kwargs: Any) -> Any:
    """torch.gru: gated recurrent units.

    Shapes and errors as for `lstm`, with hx = h0 [L*D, B, H]; returns output and h_n.
    """
    return _layer("gru", args, kwargs)


@overload
def rnn_tanh(
    input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> _Two: ...  # fmt: skip
@overload
def rnn_tanh(
    data: Tensor, batch_sizes: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> _Two: ...  # fmt: skip
@one_node
def rnn_tanh(*args: Any, **kwargs: Any) -> Any:
    """torch.rnn_tanh: an Elman network with tanh.

    Shapes and errors as for `lstm`, with hx = h0 [L*D, B, H]; returns output and h_n.
    """
    return _layer("rnn_tanh", args, kwargs)


@overload
def rnn_relu(
    input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> _Two: ...  # fmt: skip
@overload
def rnn_relu(
    data: Tensor, batch_sizes: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> _Two: ...  # fmt: skip
@one_node
def rnn_relu(*args: Any, **kwargs: Any) -> Any:
    """torch.rnn_relu: an Elman network with relu.

    Shapes and errors as for `lstm`, with hx = h0 [L*D, B, H]; returns output and h_n.
    """
    return _layer("rnn_relu", args, kwargs)


recomputing = types.SimpleNamespace(
    lstm=lambda *args, **kwargs: _layer("lstm", args, kwargs, recompute=True),
    gru=lambda *args, **kwargs: _layer("gru", args, kwargs, recompute=True),
    rnn_tanh=lambda *args, **kwargs: _layer("rnn_tanh", args, kwargs, recompute=True),
    rnn_relu=lambda *args, **kwargs: _layer("rnn_relu", args, kwargs, recompute=True),
)
"""The same functions of layers, but backward computes the gates again instead of keeping them."""


def network_of_cell(
    name: str, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Network, Sequence[Tensor]]:
    """The network of one step that a cell is, and its weights."""
    params = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        zeros = w_ih.new_zeros(w_ih.size(0))
        params += [zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh]
    return Network(name, len(params) == 4, 1, 0.0, False, False), params


def _cell(
    name: str,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Any:
    """One step as a network of one step: the new h, or the new h and c."""
    if not torch.compiler.is_compiling():
        if torch._C._is_torch_function_mode_enabled():
            function = globals()[f"{name}_cell"]
            return torch.overrides.handle_torch_function(
                function, (), input, hx, w_ih, w_hh, b_ih, b_hh
            )
        found = _C.step(name, input, hx, (w_ih, w_hh, b_ih, b_hh), None)
        if found is not None:
            return found
    torchs = getattr(torch, f"{name}_cell")
    arguments = (input, hx, w_ih, w_hh, b_ih, b_hh)
    why = _why_torch(input)
    if why is not None:
        return _by_torch(torchs, why, *arguments)
    states = (hx,) if isinstance(hx, Tensor) else hx
    if not _are_states(states, 2 if name == "lstm" else 1):
        _raise_as_torch(torchs, *arguments)
        raise RuntimeError(f"{name}_cell expects {'two hidden states' if name == 'lstm' else 'hx'}")
    try:
        return _cell_results(name, input, states, (w_ih, w_hh, b_ih, b_hh))
    except (RuntimeError, ValueError, IndexError) as error:
        if _transforms_active():
            raise
        refused = error
    return _torchs_answer(torchs, refused, *arguments)


def _cell_results(
    name: str, input: Tensor, states: Sequence[Tensor], weights: tuple[Any, Any, Any, Any]
) -> Any:
    network, params = network_of_cell(name, *weights)
    dtype, _ = _autocast_dtypes(name, False, input, states, params)  # c has the dtype of h
    if dtype is not None:
        if not torch.compiler.is_compiling():
            hx = states if len(states) == 2 else states[0]
            found = _C.step(name, input, hx, params, dtype)
            if found is not None:
                return found
        input, *states = _cast([input, *states], dtype)
        params = _cast(params, dtype)
    h0, *c0 = (s.unsqueeze(0) for s in states)
    _, *last = run(network, input.unsqueeze(0), h0, c0[0] if c0 else None, params, None)
    last = last[: len(states)]
    if torch._C._get_tracing_state() is not None:  # by which a Python number is frozen: the batch
        h, *c = (t.squeeze(0) for t in last)
    else:  # no views to autograd, as torch's cells return none
        h, *c = (torch.ops.aten._unsafe_view(t, t.shape[1:]) for t in last)
    return (h, *c) if c else h


@one_node
def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.lstm_cell: one step from input [B, I] and hx (h [B, H], c [B, H]) to new h and c."""
    return _cell("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]


@one_node
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.gru_cell: one step from input [B, I] and hx [B, H] to the new h."""
    return _cell("gru", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]


@one_node
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.rnn_tanh_cell: one step from input [B, I] and hx [B, H] to the new h."""
    return _cell("rnn_tanh", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]


@one_node
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.rnn_relu_cell: one step from input [B, I] and hx [B, H] to the new h."""
    return _cell("rnn_relu", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]
