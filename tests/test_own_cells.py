"""Layers and steps of cells of one's own: compiled from a Python function."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import FULL, flat, leaves, ragged, slow_after
from own_cells import (
    CELLS,
    by_definition_of_step,
    check_bits,
    check_higher_derivatives,
    check_models,
    compare,
    coupled_lstm,
    light_gru,
    many_functions,
    mgu,
    own_gru,
    own_lstm,
    states_of,
    values_and_gradients,
)
from torch import nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint
from torch_features import skip_without_export_of_layers

import fastrnn
from fastrnn.codegen import compiler

pytestmark = pytest.mark.cpu("on a GPU: test_own_cells_cuda.py")
F64 = torch.float64
BOTH = [False, True]
named = {"argvalues": CELLS, "ids": [definition.name for definition in CELLS]}


@pytest.mark.parametrize("definition", [coupled_lstm, many_functions], ids=["few", "many"])
def test_instruction_sets(definition):
    for H in [1, 17, 64]:
        layer = definition.layer(5, H, 2, bidirectional=True)
        compare(layer, torch.randn(4, 9, 5), states_of(layer, 9))


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("dtype", slow_after(1, [F64, torch.float32]), ids=str)
@pytest.mark.parametrize("definition", **named)
def test_layers(definition, dtype, bias, layers, bidirectional, packed):
    for H, recompute in [(1, False), (17, True), (33, False)]:
        layer = definition.layer(
            5, H, layers, bias, batch_first=H == 33, bidirectional=bidirectional, dtype=dtype,
            recompute=recompute,
        )  # fmt: skip
        x = ragged([3, 1, 4], 5, dtype) if packed else torch.randn(4, 3, 5, dtype=dtype)
        batch = 4 if H == 33 and not packed else 3
        compare(layer, x, states_of(layer, batch))


@pytest.mark.once
@pytest.mark.parametrize("dtype", slow_after(1, [torch.bfloat16, torch.float16]), ids=str)
@pytest.mark.parametrize("definition", slow_after(1, [mgu, coupled_lstm]), ids=["mgu", "coupled"])
def test_sixteen_bits(definition, dtype):
    layer = definition.layer(5, 17, 2, bidirectional=True, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    x, hx = leaves((torch.randn(4, 3, 5, dtype=dtype), states_of(layer, 3)))
    found = values_and_gradients(layer, layer, x, hx)
    wide = [t.detach().double().requires_grad_() for t in flat(hx)]
    hx64 = tuple(wide) if len(wide) > 1 else wide[0]
    x64 = x.detach().double().requires_grad_()
    expected = values_and_gradients(exact, exact, x64, hx64)
    # h is rounded at each of 4 steps of 2 layers, and gradients are sums of up to 24 such values.
    step = torch.finfo(dtype).eps
    for value, right in zip(found, expected, strict=True):
        assert (value.double() - right).abs().max() <= 8 * step * right.abs().max() + 8 * step


@pytest.mark.once
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_torchs_cells_have_torchs_results(kind):
    definition, cls = {"lstm": (own_lstm, nn.LSTM), "gru": (own_gru, nn.GRU)}[kind]
    proj = {"proj_size": 3} if kind == "lstm" else {}
    for options in [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, proj]:
        layer, theirs = definition.layer(5, 7, **options), cls(5, 7, **options)
        assert list(layer.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(layer.state_dict())
        for x in [torch.randn(3, 4, 5), torch.randn(3, 5), ragged([2, 3, 1], 5)]:
            torch.testing.assert_close(flat(layer(x)), flat(theirs(x)))
    assert (
        repr(definition.layer(5, 7, 2, bias=False)) == f"own_{kind}(5, 7, num_layers=2, bias=False)"
    )


@pytest.mark.once
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("definition", **named)
def test_steps(definition, dtype):
    for H, bias in [(1, True), (17, False), (33, True)]:
        step = definition.step(5, H, bias=bias, dtype=dtype)
        for batch in [(), (1,), (40,)]:
            x, hx = leaves((torch.randn(*batch, 5, dtype=dtype), states_of(step, *batch)))

            def loop(x, hx, step=step):
                return by_definition_of_step(step, x, hx)

            torch.testing.assert_close(
                values_and_gradients(step, step, x, hx), values_and_gradients(loop, step, x, hx)
            )
        zeros = step(torch.ones(2, 5, dtype=dtype))
        assert [s.shape for s in flat(zeros)] == [(2, H)] * len(definition.states)


@pytest.mark.once
@pytest.mark.parametrize("definition", **named)
def test_higher_derivatives(definition):
    layer = definition.layer(3, 4, 2, bidirectional=True, dtype=F64)
    check_higher_derivatives(layer, torch.randn(3, 2, 3, dtype=F64), states_of(layer, 2))


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms():
    models = [coupled_lstm.layer(5, 7) for _ in range(3)]
    x = torch.randn(3, 4, 2, 5)
    check_models(models, x)
    y = x[0].clone().requires_grad_()
    torch.testing.assert_close(checkpoint(models[0], y, use_reentrant=False)[0], models[0](y)[0])


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("definition", [mgu, coupled_lstm], ids=["mgu", "coupled_lstm"])
def test_compiled_and_exported(definition, packed):
    layer = definition.layer(5, 7, 2, bidirectional=True, dtype=F64)
    x = ragged([3, 1, 4], 5, F64) if packed else torch.randn(4, 3, 5, dtype=F64)
    hx = states_of(layer, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=not packed)
    torch.testing.assert_close(flat(compiled(x, hx)), flat(layer(x, hx)))
    step = torch.compile(definition.step(5, 7), backend="aot_eager", fullgraph=True)
    assert flat(step(torch.randn(2, 5)))[0].shape == (2, 7)
    if not packed:
        skip_without_export_of_layers()
        exported = torch.export.export(layer, (x, hx), strict=False).module()
        torch.testing.assert_close(flat(exported(x, hx)), flat(layer(x, hx)))


@pytest.mark.once
def test_autocast_is_that_of_a_gru():
    layer, gru = mgu.layer(5, 7), nn.GRU(5, 7)
    low = mgu.step(5, 7)
    for x in [torch.randn(3, 2, 5), torch.randn(3, 2, 5).bfloat16()]:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x)[0].dtype == gru(x)[0].dtype
            assert low(x[0]).dtype == nn.GRUCell(5, 7)(x[0]).dtype


@pytest.mark.once
def test_copies():
    layer = coupled_lstm.layer(5, 7, 2, dropout=0.3).eval()
    x = torch.randn(3, 2, 5)
    for other in [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]:
        assert other.definition is coupled_lstm
        torch.testing.assert_close(flat(other(x)), flat(layer(x)))
    fresh = coupled_lstm.layer(5, 7, 2)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(flat(fresh(x)), flat(layer(x)))
    moved = copy.deepcopy(layer).double()
    torch.testing.assert_close(moved(x.double())[0].float(), layer(x)[0])


@pytest.mark.once
def test_the_bits_do_not_depend_on_threads_or_batch_mates():
    layer = coupled_lstm.layer(64, 96)
    check_bits(layer, torch.randn(9, 20, 64))


@pytest.mark.once
def test_dropout_between_layers():
    layer, lstm = own_lstm.layer(5, 7, 3, dropout=0.4), nn.LSTM(5, 7, 3, dropout=0.4)
    lstm.load_state_dict(layer.state_dict())
    x, found = torch.randn(3, 2, 5), []
    for each in [layer, lstm]:
        torch.manual_seed(5)
        found.append(each(x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: mgu.layer(5, 7)(torch.ones(5)), ValueError, "mgu: Expected input to be 2D or 3D"),
        (lambda: mgu.layer(5, 7)(torch.ones(3, 2, 6)), RuntimeError, "Expected 5, got 6"),
        (lambda: mgu.layer(5, 7)(torch.ones(3, 2, 5).double()), ValueError, "type"),
        (
            lambda: mgu.layer(5, 7)(torch.ones(3, 2, 5), torch.zeros(1, 3, 7)),
            RuntimeError, r"Expected hidden size \(1, 2, 7\), got \[1, 3, 7\]",
        ),
        (
            lambda: coupled_lstm.layer(5, 7)(torch.ones(3, 2, 5), torch.zeros(1, 2, 7)),
            RuntimeError, "coupled_lstm expects a tuple of 2 tensors as hx: h, c",
        ),
        (
            lambda: mgu.layer(5, 7)(torch.ones(3, 2, 5), torch.zeros(2, 7)),
            RuntimeError, "For batched 3-D input, hx should also be 3-D but got 2-D tensor",
        ),
        (lambda: mgu.layer(5, 7, proj_size=3), ValueError, "mgu does not support projections"),
        (lambda: mgu.layer(5, 0), ValueError, "hidden_size must be greater than zero"),
        (lambda: mgu.step(5, 7)(torch.ones(3, 2, 5)), ValueError, "mgu: .* 1D or 2D"),
        (lambda: mgu.step(5, 7)(torch.ones(2, 5), torch.ones(7)), ValueError, "hidden to be 2D"),
        (lambda: mgu.step(5, 7)(torch.ones(2, 5), torch.ones(2, 8)), RuntimeError, "Expected"),
        (lambda: mgu.build([torch.int8]), ValueError, "mgu: expected dtypes among torch.float32"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.once
def test_operators_refuse_what_was_not_compiled():
    @fastrnn.cell(gates=("a",), name="fresh")
    def definition(x, r, h):
        return torch.tanh(x.a + 2 * r.a)

    definition.build([torch.float32])
    x = torch.ones(3, 2, 5, dtype=F64)
    weights = [torch.ones(7, n, dtype=F64) for n in (5, 7)]
    with pytest.raises(NotImplementedError, match=r"fresh-.* was not compiled for Double"):
        fastrnn.functional.rnn(
            definition.key, x, torch.zeros(1, 2, 7, dtype=F64), None, weights,
            has_biases=False, num_layers=1, bidirectional=False,
        )  # fmt: skip


@pytest.mark.once
def test_nothing_is_built_before_the_check(monkeypatch):
    @fastrnn.cell(gates=("a",), name="unchecked")
    def definition(x, r, h):
        return torch.tanh(x.a + 3 * r.a)

    def fail(self):
        raise fastrnn.codegen.CellError("dh differs")

    monkeypatch.setattr(type(definition.generated), "check", fail)
    with pytest.raises(ValueError, match="dh differs"):
        definition.layer(5, 7)(torch.ones(3, 2, 5))
    assert definition.key not in fastrnn.CELLS


@pytest.mark.once
def test_the_first_call_is_inside_transforms():
    """Where the check that comes before it draws random numbers, and differentiates."""

    @fastrnn.cell(gates=("a",), name="inside")
    def definition(x, r, h):
        return torch.tanh(x.a + 0.5 * r.a)

    models = [definition.layer(5, 7) for _ in range(2)]
    x = torch.randn(2, 3, 1, 5)
    parameters, buffers = stack_module_state(models)

    def tangent(p, b, x):
        return jvp(lambda x: functional_call(models[0], (p, b), (x,))[0], (x,), (x,))[1]

    found = vmap(tangent)(parameters, buffers, x)
    assert definition.key in fastrnn.CELLS
    expected = [jvp(lambda x, m=m: m(x)[0], (t,), (t,))[1] for m, t in zip(models, x, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.once
def test_explain(capsys):
    fastrnn.explain(light_gru.layer(5, 7), torch.ones(3, 2, 5))
    fastrnn.explain(coupled_lstm.step(5, 7), torch.ones(2, 5))
    printed = capsys.readouterr().out
    assert f"{light_gru.key}, layer 0, backward" in printed
    assert f"{coupled_lstm.key}, layer 0, forward" in printed


@pytest.mark.once
def test_a_compilers_failure_shows_its_last_lines(monkeypatch):
    @fastrnn.cell(gates=("a",))
    def broken(x, r, h):
        return torch.tanh(x.a - r.a)

    object.__setattr__(broken.generated, "header", "#error no such cell")
    with pytest.raises(compiler.CompileError, match="no such cell") as found:
        broken.layer(5, 7)(torch.ones(3, 2, 5))
    assert "broken-" in str(found.value)
    assert ".cpp" in str(found.value)


# ---- other processes: the cache, and no compiler -------------------------------------------------

PROGRAM = """
import torch, fastrnn
@fastrnn.cell(gates=("f", "n"))
def own(x, r, h):
    f = torch.sigmoid(x.f + r.f)
    return h + f * (torch.tanh(x.n + f * r.n) - h)
