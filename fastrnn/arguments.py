"""The arguments of torch.lstm, torch.lstm_cell and their like, as a network and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.fallback import raise_as_torch
from fastrnn.network import Network
from fastrnn.registered import CELLS

_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PADDED = ("input", "hx", "params", *_OPTIONS, "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", *_OPTIONS)


def bind_layer(cell: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torch.lstm and its like by name, in their order.

    Those of the packed overload include batch_sizes.

    Raises:
        TypeError: if any is missing, unknown or given twice.
    """
    # The packed overload has batch_sizes, a tensor, where the other has hx (a pair, for an LSTM),
    # or hx where it has params.
    place = 1 if cell == "lstm" else 2
    packed = "batch_sizes" in kwargs or (len(args) > place and isinstance(args[place], Tensor))
    names = _PACKED if packed else _PADDED
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(arguments) != len(args) + len(kwargs) or set(arguments) != set(names):
        raise TypeError(
            f"{cell}() expects the arguments {', '.join(names)}, "
            f"got {len(args)} by position and {list(kwargs)}"
        )
    return {name: arguments[name] for name in names}


def is_batch_first(arguments: dict[str, Any]) -> bool:
    return bool(arguments.get("batch_first")) and arguments["input"].dim() == 3


def parse_layer(
    cell: str, arguments: dict[str, Any], **options: bool
) -> tuple[Network, Tensor, Sequence[Tensor]]:
    """The network, its input [T, B, I] or [N, I], and its states.

    Args:
        options: fields of `Network` for which torch's signatures have no argument.

    Raises:
        TypeError, RuntimeError: as torch does where the states are not tensors, two for an LSTM.
    """
    hx = arguments["hx"]
    states = hx if cell == "lstm" else (hx,)
    if not _are_states(cell, states):
        raise_as_torch(getattr(torch, cell), *arguments.values())
        raise RuntimeError(
            f"{cell} expects {'two hidden states' if cell == 'lstm' else 'a tensor'}"
        )
    network = Network(cell, **{name: arguments[name] for name in _OPTIONS}, **options)
    input = arguments["data"] if "data" in arguments else arguments["input"]
    if is_batch_first(arguments):
        # torch's layers copy it too: the user's tensor may be overwritten before backward.
        input = input.transpose(0, 1).contiguous()
    return network, input, states


def cell_states(cell: str, input: Tensor, hx: Any, *weights: Tensor | None) -> Sequence[Tensor]:
    """The states in the arguments of torch.lstm_cell and its like: h [B, H], and c of an LSTM.

    Raises:
        TypeError, RuntimeError: as torch does where the states are not tensors, two for an LSTM, or
            a weight is no tensor.
    """
    states = (hx,) if isinstance(hx, Tensor) else hx
    if not _are_states(cell, states) or not all(
        isinstance(w, Tensor) or (w is None and i > 1) for i, w in enumerate(weights)
    ):
        raise_as_torch(getattr(torch, f"{cell}_cell"), input, hx, *weights)
        count = "two hidden states" if cell == "lstm" else "hx"
        raise RuntimeError(f"{cell}_cell expects {count} and weights that are tensors")
    return states


def parse_cell(
    cell: str, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Network, Sequence[Tensor]]:
    """The network of one step, and its weights: zeros for a bias that is missing."""
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        zeros = w_ih.new_zeros(w_ih.size(0))
        weights += [zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh]
    return Network(cell, len(weights) == 4, num_layers=1, bidirectional=False, dropout=0.0), weights


def _are_states(cell: str, states: Any) -> bool:
    return (  # not `list | tuple`, which Dynamo does not trace before torch 2.7
        isinstance(states, (list, tuple))
        and len(states) == CELLS[cell]["states"]
        and all(isinstance(state, Tensor) for state in states)
    )
