"""What runs in a row: torch's module, fastrnn's and the peers', with the same weights and input.

A contestant has a call, which is timed, and `results`, which returns what that call computes, by
name and in torch's layouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

# Contestants that no variable limits to an instruction set (timing.AVX2).
UNLIMITED = ["ONNX Runtime"]
STREAMED = 5  # where a call is one step, the results after this many steps are compared


@dataclass
class Problem:
    """Weights, input and gradient that every contestant of a row is given."""

    case: Case
    layer: nn.Module  # torch's
    x: Tensor  # [T, B, I]; for a packed sequence its data [N, I]; for a cell [B, I]
    grad: Tensor  # of the output
    batch_sizes: Tensor | None = None


@dataclass
class Contestant:
    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]


def options_of(case: Case) -> dict[str, Any]:
    """The options of a layer, torch's or fastrnn's."""
    options = {"num_layers": case.layers, "bidirectional": case.directions == 2}
    return options | ({"proj_size": case.projection} if case.projection else {})


def problem(case: Case) -> Problem:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    if case.cell.endswith("Cell"):
        layer = getattr(nn, case.cell)(case.I, case.H)
        x = torch.randn(case.B, case.I)
    else:
        layer = getattr(nn, case.cell)(case.I, case.H, **options_of(case))
        x = torch.randn(case.T, case.B, case.I)
    batch_sizes = None
    if case.packed:
        lengths = torch.tensor(case.lengths, device="cpu")
        x, batch_sizes, *_ = pack_padded_sequence(x, lengths)
    # Random: the gradient of a sum would be an expanded scalar.
    grad = torch.randn(*x.shape[:-1], case.directions * (case.projection or case.H))
    return Problem(case, layer.to(dtype), x.to(dtype), grad.to(dtype), batch_sizes)


def flat(value: Any) -> list[Tensor]:
    """The tensors in what a layer or a cell returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in flat(part)]


def of_module(layer: nn.Module, given: Problem) -> Contestant:
    """A contestant with the interface of torch's modules."""
    x: Any = given.x
    if given.case.mode == "training":
        x = x.clone().requires_grad_()
    leaf = x
    if given.batch_sizes is not None:
        x = PackedSequence(x, given.batch_sizes)

    def forward() -> dict[str, Tensor]:
        return name_all(flat(layer(x)))

    def step() -> Tensor:
        layer.zero_grad(set_to_none=True)
        leaf.grad = None
        output = flat(layer(x))[0]
        output.backward(given.grad)
        return output

    def step_results() -> dict[str, Tensor]:
        found = {"output": step().detach(), "gradient of x": leaf.grad}
        return found | {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}

    state: Any = None
    is_cell = given.case.cell.endswith("Cell")

    def stream() -> Any:
        nonlocal state
        if is_cell:
            output = state = layer(x, state)
        else:
            output, state = layer(x, state)
        return output, state

    def stream_results() -> dict[str, Tensor]:
        nonlocal state
        state = None
        for _ in range(STREAMED):
            last = stream()
        return name_all(flat(last))

    if given.case.mode == "training":
        return Contestant(step, step_results)
    if given.case.mode == "streaming":
        return Contestant(stream, stream_results)
    return Contestant(lambda: layer(x), forward)


def name_all(tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(["output", "h_n", "c_n"], tensors, strict=False))


def ours(given: Problem, dtype: torch.dtype, recompute: bool = False) -> Contestant:
    """fastrnn's module with the weights of torch's."""
    theirs, case = given.layer, given.case
    options = {}
    if isinstance(theirs, nn.RNNBase):
        options = options_of(case) | {"recompute": recompute}
    layer = getattr(fastrnn, case.cell)(case.I, case.H, **options)
    layer.load_state_dict(theirs.state_dict())
    x, grad = given.x.to(dtype), given.grad.to(dtype)
    return of_module(layer.to(x), Problem(case, layer, x, grad, given.batch_sizes))


def make(name: str, given: Problem) -> Contestant:
    if name == "torch":
        return of_module(given.layer, given)
    if name == "fastrnn":
        return ours(given, given.x.dtype, given.case.recompute)
    if name == "fastrnn keeping gates":
        return ours(given, given.x.dtype)
    if name == "fastrnn float32":
        return ours(given, torch.float32)
    # Imported here: the packages take seconds to import, and most rows need none of them.
    import peers

    return peers.PEERS[name](given)


def exact(given: Problem) -> dict[str, Tensor]:
    """The results of torch's module in float64."""
    layer = copy.deepcopy(given.layer).double()
    doubles = Problem(given.case, layer, given.x.double(), given.grad.double(), given.batch_sizes)
    return of_module(layer, doubles).results()


# Relative to the largest value of a tensor. For float32 and float64 it is assert_close's `atol`,
# which is meant for values near 1; it is scaled because an element can consist of the rounding
# error of a sum's larger terms. In 16 bits h is rounded at every step, and torch also rounds
# gradients between the operators of a step: a few units in the last place (2^-8 and 2^-11) of a
# value.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-7,
    torch.bfloat16: 16 * 2**-8,
    torch.float16: 16 * 2**-11,
}


TF32 = 16 * 2**-11  # float32 that is rounded to as many bits before every product


def difference(
    found: dict[str, Tensor], expected: dict[str, Tensor], allowed: float | None = None
) -> str | None:
    """What is wrong with the results, or None. expected: in float64; allowed: a tolerance."""
    for name, right in expected.items():
        value = found.get(name)
        if value is None:
            return f"no {name}"
        if value.shape != right.shape:
            return f"{name} has shape {list(value.shape)}, not {list(right.shape)}"
        scale = max(1.0, right.abs().max().item())
        error = (value.double() - right).abs().max().item() / scale
        # `not <=` instead of `>`: a NaN is wrong too.
        if not error <= (allowed or TOLERANCE[value.dtype]):
            return f"{name} is off by {error:.1e} of its largest value"
    return None


def contestants(case: Case) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """Each contestant's call, or the reason why it is not timed."""
    given = problem(case)
    expected = exact(given)
    built = fastrnn.build_info()
    limited = built["isa"] != built["isa_supported"][-1]
    for name in ["fastrnn", *case.peers]:
        if limited and name in UNLIMITED:
            yield name, f"can't be limited to {built['isa']}"
            continue
        try:
            contestant = make(name, given)
            wrong = difference(contestant.results(), expected)
        except ModuleNotFoundError as error:
            wrong = f"{error.name} is not installed"
        except Exception as error:  # whatever a peer raises, the others are timed
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        yield name, wrong or contestant.call
