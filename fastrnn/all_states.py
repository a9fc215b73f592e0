"""`return_states=True`: layers that return the states of all steps, not only the last.

    output, hx, states = layer(input, hx, return_states=True)

``states`` is a tuple of the states besides h, of the last layer after every step: ``(c,)`` of an
LSTM, with c [T, B, D*H] in the layout of the output, ``()`` of a GRU or RNN, and of a cell of one's
own each in the order of its definition. They are PackedSequences where the input is one. Gradients
reach the layer through all of them.

output and states are parts of the rows of one tensor, so ``output.view(-1, D*H)`` may need to be
``output.reshape(-1, D*H)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import segments
from fastrnn.fallback import transforms_active
from fastrnn.symbolic import call_of_module


def call(
    forward: Callable[..., Any],
    wide: Callable[..., Any],
    layer: nn.RNNBase,
    input: Any,
    hx: Any,
    initial: Sequence[float] = (),
    *,
    resets: Any,
    lengths: Any,
    return_states: bool,
) -> Any:
    """What a layer's forward returns if any of these options is given.

    Args:
        forward: the layer's, without subclasses' code.
        wide: ``wide(layer, input, hx, events=None, return_states=False)`` returns the output and
            the last states, with rows of the output as wide as those of the operator.
        initial, resets, lengths: as in `fastrnn.segments.call`.

    Raises:
        NotImplementedError: where this build has no kernels for the input.
    """
    options = {"resets": resets, "lengths": lengths}
    given = {name: value for name, value in options.items() if value is not None}
    all_given = {**given, "return_states": True} if return_states else given
    node = call_of_module(forward, layer, input, hx, **all_given)
    if node is not None:
        return node
    if given:

        def of_segments(layer: Any, input: Any, hx: Any, events: Tensor | None = None) -> Any:
            return wide(layer, input, hx, events=events, return_states=return_states)

        output, last = segments.call(of_segments, layer, input, hx, initial, resets, lengths)
    else:
        output, last = wide(layer, input, hx, return_states=True)
    if not return_states:
        return output, last
    count = 0 if isinstance(last, Tensor) else len(last) - 1
    directions = 2 if layer.bidirectional else 1
    if not isinstance(output, PackedSequence):
        output, *states = split(output, directions, layer.hidden_size, count)
        return output, last, tuple(states)
    parts = split(output.data, directions, layer.hidden_size, count)
    packed, *packed_states = (PackedSequence(part, *output[1:]) for part in parts)
    return packed, last, tuple(packed_states)


def split(output: Tensor, directions: int, hidden_size: int, count: int) -> list[Tensor]:
    """The output [..., D*R], and `count` states [..., D*H], from rows of the operator's output.

    ::

        | h, D*R | states of the first direction, count*H | of the second |
    """
    if count == 0:
        return [output]
    width = directions * count * hidden_size
    sizes = [output.size(-1) - width, width]
    if torch.compiler.is_compiling() or transforms_active():  # vmap has no rule for the other
        output, all_states = output.narrow(-1, 0, sizes[0]), output.narrow(-1, sizes[0], width)
    else:  # one node of autograd; unlike those of split, its results may be written to in place
        output, all_states = torch.unsafe_split_with_sizes(output, sizes, dim=-1)
    if count == 1:
        return [output, all_states]
    each = all_states.unflatten(-1, (directions, count, hidden_size)).unbind(-2)
    return [output, *(state.flatten(-2) for state in each)]
