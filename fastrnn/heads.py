"""Layers whose W_hh is block-diagonal: each block, a head, is a network of its own.

A head of H/heads units reads the layer's whole input, and of h_{t-1} only its own units. So a layer
is computed as that many networks by one call of the operator, which runs them on different threads
(fastrnn/ops.py has calls of several models):

    weight_ih [G*H, I]   ->  [heads, G*H/heads, I]        rows by gate, then by head
    h0 [D, B, H]         ->  [heads, D, B, H/heads]
    output [T, B, D*H]   <-  [heads, T, B, D*H/heads], and D*C with all states

The next layer reads all heads of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn import autocast, ops, reference
from fastrnn.fallback import count as count_fallback
from fastrnn.network import Network, is_padded

if TYPE_CHECKING:
    from fastrnn.own_modules import Layer, Step


def results(
    module: Layer | Step,
    network: Network,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """output [T, B, D*H] or [N, D*H], wider with all states, and the last states [L*D, B, H].

    Args:
        module: of a cell with ``recurrent="heads"``.
        network: what the layer would be if W_hh were dense.
        x: [T, B, I], or packed [N, I] with `batch_sizes`.
        states: [L*D, B, H] each.
    """
    from fastrnn.define import why_no_kernels

    definition = module.definition
    weights = _weights(module)
    dtype, c_dtype = autocast.dtypes(network.cell, is_padded(batch_sizes), x, states, weights)
    if dtype is not None:
        x, *states = autocast.cast([x, *states], dtype)
        weights = autocast.cast(weights, dtype)
    missing = why_no_kernels(definition.key, x.dtype, x.device.type)
    if missing is not None:
        count_fallback(f"{definition.name} {missing}", "its definition runs step by step")
    D, last = network.directions, []
    for layer, of_layer in enumerate(_by_head(module, network, weights)):
        if layer > 0 and network.drops:
            x = F.dropout(x, network.dropout)
        own = [state[layer * D : (layer + 1) * D] for state in states]
        returns = network.return_states and layer + 1 == network.num_layers
        one = _of_one_layer(network, returns)
        x, *of_heads = _layer(one, x, batch_sizes, own, of_layer, missing is None)
        last.append(of_heads)
    h_n, *c_n = (torch.cat(of_layers) for of_layers in zip(*last, strict=True))
    return x, h_n, *(c if c_dtype is None else c.to(c_dtype) for c in c_n)


def first_head(
    module: Layer | Step, x: Tensor, states: Sequence[Tensor]
) -> tuple[Network, Tensor, list[Tensor], list[Tensor]]:
    """The network of the first head of the first layer, and its input, states and weights."""
    network = module.network()
    own = [state[: network.directions].chunk(module.heads, dim=-1)[0] for state in states]
    weights = next(_by_head(module, network, _weights(module)))
    return _of_one_layer(network, return_states=False), x, own, [weight[0] for weight in weights]


def _of_one_layer(network: Network, return_states: bool) -> Network:
    # Not _replace, which torch.compile does not trace in torch 2.6.
    return Network(
        network.cell,
        network.has_biases,
        num_layers=1,
        bidirectional=network.bidirectional,
        dropout=0.0,
        return_states=return_states,
        recompute=network.recompute,
    )


def _weights(module: Any) -> list[Tensor]:
    return list(module._flat_weights if hasattr(module, "_flat_weights") else module.weights)


def _by_head(
    module: Layer | Step, network: Network, weights: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """The weights of each layer, with a first dimension of heads."""
    heads = module.heads
    per_layer = len(weights) // network.num_layers
    per_direction = per_layer // network.directions

    def by_head(i: int, weight: Tensor) -> Tensor:
        if i % per_direction == 1:  # weight_hh, which has heads
            return weight
        gates = weight.size(0) // module.hidden_size  # 1 of a vector
        of_gates = weight.view(gates, heads, -1, *weight.shape[1:])
        return of_gates.transpose(0, 1).flatten(1, 2)

    for first in range(0, len(weights), per_layer):
        yield [by_head(i, w) for i, w in enumerate(weights[first : first + per_layer])]


def _layer(
    network: Network,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_kernels: bool,
) -> tuple[Tensor, ...]:
    """output and the last states of a network of one layer, whose weights are by head."""
    heads, count = weights[1].size(0), len(states) - 1
    h0, *others = (state.unflatten(-1, (heads, -1)).movedim(-2, 0) for state in states)
    c0 = torch.cat(others, dim=-1) if others else None
    found: Sequence[Tensor | None]
    if has_kernels:
        found = ops.run(network, x.expand(heads, *x.shape), h0, c0, weights, batch_sizes)
    else:
        options = network._asdict()
        del options["train"], options["recompute"]
        each = [
            reference.run(
                input=x, h0=h0[head], c0=None if c0 is None else c0[head],
                weights=[weight[head] for weight in weights], batch_sizes=batch_sizes, **options,
            )
            for head in range(heads)
        ]  # fmt: skip
        found = [
            None if of_all[0] is None else torch.stack(of_all) for of_all in zip(*each, strict=True)
        ]
    output, h_n, c_n = found
    assert output is not None
    assert h_n is not None
    # h of each direction, and with all states c of each, is H/heads wide.
    output = output.unflatten(-1, (-1, h0.size(-1))).movedim(0, -2).flatten(-3)
    c = [] if c_n is None or count == 0 else c_n.chunk(count, dim=-1)
    return output, *(state.movedim(0, -2).flatten(-2) for state in (h_n, *c))