torch.manual_seed(0)
layer = own.layer(5, 7, 2, dropout=0.5, bidirectional=True)
x = torch.randn(4, 3, 5)
print(layer.eval()(x)[0].sum().item(), own.step(5, 7)(x[0]).sum().item(), fastrnn.fallbacks())
layer.train()(x)[0].sum().backward()
"""


def ran(cache: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "FASTRNN_CACHE": str(cache), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache with the cell of PROGRAM, and what compiling it printed."""
    cache = tmp_path_factory.mktemp("cache") / "new"
    return cache, ran(cache)


@pytest.mark.once
def test_the_next_process_compiles_nothing(compiled):
    cache, first = compiled
    assert first.stderr.count("compiling own-") == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    again = ran(cache)
    assert again.stdout == first.stdout
    assert "compiling" not in again.stderr
    assert first.stdout.endswith("{}\n")


@pytest.mark.once
@pytest.mark.parametrize("how", slow_after(1, ["damaged", "of others", "without digest"]))
def test_a_library_that_may_be_anyones_is_not_loaded(compiled, how, tmp_path):
    cache, first = compiled
    other = tmp_path / "copy"
    other.mkdir(mode=0o700)
    for file in cache.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
        (other / file.name).chmod(0o600)
    (library,) = other.glob("*.so")
    if how == "damaged":
        library.write_bytes(library.read_bytes()[:-1000])
    elif how == "of others":
        library.chmod(0o666)
    else:
        library.with_suffix(".sha256").unlink()
    again = ran(other)
    assert "compiling own-" in again.stderr
    assert again.stdout == first.stdout


