"""Pairs of fastrnn and torch layers with equal weights, and comparisons of their results."""

import copy
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn

#: The kinds of layers: class name and options. proj_size=True means some size less than H.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": True}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "rnn_tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
}
#: The operators' own cells: a copy, because tests that compile cells of their own add those to
#: fastrnn.CELLS.
OPERATOR_CELLS = dict(fastrnn.CELLS)
FULL = [torch.float32, torch.float64]
LOW = [torch.bfloat16, torch.float16]


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """Values or tuples of values for parametrize, marked slow after the first `count`."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else [value]),
            marks=[pytest.mark.slow] if i >= count else [],
        )
        for i, value in enumerate(values)
    ]


#: Whether the CUDA device is the virtual GPU.
VIRTUAL = os.environ.get("VGPU_ACTIVE") == "1"
no_transforms = pytest.mark.skipif(
    VIRTUAL, reason="the virtual GPU has no tensors of torch.func's transforms"
)

State = Tensor | tuple[Tensor, Tensor]


class Sizes(NamedTuple):
    T: int
    B: int
    I: int
    H: int


def affordable(cases: Sequence[Any]) -> list[Any]:
    """The cases (T, B, I, H) that are small enough for the device under test.

    All of them, except on the virtual GPU. There a multiply-add takes about 10 ns, so the limit is
    2 million per gate, and every step is a launch, so the limit is 100 steps.
    """
    most = 2e6
    return [
        c
        for c in cases
        if not VIRTUAL or (c[0] <= 100 and c[0] * c[1] * c[3] * (c[2] + c[3]) <= most)
    ]


def some_sizes(case: str) -> Sizes:
    """Random sizes around the widths of registers and tiles, seeded with the name of the case.

    All combinations of options and sizes would take an hour. This way every option is tested with
    many sizes and every size with many options, reproducibly.
    """
    draw = random.Random(case).choice
    return Sizes(draw([1, 2, 7]), draw([1, 3, 8, 17]), draw([1, 5, 33]), draw([1, 16, 17, 33, 64]))


def pair(kind: str, input_size: int, hidden_size: int, **options: Any) -> tuple[Any, Any]:
    """fastrnn's layer and torch's, with equal weights."""
    name, fixed = LAYERS[kind]
    options = {**fixed, **options}
    if options.get("proj_size"):
        options["proj_size"] = max(1, hidden_size // 3)
    theirs = getattr(nn, name)(input_size, hidden_size, **options)
    ours = getattr(fastrnn, name)(input_size, hidden_size, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def cell_pair(kind: str, input_size: int, hidden_size: int, **options: Any) -> tuple[Any, Any]:
    """fastrnn's cell and torch's, with equal weights."""
    name, fixed = CELLS[kind]
    theirs = getattr(nn, name)(input_size, hidden_size, **fixed, **options)
    ours = getattr(fastrnn, name)(input_size, hidden_size, **fixed, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_state(layer: nn.RNNBase, *batch: int) -> State:
    """A random h0, or (h0, c0), for a layer: [L*D, B, H or P], or unbatched if `batch` is empty."""
    dtype = next(layer.parameters()).dtype
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, *batch, layer.proj_size or layer.hidden_size, dtype=dtype)
    if not isinstance(layer, nn.LSTM):
        return h
    return h, torch.randn(rows, *batch, layer.hidden_size, dtype=dtype)


def cell_state(cell: nn.RNNCellBase, *batch: int) -> State:
    dtype = next(cell.parameters()).dtype
    h = torch.randn(*batch, cell.hidden_size, dtype=dtype)
    return (h, torch.randn(*batch, cell.hidden_size, dtype=dtype)) if is_lstm(cell) else h


def is_lstm(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM | nn.LSTMCell)


def ragged(lengths: Sequence[int], size: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    """A packed batch of random sequences with the given lengths, in any order."""
    return pack([torch.randn(n, size, dtype=dtype) for n in lengths])


def device() -> str:
    """The type of the device under test: "cpu", or "cuda" under pytest --device cuda."""
    return torch.get_default_device().type


def rng_state() -> Tensor:
    """The state of the default generator of the device under test."""
    return torch.cuda.get_rng_state() if device() == "cuda" else torch.get_rng_state()


def host_tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """A CPU tensor whatever the default device, such as batch_sizes must be."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def pack(sequences: Sequence[Tensor], enforce_sorted: bool = False) -> PackedSequence:
    """torch's pack_sequence, with the lengths on the CPU whatever the default device."""
    with torch.device("cpu"):
        return pack_sequence(list(sequences), enforce_sorted=enforce_sorted)


def flat(nested: Any) -> list[Tensor]:
    """The tensors of a layer's results or arguments as a flat list, such as output, h_n, c_n."""
    if nested is None:
        return []
    if isinstance(nested, PackedSequence):
        return [nested.data]
    if isinstance(nested, Tensor):
        return [nested]
    return [tensor for item in nested for tensor in flat(item)]


