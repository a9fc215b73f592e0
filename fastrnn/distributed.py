"""Networks of DTensors: each process computes those sequences of the batch that it has.

No sharding rule of the operators could say that: torch has none for results that are lists, and
what is kept for backward has the rows of all steps in one dimension. So a network is called with
local tensors. torch.distributed.tensor is imported by whoever has DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.when_imported import when_imported

_types: tuple[type, ...] = ()  # DTensor, when there can be any


def install() -> None:
    """Learn of DTensor, now or when it is imported."""
    when_imported("torch.distributed.tensor", _learn)


def _learn(module: ModuleType) -> None:
    global _types
    _types = (module.DTensor,)


def are_distributed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of these is a DTensor."""
    return bool(_types) and any(isinstance(t, _types) for t in tensors)


_Run = Callable[[Tensor, Tensor, Tensor | None, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor]]


def run_locally(
    run: _Run,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``run`` as DTensors, from local tensors.

    In each dimension of the mesh the batch is sharded where that of the input or of a state is, and
    replicated elsewhere; packed sequences are replicated, and so are the weights. What has other
    placements is redistributed. Where the batch is sharded the weights' gradients are partial sums.
    States that are plain tensors without gradients, as torch's layers make of zeros, are taken for
    replicated.

    Raises RuntimeError, as torch does, where any other tensor is plain.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    tensors: list[Any] = [input, h0, *([] if c0 is None else [c0]), *weights]
    count = len(tensors) - len(weights)  # of those that have a batch
    mesh = next(t for t in tensors if isinstance(t, DTensor)).device_mesh
    whole = [Replicate()] * mesh.ndim
    for i in range(1, count):
        if not isinstance(tensors[i], DTensor) and not tensors[i].requires_grad:
            tensors[i] = DTensor.from_local(tensors[i], mesh, whole, run_check=False)
    if not all(isinstance(t, DTensor) for t in tensors):
        raise RuntimeError(
            "fastrnn got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to "
            "DTensor before calling distributed operators!"
        )
    sharded = [
        not packed and any(t.placements[d] == Shard(1) for t in tensors[:count])
        for d in range(mesh.ndim)
    ]
    of_batch: list[Any] = [Shard(1) if yes else Replicate() for yes in sharded]
    of_sums: list[Any] = [Partial() if yes else Replicate() for yes in sharded]

    def local(t: Any, placements: list[Any], of_gradients: list[Any]) -> Tensor:
        if t.placements != tuple(placements):
            t = t.redistribute(mesh, placements)
        found: Tensor = t.to_local(grad_placements=of_gradients)
        return found

    x, *states = (local(t, of_batch, of_batch) for t in tensors[:count])
    parts = [local(t, whole, of_sums) for t in tensors[count:]]
    output, h_n, c_n = run(x, states[0], states[1] if states[1:] else None, parts)

    def of_all(result: Tensor, *shape: int) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            result, mesh, of_batch, run_check=False, shape=torch.Size(shape), stride=stride
        )

    return (
        of_all(output, *input.shape[:-1], output.size(-1)),
        of_all(h_n, *h0.shape),
        c_n if c0 is None else of_all(c_n, *c0.shape),
    )
