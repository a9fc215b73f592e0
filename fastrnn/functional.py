"""Stateless networks: torch.lstm, gru, rnn_tanh, rnn_relu and their cells, by fused kernels.

Each function has torch's signatures. Sizes: T steps, B batch, N rows of packed data, I input, H
hidden, P projection (`proj_size`), L layers, D directions (2 if `bidirectional`), G gates (4 for an
LSTM, 3 for a GRU, 1 for an RNN).

`params` is a flat list, for each layer and direction: weight_ih [G*H, I or D*H], weight_hh [G*H,
H], then bias_ih [G*H] and bias_hh [G*H] if `has_biases`, then weight_hr [P, H] if there is a
projection; then weight_hh is [G*H, P], and the weight_ih of upper layers [G*H, D*P]. All tensors
have the same dtype: float32, float64, bfloat16 or float16. The 16-bit dtypes compute in float32 and
round h_t at each step.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastrnn import _C, autocast, distributed
from fastrnn.arguments import bind_layer, cell_states, is_batch_first, parse_cell, parse_layer
from fastrnn.fallback import (
    answer_as_torch,
    are_valid,
    call_torch,
    missing_kernels,
    raise_as_torch,
    transforms_active,
)
from fastrnn.network import Network
from fastrnn.ops import run
from fastrnn.symbolic import call_of_function, one_node


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
    return_states: bool = False,
    train: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A network of any registered cell.

    Args:
        cell: a name in `fastrnn.CELLS`.
        input: [T, B, I], or packed data [N, I] with `batch_sizes`.
        h0: [L*D, B, H or P].
        c0: [L*D, B, H] for a cell with c, else None.
        weights: a flat list, as `params` above.
        batch_sizes: [T] int64 on the CPU, non-increasing, as in a PackedSequence. Or for padded
            input events, as `fastrnn.reference.run` takes them.
        dropout: the probability of zeroing an output between two layers, if `train`.
        return_states: whether a row of the output ends with c_t of the last layer, of a cell with
            c: first [H] of the forward direction (S*H of a cell with S states besides h).
            `fastrnn.all_states.split` takes it apart.
        recompute: whether to save only the layers' outputs for backward, which computes the gates
            again: a fraction of the memory, at the cost of another forward pass.

    Returns:
        output [T, B, D*(H or P)] or [N, D*(H or P)], wider with `return_states`; h_n and c_n (None
        for a cell without c), shaped as h0 and c0.

    Raises:
        ValueError, RuntimeError: as torch's layers do, naming what was wrong and what was expected.
    """
    network = Network(
        cell,
        has_biases=has_biases,
        num_layers=num_layers,
        bidirectional=bidirectional,
        dropout=dropout,
        return_states=return_states,
        train=train,
        recompute=recompute,
    )
    output, h_n, c_n = run(network, input, h0, c0, weights, batch_sizes)
    return output, h_n, None if c0 is None else c_n


# ---- layers --------------------------------------------------------------------------------------


def _modes_active() -> bool:
    """Whether a TorchFunctionMode is to see a call: once, as it would torch's, not its parts."""
    return not torch.compiler.is_compiling() and torch._C._is_torch_function_mode_enabled()


def _layer(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any], **options: bool) -> Any:
    if _modes_active():
        function = getattr(WITH_OPTIONS[tuple(options)], cell) if options else globals()[cell]
        return _C.call_mode(function, args, kwargs)
    arguments = bind_layer(cell, args, kwargs)
    data: Tensor = arguments["data"] if "data" in arguments else arguments["input"]
    batch_sizes: Tensor | None = arguments.get("batch_sizes")
    missing = missing_kernels(data)
    if missing is not None:
        if options.get("return_states"):
            raise NotImplementedError(
                f"return_states: this build of fastrnn has no kernels {missing}, and torch's "
                "return the last states only"
            )
        return call_torch(getattr(torch, cell), missing, *arguments.values())
    network, input, states = parse_layer(cell, arguments, **options)
    try:
        params = arguments["params"]
        dtypes = autocast.dtypes(cell, batch_sizes is None, input, states, params)
        results = network_results(network, input, batch_sizes, states, params, dtypes)
        return _in_layout(results, is_batch_first(arguments), options.get("return_states", False))
    except (RuntimeError, ValueError, IndexError) as error:
        if transforms_active() or (batch_sizes is not None and not are_valid(batch_sizes, data)):
            raise
        if options.get("return_states"):  # of which torch's results would have none
            raise_as_torch(getattr(torch, cell), *arguments.values())
            raise
        refused = error
    return answer_as_torch(getattr(torch, cell), refused, *arguments.values())


