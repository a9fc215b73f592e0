"""The operators `torch.ops.fastrnn.forward` and `.backward`, and a network as a call of `forward`.

One call of `forward` computes a whole network (all layers, both directions), one call of `backward`
its whole backward pass. Both check every argument in C++.

Weights with an additional first dimension are those of E models, and all other tensors except
batch_sizes have it too: input [E, T, B, I], weight_hh [E, G*H, R], output [E, T, B, D*R]. A tensor
that is empty for one model is empty for all. `vmap` over weights makes such calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn import distributed
from fastrnn.network import Network, forward_arguments

forward = torch.ops.fastrnn.forward.default
backward = torch.ops.fastrnn.backward.default


def run(
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of a network, differentiable any number of times.

    Args:
        input: [T, B, I], or packed data [N, I] with `batch_sizes`.
        h0: [L*D, B, R], where R is P with a projection and H without.
        c0: [L*D, B, C] for a cell with c, else None; C is H times its states besides h.
        weights: a flat list, as in `fastrnn.functional`.
        batch_sizes: [T] int64 on the CPU, non-increasing.

    Returns:
        output [T, B, D*R] or [N, D*R], h_n and c_n, which is empty for a cell without c.
    """
    if distributed.are_distributed([input, h0, c0, *weights]):
        return distributed.run_locally(run, network, input, h0, c0, weights, batch_sizes)
    output, h_n, c_n, *_ = forward(*forward_arguments(network, input, h0, c0, weights, batch_sizes))
    return output, h_n, c_n


def are_of_models(weights: Sequence[Tensor]) -> bool:
    """Whether these weights are those of several models."""
    return bool(weights) and weights[0].dim() == 3
