"""Cells of one's own on a GPU: compiled by nvcc, on every path, against their definitions."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import flat, leaves, mapped, ragged
from own_cells import (
    by_definition,
    coupled_lstm,
    many_functions,
    mgu,
    own_gru,
    states_of,
    values_and_gradients,
    weighted,
)

import fastrnn
from fastrnn import _C
from fastrnn.codegen import compiler
from fastrnn.define import Definition

pytestmark = [pytest.mark.cuda, pytest.mark.once]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


# A cell of 2 gates, one with c, one whose two products have gradients of their own, one that reads
# all states. nvcc takes 10 seconds for each, and the virtual GPU as long again.
CASES = [
    (mgu, F32), (coupled_lstm, BF16), (own_gru, F64),
    *(
        pytest.param(definition, dtype, marks=pytest.mark.slow)
        for definition, dtype in [
            (mgu, F16), (coupled_lstm, F32), (own_gru, F32), (many_functions, F32),
        ]
    ),
]  # fmt: skip


def paths_of(definition, dtype):
    """The paths that a small layer can take."""
    if dtype == F64:
        return ["stepwise"]
    if definition is many_functions:  # rounding to TF32 would decide its conditions
        return ["stepwise", "persistent"]
    return ["stepwise", "persistent", "persistent in TF32", "one_block"]


@pytest.fixture
def on_path(monkeypatch):
    """A function that forces a path. Returns the rounding of products, relative."""

    def choose(path, dtype):
        tf32 = path not in ("stepwise", "persistent")
        monkeypatch.setenv("FASTRNN_CUDA_PATH", path.split()[0])
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        return 2**-10 if tf32 and dtype == F32 else torch.finfo(dtype).eps

    return choose


@pytest.fixture(autouse=True)
def no_fallback(request):
    """Nothing of a definition runs instead of its kernels."""
    before = fastrnn.fallbacks()
    yield
    if request.node.name != "test_step_by_step":
        assert fastrnn.fallbacks() == before


def test_step_by_step():
    """A cell that has kernels on the CPU alone."""
    layer = weighted.layer(5, 7)
    x, hx = leaves((torch.randn(4, 3, 5), states_of(layer, 3)))
    torch.testing.assert_close(
        values_and_gradients(layer, layer, x, hx),
        values_and_gradients(lambda *args: by_definition(layer, *args), layer, x, hx),
    )
    assert fastrnn.fallbacks()["weighted on cuda"] >= 1
    with pytest.raises(ValueError, match=r"weighted: .* can compile it for cpu, got device 'cuda'"):
        weighted.build([F32], device="cuda")


def doubles(values):
    return leaves(mapped(values, lambda t: t.detach().double()))


def by_definition_in_double(layer, args):
    exact = copy.deepcopy(layer).double()
    return values_and_gradients(lambda x, hx: by_definition(exact, x, hx), exact, *doubles(args))


def check(found, expected, eps):
    """h is rounded at each of 4 steps of 2 layers, and gradients are sums of many values."""
    for value, right in zip(found, expected, strict=True):
        most = 16 * eps * (1 + right.abs().max())
        assert (value.double() - right).abs().max() <= most


def test_heads():
    """Each is a network with the kernels of the same function's dense cell."""
    definition = Definition(mgu.function, mgu.gates, recurrent="heads")
    assert definition.key == mgu.key
    layer = definition.layer(5, 18, 2, bidirectional=True, heads=3)
    args = leaves((torch.randn(4, 3, 5), states_of(layer, 3)))
    found = values_and_gradients(layer, layer, *args)
    check(found, by_definition_in_double(layer, args), torch.finfo(F32).eps)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("definition", "dtype"), CASES, ids=lambda value: getattr(value, "name", str(value)[6:])
)
def test_all_paths_agree_with_the_definition(definition, dtype, packed, on_path):
    for B, H in [(1, 1), (17, 33), (3, 100)]:
        layer = definition.layer(5, H, 2, bidirectional=True, dtype=dtype)
        # 4 steps: those of a single one follow another setting for TF32.
        lengths = [1 + 3 * (b + 1) % 4 for b in range(B)]
        x = ragged(lengths, 5, dtype) if packed else torch.randn(4, B, 5, dtype=dtype)
        args = leaves((x, states_of(layer, B)))
        expected = by_definition_in_double(layer, args)
        for path in paths_of(definition, dtype):
            eps = on_path(path, dtype)
            found = values_and_gradients(layer, layer, *args)
            assert {value.dtype for value in found} == {dtype}
            check(found, expected, eps)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"proj_size": 3}, {"recompute": True}], ids=str)
def test_options_of_layers(options):
    layer = coupled_lstm.layer(5, 17, 2, bidirectional=True, **options)
    args = leaves((torch.randn(4, 3, 5), states_of(layer, 3)))
    found = values_and_gradients(layer, layer, *args)
    check(found, by_definition_in_double(layer, args), torch.finfo(F32).eps)