def mapped(nested: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `change` applied to every floating-point tensor."""
    if nested is None:
        return None
    if isinstance(nested, PackedSequence):
        return nested._replace(data=change(nested.data))
    if isinstance(nested, Tensor):
        return change(nested)
    return type(nested)(mapped(item, change) for item in nested)


def leaves(nested: Any) -> Any:
    """The same structure with every tensor copied to a new leaf that requires grad."""
    return mapped(nested, lambda t: t.detach().clone().requires_grad_())


def avoid_relu_kinks(kind: str, *layers: nn.Module) -> None:
    """Moves relu's pre-activations away from zero, where rounding decides whether a gradient flows.

    The biases switch every other unit on and the rest off.
    """
    if kind == "rnn_relu":
        for layer in layers:
            for name, parameter in layer.named_parameters():
                with torch.no_grad():
                    if name.startswith("bias"):
                        parameter[::2], parameter[1::2] = 4, -4
                    elif name.startswith("weight"):
                        parameter *= 0.25


def in_double(module: nn.Module, *args: Any) -> Any:
    """The module's results computed in float64 from the same weights and inputs."""
    exact = copy.deepcopy(module).double()
    return exact(*mapped(args, Tensor.double))


#: Results to compare together: (ours, theirs, exact).
Pool = list[tuple[Tensor, Tensor, Tensor]]


def assert_same(
    ours: Any, theirs: Any, exact: Any = None, *, strides: bool = True, pool: Pool | None = None
) -> None:
    """Asserts equal dtypes, shapes, strides and values.

    Values of 16-bit types are checked by assert_no_worse against `exact`. If a pool is given, they
    are added to it instead, to be checked by assert_pool_no_worse.
    """
    ours, theirs, exact = flat(ours), flat(theirs), flat(exact)
    assert len(ours) == len(theirs)
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        assert not strides or our.stride() == their.stride()
        if our.dtype not in LOW:
            torch.testing.assert_close(our, their)
        elif pool is None:
            assert_no_worse(our, their, exact[i])
        else:
            pool.append((our, their, exact[i]))


def assert_pool_no_worse(pool: Pool, times: float = 2) -> None:
    """assert_no_worse of all results at once: a mean over few errors is too noisy."""
    ours, theirs, exact = (torch.cat([t.flatten() for t in ts]) for ts in zip(*pool, strict=True))
    assert_no_worse(ours, theirs, exact, times)


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, times: float = 2) -> None:
    """Asserts that our RMS error against the exact values is at most `times` torch's.

    torch's error can happen to be less than that of rounding the exact result to the dtype (half a
    unit in the last place), so the larger of the two is the reference. A mean hides a single bad
    element, so the maximum errors are compared too, with twice the factor: a maximum is noisier.
    """
    assert exact.dtype == torch.float64
    assert torch.isfinite(ours).all()
    if exact.numel() == 0:
        return

    def rms(t: Tensor) -> float:
        return t.square().mean().sqrt().item()

    info = torch.finfo(ours.dtype)
    rounding = exact.abs().clamp(min=info.tiny) * info.eps / 2
    our, their = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
    mean, allowed = rms(our), times * max(rms(their), rms(rounding))
    assert mean <= allowed, f"RMS error {mean:.3g}, allowed {allowed:.3g}"
    largest = our.max().item()
    allowed = 2 * times * max(their.max().item(), rounding.max().item())
    assert largest <= allowed, f"maximum error {largest:.3g}, allowed {allowed:.3g}"


def normals(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Normal float64 tensors of the same shapes on the CPU, the same for a seed on any device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    return [torch.randn(t.shape, generator=generator, **options) for t in like]


def gradients(outputs: Any, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """d(sum of cotangents * outputs) / d(inputs), for random cotangents.

    An input that no output depends on gets None from torch's graph but zeros from a fused operator.
    Both are zeros here.
    """
    outputs = flat(outputs)
    cotangents = [random.to(o) for random, o in zip(normals(outputs, seed), outputs, strict=True)]
    found = torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
    )
    return list(found)


def one_line_error(
    run: Callable[..., object], capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> str:
    """The one-line usage error with which run(folder, *arguments) exits, leaving all pictures."""

    def pictures() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.glob("*.png")}

    before = pictures()
    with pytest.raises(SystemExit) as end:
        run(folder, *arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert pictures() == before
    return err


def example_count(config: pytest.Config) -> int:
    """The number of random cases: fewer on the virtual GPU and with FASTRNN_ISA set."""
    cases = config.getoption("fuzz")
    return max(1, cases // (50 if VIRTUAL else 5 if "FASTRNN_ISA" in os.environ else 1))


def check_examples(
    config: pytest.Config,
    cases: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    examples: int,
) -> None:
    """Calls `check` with that many cases: the same in every run, unless --other-cases is given."""

    @settings(
        max_examples=examples,
        derandomize=not config.getoption("other_cases"),
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def every(case: Any) -> None:
        check(case)

    every()


def pair_and_leaves(kind, bias, bidirectional, layers, packed, name):
    """Both layers in float64 and their arguments, which need gradients; sizes from the test's name.

    Several layers have dropout.
    """
    T, B, I, H = some_sizes(name)
    float64 = torch.float64
    ours, theirs = pair(
        kind, I, H + (kind == "lstm_proj"), bias=bias, bidirectional=bidirectional,
        num_layers=layers, dropout=0.4 if layers > 1 else 0.0, dtype=float64,
    )  # fmt: skip
    if packed:
        x = ragged([1 + (3 * b + T) % T for b in range(B)], I, float64)
    else:
        x = torch.randn(T, B, I, dtype=float64)
    return ours, theirs, leaves((x, random_state(theirs, B)))
