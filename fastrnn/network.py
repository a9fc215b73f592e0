"""What a network is besides its tensors, and the arguments of the operators by name.

The schemas in C++ name the operators' arguments and give their order. Python reads both from there:
code that an operator is called with takes a `Network` and tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import _C as _C  # which registers the operators


class Network(NamedTuple):
    """The options of a network, in the order of the operators' arguments, as C++ reads them too."""

    cell: str
    """A name in `fastrnn.CELLS`."""
    has_biases: bool
    num_layers: int
    bidirectional: bool
    dropout: float  # no default: torch.compile would make it an input of the graph
    """The probability of zeroing an output between two layers, if `train`."""
    return_states: bool = False
    """Whether a row of the output ends with c_t of the last layer: [T, B, D*R + D*C]."""
    train: bool = False
    recompute: bool = False
    """Whether only the outputs are saved for backward, which computes the gates again."""

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def drops(self) -> bool:
        """Whether there is a dropout mask."""
        return self.train and self.dropout > 0 and self.num_layers > 1


_TYPES = {"str": str, "bool": bool, "int": int, "float": float}
_REQUIRED = inspect.Parameter.empty


@functools.cache
def signature(operator: Any) -> inspect.Signature:
    """The signature of an operator, with types of what is not a tensor."""
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else _REQUIRED,
                annotation=_TYPES.get(str(argument.type), Any),
            )
            for argument in operator._schema.arguments
        ]
    )


def bind(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Network, dict[str, Any]]:
    """The network that a call of an operator is of, and its other arguments by name."""
    bound = signature(operator).bind(*args, **kwargs)
    bound.apply_defaults()
    others = bound.arguments
    options = {name: others.pop(name) for name in Network._fields if name in others}
    return Network(**options), others


def is_padded(batch_sizes: Tensor | None) -> bool:
    """Whether the input is padded, as the argument `batch_sizes` says, which may be events."""
    return batch_sizes is None or batch_sizes.dim() > 1


def of_model(batch_sizes: Tensor | None, model: int) -> Tensor | None:
    """Those of one of several models, which share them unless they are events of each."""
    if batch_sizes is None or batch_sizes.dim() < 3:
        return batch_sizes
    return batch_sizes[model]


_VALUES = ("input", "h0", "c0", "weights", "batch_sizes", "keep", *Network._fields)
_ORDER = [_VALUES.index(name) for name in signature(torch.ops.fastrnn.forward.default).parameters]


def forward_arguments(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> list[Any]:
    """The arguments of the operator `forward`, in its order.

    `keep` is false: it is autograd's, which calls the operator again to save tensors for backward.
    """
    values = (input, h0, c0, weights, batch_sizes, False, *network)  # as in _VALUES
    return [values[i] for i in _ORDER]