@pytest.mark.parametrize(
    "definition",
    [mgu, *(pytest.param(d, marks=pytest.mark.slow) for d in [coupled_lstm, own_gru])],
    ids=lambda d: d.name,
)
def test_steps(definition):
    step = definition.step(5, 17)
    layer = definition.layer(5, 17)
    layer.load_state_dict({f"{name}_l0": t for name, t in step.state_dict().items()})
    for batch in [(), (3,)]:
        x, hx = leaves((torch.randn(*batch, 5), states_of(step, *batch)))
        found = values_and_gradients(step, step, x, hx)
        _, last = by_definition(layer, x.view(1, -1, 5), mapped(hx, lambda s: s.view(1, -1, 17)))
        last = [state.view(*batch, 17) for state in flat(last)]
        loss = sum(((i + 1) * t.sin()).sum() for i, t in enumerate(last))
        inputs = [x, *flat(hx), *layer.parameters()]
        torch.testing.assert_close(found, [*last, *torch.autograd.grad(loss, inputs)])


def test_higher_derivatives_and_no_initial_states():
    layer = own_gru.layer(3, 4, 2, bidirectional=True, dtype=F64)
    x = torch.randn(3, 2, 3, dtype=F64, requires_grad=True)
    torch.testing.assert_close(layer(x), layer(x, torch.zeros(4, 2, 4, dtype=F64)))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x, fast_mode=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_explain(capsys, monkeypatch):
    monkeypatch.setenv("FASTRNN_CUDA_PATH", "persistent")
    fastrnn.explain(mgu.layer(5, 7), torch.ones(3, 2, 5))
    printed = capsys.readouterr().out
    assert f"{mgu.key}, layer 0, backward" in printed
    assert "persistent" in printed


# The same cell on both devices, compiled for one of them first: one index. A process of its own,
# where neither is compiled yet.
PROGRAM = """
import sys, torch, fastrnn
from fastrnn import _C
from own_cells import mgu
counts = []
for device in sys.argv[1:]:
    mgu.build(device=device)
    counts.append(len(_C.cells()))
torch.backends.cudnn.allow_tf32 = False
layer = mgu.layer(5, 7)
x = torch.randn(3, 2, 5)
torch.testing.assert_close(layer(x)[0], layer.cuda()(x.cuda())[0].cpu())
print(counts[1] - counts[0], mgu.key in _C.cells(), fastrnn.fallbacks())
"""


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids=" then ".join)
def test_both_devices(devices):
    mgu.build(), mgu.build(device="cuda")  # into the cache
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *devices],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "0 True {}\n"
    assert "compiling" not in done.stderr


def fresh(name):
    """A cell that nothing was compiled for."""

    @fastrnn.cell(gates=("a",), name=name)
    def definition(x, r, h):
        return torch.tanh(x.a - 2 * r.a)

    return definition


def test_operators_refuse_what_was_not_compiled():
    mgu.build(device=torch.device("cuda"))
    x, h = torch.ones(3, 2, 5, dtype=F64), torch.zeros(1, 2, 7, dtype=F64)
    weights = [torch.ones(14, n, dtype=F64) for n in (5, 7)]
    with pytest.raises(NotImplementedError, match=r"mgu-.* was not compiled for Double on cuda"):
        fastrnn.functional.rnn(
            mgu.key, x, h, None, weights, has_biases=False, num_layers=1, bidirectional=False
        )


def test_a_compilers_failure_shows_its_last_lines():
    broken = fresh("broken")
    object.__setattr__(broken.generated, "header", "#error no such cell")
    with pytest.raises(compiler.CompileError, match="no such cell") as found:
        broken.layer(5, 7)(torch.ones(3, 2, 5))
    assert "broken-" in str(found.value)
    assert ".cu" in str(found.value)


class TestWithoutKernels:
    """The definition runs step by step."""

    @pytest.fixture(autouse=True)
    def no_fallback(self):
        """There is one."""

    def check(self, definition, dtype, reason):
        layer = definition.layer(5, 7, bidirectional=True, dtype=dtype)
        x, hx = leaves((torch.randn(3, 2, 5, dtype=dtype), states_of(layer, 2)))
        torch.testing.assert_close(layer(x, hx), by_definition(layer, x, hx))
        assert fastrnn.fallbacks()[f"{definition.name} {reason}"] == 1
        assert definition.key not in _C.cells()

    def test_without_nvcc(self, monkeypatch):
        monkeypatch.setattr(compiler.toolchain(), "nvcc_version", lambda toolkit: None)
        reason = "on cuda without a compiler (no nvcc was found (set CUDA_HOME))"
        self.check(fresh("no_nvcc"), F32, reason)

    def test_of_other_cuda(self, monkeypatch):
        monkeypatch.setattr(compiler.toolchain(), "nvcc_version", lambda toolkit: "11.8")
        with pytest.raises(compiler.NoCompiler, match=r"nvcc is 11.8, torch was built with CUDA"):
            fresh("old_nvcc").build(device="cuda")


def test_devices_that_are_none():
    with pytest.raises(ValueError, match="can compile it for cpu and cuda, got device 'xpu'"):
        mgu.build(device="xpu")
