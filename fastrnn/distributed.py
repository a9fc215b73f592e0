"""Networks of DTensors: each process computes the sequences of the batch that it has.

Sharding rules of the operators can't express that: torch has none for results that are lists, and
the tensors saved for backward have the rows of all steps in one dimension. So the operators are
called with local tensors. Code that has DTensors has imported torch.distributed.tensor; fastrnn
does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.network import Network, is_padded
from fastrnn.when_imported import when_imported

_types: tuple[type, ...] = ()  # DTensor, once it is imported


def install() -> None:
    """Set the type DTensor now, or when torch.distributed.tensor is imported."""
    when_imported("torch.distributed.tensor", _set_types)


def _set_types(module: ModuleType) -> None:
    global _types
    _types = (module.DTensor,)


def are_distributed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of these is a DTensor."""
    return bool(_types) and any(isinstance(t, _types) for t in tensors)


_Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


def run_locally(
    run: _Run,
    network: Network,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``run`` on local tensors, as DTensors.

    In each dimension of the mesh, the batch is sharded if that of the input or of a state is, else
    replicated. Packed sequences and weights are replicated. Tensors of other placements are
    redistributed. Where the batch is sharded, the weights' gradients are partial sums. States that
    are plain tensors and require no gradient, like the zeros that torch's layers make, count as
    replicated.

    Args:
        run: `fastrnn.ops.run`, or a function of the same arguments.
        network, input, h0, c0, weights, batch_sizes: its arguments.

    Returns:
        output, h_n and c_n, sharded as the batch is.

    Raises:
        RuntimeError: as torch does, if any other tensor is plain.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    tensors: list[Any] = [input, h0, *([] if c0 is None else [c0]), *weights]
    count = len(tensors) - len(weights)  # of the tensors that have a batch
    mesh = next(t for t in tensors if isinstance(t, DTensor)).device_mesh
    replicated = [Replicate()] * mesh.ndim
    for i in range(1, count):
        if not isinstance(tensors[i], DTensor) and not tensors[i].requires_grad:
            tensors[i] = DTensor.from_local(tensors[i], mesh, replicated, run_check=False)
    if not all(isinstance(t, DTensor) for t in tensors):
        raise RuntimeError(
            "fastrnn got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to "
            "DTensor before calling distributed operators!"
        )
    sharded = [
        is_padded(batch_sizes) and any(t.placements[d] == Shard(1) for t in tensors[:count])
        for d in range(mesh.ndim)
    ]
    of_batch: list[Any] = [Shard(1) if yes else Replicate() for yes in sharded]
    of_sums: list[Any] = [Partial() if yes else Replicate() for yes in sharded]

    def local(t: Any, placements: list[Any], of_gradients: list[Any]) -> Tensor:
        if t.placements != tuple(placements):
            t = t.redistribute(mesh, placements)
        found: Tensor = t.to_local(grad_placements=of_gradients)
        return found

    x, h, *c = (local(t, of_batch, of_batch) for t in tensors[:count])
    local_weights = [local(t, replicated, of_sums) for t in tensors[count:]]
    if batch_sizes is not None and is_padded(batch_sizes):  # events, of which each row has its own
        events: Any = batch_sizes
        if not isinstance(events, DTensor):
            events = DTensor.from_local(events, mesh, replicated, run_check=False)
        batch_sizes = events.redistribute(mesh, of_batch).to_local()
    output, h_n, c_n = run(network, x, h, c[0] if c else None, local_weights, batch_sizes)

    def distributed(result: Tensor, *shape: int) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            result, mesh, of_batch, run_check=False, shape=torch.Size(shape), stride=stride
        )

    return (
        distributed(output, *input.shape[:-1], output.size(-1)),
        distributed(h_n, *h0.shape),
        c_n if c0 is None else distributed(c_n, *c0.shape),
    )