@pytest.mark.slow
@pytest.mark.once
def test_a_folder_where_others_may_write_is_not_used(compiled, tmp_path):
    tmp_path.chmod(0o777)
    found = ran(tmp_path)
    assert found.stdout == compiled[1].stdout
    assert "compiled cells are kept for this process only" in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.once
def test_a_folder_that_can_not_be_made_is_no_error(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    found = ran(tmp_path / "file" / "cache")
    assert found.stdout == compiled[1].stdout


@pytest.mark.once
def test_two_processes_at_once_compile_once(tmp_path):
    cache = tmp_path / "cache"
    program = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "FASTRNN_CACHE": str(cache)}
    both = [
        subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(text.count("compiling own-") for text in printed) == 1


@pytest.mark.once
def test_without_a_compiler_the_definition_runs(compiled, tmp_path):
    found = ran(tmp_path / "cache", CXX="no-such-compiler")
    total, step, *_ = found.stdout.split()
    right, right_step, *_ = compiled[1].stdout.split()
    assert float(total) == pytest.approx(float(right), rel=1e-5)
    assert float(step) == pytest.approx(float(right_step), rel=1e-5)
    assert "own without a compiler" in found.stdout
    assert found.stderr.count("its definition runs step by step") == 1


@pytest.mark.once
def test_a_process_that_lacks_the_definition_says_so(tmp_path):
    path = tmp_path / "layer.pickle"
    path.write_bytes(pickle.dumps(mgu.layer(5, 7)))
    program = textwrap.dedent(f"""
        import pickle, sys, fastrnn
        pickle.load(open({str(path)!r}, "rb"))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "No module named 'own_cells'" in done.stderr