def network_results(
    network: Network,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor, ...]:
    """output [T, B, D*R] or [N, D*R], and the last states; `dtypes` are autocast's."""
    dtype, c_dtype = dtypes
    results = None
    if not torch.compiler.is_compiling():
        hx = states if len(states) == 2 else states[0]
        results = _C.network(network, input, hx, params, batch_sizes, dtype)
    if results is None:
        if dtype is not None:
            input, *states = autocast.cast([input, *states], dtype)
            params = autocast.cast(params, dtype)
        h0, *c0 = states
        results = run(network, input, h0, c0[0] if c0 else None, params, batch_sizes)
    output, h_n, *c_n = results[: 1 + len(states)]
    return output, h_n, *(c if c_dtype is None else c.to(c_dtype) for c in c_n)


def _in_layout(
    results: tuple[Tensor, ...], batch_first: bool, is_split: bool
) -> tuple[Tensor, ...]:
    output, *last = results
    if batch_first:
        # In place as in torch, since a view refuses detach_(). DTensor has no transpose_, and
        # `all_states.split` makes views.
        if is_split or distributed.are_distributed([output]):
            output = output.transpose(0, 1)
        else:
            output = output.transpose_(0, 1)
    return output, *last


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
        input: [T, B, I], or [B, T, I] if `batch_first`; or packed `data` [N, I] and `batch_sizes`
            [T], int64 on the CPU, as in a PackedSequence.
        hx: (h0 [L*D, B, H or P], c0 [L*D, B, H]).
        params: the flat list of weights described above.
        has_biases: whether it has biases.
        num_layers: the number of layers, L.
        dropout: the probability of zeroing an output between two layers, if `train`.
        train: whether dropout is applied.
        bidirectional: whether each layer also has a direction from the last step to the first.
        batch_first: whether `input` and the output are [B, T, ...]; not for packed data.

    Returns:
        output [T, B, D*(H or P)] (or [B, T, ...], or [N, ...]), h_n and c_n shaped as h0 and c0.

    Raises:
        RuntimeError: if sizes, dtypes or devices do not fit, as torch.lstm does.
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

    Arguments and errors are those of `lstm`, with hx = h0 [L*D, B, H].

    Returns:
        output [T, B, D*H] (or [B, T, ...], or [N, ...]), and h_n shaped as h0.
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

    Arguments and errors are those of `lstm`, with hx = h0 [L*D, B, H].

    Returns:
        output [T, B, D*H] (or [B, T, ...], or [N, ...]), and h_n shaped as h0.
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

    Arguments and errors are those of `lstm`, with hx = h0 [L*D, B, H].

    Returns:
        output [T, B, D*H] (or [B, T, ...], or [N, ...]), and h_n shaped as h0.
    """
    return _layer("rnn_relu", args, kwargs)


# The functions of layers with options of `rnn` for which torch's signatures have no argument. With
# `return_states` the output is as wide as that of `rnn`. Without closures and attributes: Dynamo
# would guard on those of the functions above, which have the same names.
recomputing = types.SimpleNamespace(
    lstm=lambda *args, **kwargs: _layer("lstm", args, kwargs, recompute=True),
    gru=lambda *args, **kwargs: _layer("gru", args, kwargs, recompute=True),
    rnn_tanh=lambda *args, **kwargs: _layer("rnn_tanh", args, kwargs, recompute=True),
    rnn_relu=lambda *args, **kwargs: _layer("rnn_relu", args, kwargs, recompute=True),
)
with_states = types.SimpleNamespace(
    lstm=lambda *args, **kwargs: _layer("lstm", args, kwargs, return_states=True),
    gru=lambda *args, **kwargs: _layer("gru", args, kwargs, return_states=True),
    rnn_tanh=lambda *args, **kwargs: _layer("rnn_tanh", args, kwargs, return_states=True),
    rnn_relu=lambda *args, **kwargs: _layer("rnn_relu", args, kwargs, return_states=True),
)
recomputing_with_states = types.SimpleNamespace(
    lstm=lambda *args, **kwargs: _layer("lstm", args, kwargs, recompute=True, return_states=True),
    gru=lambda *args, **kwargs: _layer("gru", args, kwargs, recompute=True, return_states=True),
    rnn_tanh=lambda *args, **kwargs: _layer(
        "rnn_tanh", args, kwargs, recompute=True, return_states=True
    ),
    rnn_relu=lambda *args, **kwargs: _layer(
        "rnn_relu", args, kwargs, recompute=True, return_states=True
    ),
)
WITH_OPTIONS = {
    ("recompute",): recomputing,
    ("return_states",): with_states,
    ("recompute", "return_states"): recomputing_with_states,
}


# ---- cells ---------------------------------------------------------------------------------------


def _cell(
    name: str,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    *weights: Tensor | None,
) -> Any:
    """One step, as a network of one step: the new h, or the new h and c."""
    if not torch.compiler.is_compiling():
        if torch._C._is_torch_function_mode_enabled():
            function = globals()[f"{name}_cell"]
            return _C.call_mode(function, (input, hx, *weights), {})
        results = _C.step(name, input, hx, weights, None)
        if results is None:  # the node of a graph that is being traced, or None
            results = call_of_function(globals()[f"{name}_cell"], input, hx, *weights)
        if results is not None:
            return results
    function = getattr(torch, f"{name}_cell")
    missing = missing_kernels(input)
    if missing is not None:
        return call_torch(function, missing, input, hx, *weights)
    states = cell_states(name, input, hx, *weights)
    try:
        return cell_results(name, input, states, weights)
    except (RuntimeError, ValueError, IndexError) as error:
        if transforms_active():
            raise
        refused = error
    return answer_as_torch(function, refused, input, hx, *weights)


def cell_results(name: str, input: Tensor, states: Sequence[Tensor], weights: Sequence[Any]) -> Any:
    tensors = [w for w in weights if w is not None]
    dtype, _ = autocast.dtypes(name, False, input, states, tensors)  # c has the dtype of h
    if dtype is not None and not torch.compiler.is_compiling():
        hx = states if len(states) == 2 else states[0]
        results = _C.step(name, input, hx, weights, dtype)
        if results is not None:
            return results
    network, params = parse_cell(name, *weights)
    if dtype is not None:
        input, *states = autocast.cast([input, *states], dtype)
        params = autocast.cast(params, dtype)
    h0, *c0 = (s.unsqueeze(0) for s in states)
    _, *last = run(network, input.unsqueeze(0), h0, c0[0] if c0 else None, params, None)
    last = last[: len(states)]
    if torch._C._get_tracing_state() is not None:  # by which a Python number is frozen: the batch
        h, *c = (t.squeeze(0) for t in last)
    else:  # no views to autograd, as torch's cells return none
        h, *c = (torch.ops.aten._unsafe_view(t, t.shape[1:]) for t in last)
    return (h, *c) if c else h


def call_cell(name: str, input: Tensor, hx: Any, weights: Sequence[Any]) -> Any:
    """What torch's forward does after its checks, with weights that were already read."""
    function = globals()[f"{name}_cell"]
    if input.dim() == 2:
        return function(input, hx, *weights)
    h0, *c0 = (s.unsqueeze(0) for s in (hx if isinstance(hx, tuple | list) else [hx]))
    result = function(input.unsqueeze(0), (h0, *c0) if c0 else h0, *weights)
    return tuple(s.squeeze(0) for s in result) if c0 else result.squeeze(0)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.lstm_cell: one step of an LSTM.

    Args:
        input: [B, I].
        hx: (h [B, H], c [B, H]).
        w_ih: [4*H, I].
        w_hh: [4*H, H].
        b_ih, b_hh: [4*H] each, or None.

    Returns:
        The new h and c, shaped as hx.

    Raises:
        RuntimeError: if sizes, dtypes or devices do not fit, as torch.lstm_cell does.
    """
    return _cell("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.gru_cell: one step of a GRU.

    Args:
        input: [B, I].
        hx: h [B, H].
        w_ih: [3*H, I].
        w_hh: [3*H, H].
        b_ih, b_hh: [3*H] each, or None.

    Returns:
        The new h, shaped as hx.

    Raises:
        RuntimeError: if sizes, dtypes or devices do not fit, as torch.gru_cell does.
    """
    return _cell("gru", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.rnn_tanh_cell: one step of an Elman network with tanh.

    Args:
        input: [B, I].
        hx: h [B, H].
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih, b_hh: [H] each, or None.

    Returns:
        The new h, shaped as hx.

    Raises:
        RuntimeError: if sizes, dtypes or devices do not fit, as torch.rnn_tanh_cell does.
    """
    return _cell("rnn_tanh", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.rnn_relu_cell: one step of an Elman network with relu.

    Args:
        input: [B, I].
        hx: h [B, H].
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih, b_hh: [H] each, or None.

    Returns:
        The new h, shaped as hx.

    Raises:
        RuntimeError: if sizes, dtypes or devices do not fit, as torch.rnn_relu_cell does.
    """
    return _cell("rnn_relu", input, hx, w_ih, w_hh, b_ih, b_hh)  # type: ignore[no-any-return]
