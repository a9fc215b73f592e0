"""`python -m fastrnn info`, `bench` and `check`, also where the extension can't be loaded."""

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import OPERATOR_CELLS, slow_after

import fastrnn
import fastrnn.__main__
from fastrnn import bench, check, info

pytestmark = pytest.mark.once
cpu_only = pytest.mark.cpu("does not use any device")

PACKAGE = Path(fastrnn.__file__).parent
MODULES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


def python(*arguments, folder=PACKAGE.parent, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def in_copy(folder, *arguments):
    """Runs the fastrnn in a folder, and no other: an editable install would find its extension."""
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    return python("-S", *arguments, folder=folder, PYTHONPATH=path)


def main(*arguments):
    return fastrnn.__main__.main(list(arguments))


@pytest.fixture
def executable(tmp_path, monkeypatch):
    """A function that puts a shell script into PATH, which has nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(name, lines):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return write


# --- info -----------------------------------------------------------------------------------------


def lines_of(text):
    return dict(re.findall(r"^ *(\S.*?)  +(.+)$", text, re.MULTILINE))


@cpu_only
def test_info_has_what_build_info_has():
    built = fastrnn.build_info()
    result = python("-m", "fastrnn", "info", OMP_WAIT_POLICY="passive")
    assert result.returncode == 0, result.stderr
    found = lines_of(result.stdout)
    assert found["fastrnn"] == built["version"]
    assert found["torch"] == f"{built['torch_running']} (built with {built['torch']})"
    assert found["compiler"] == built["compiler"]
    assert found["instruction set"] == built["isa"]
    assert found["supported"].split(", ") == built["isa_supported"]
    assert found["compiled"].split(", ") == built["isa_compiled"]
    assert found["OpenMP"].startswith(f"{built['openmp']} (loaded: lib")
    assert built["cuda"] in found["CUDA kernels"] or built["cuda_archs"]
    assert found["cells"].split(", ") == list(OPERATOR_CELLS)
    assert found["Python"].startswith(f"{sys.version.split()[0]}, Linux")
    assert "OMP_WAIT_POLICY=passive" in found["environment"]
    assert len(result.stdout.splitlines()) <= 16


@cpu_only
@pytest.mark.parametrize("command", slow_after(1, ["info", "check"]))
def test_unknown_cap_is_a_line(command):
    result = python("-m", "fastrnn", command, FASTRNN_ISA="AVX2")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"{command}: FASTRNN_ISA is 'AVX2', expected one of: " in result.stderr


@cpu_only
def test_gpu_that_torch_does_not_find(executable, monkeypatch):
    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert info.gpus() == "none: Found no NVIDIA driver on your system."
    assert info.driver() == "none: there is no nvidia-smi"
    executable("nvidia-smi", "echo 580.95.05, NVIDIA H200; echo 580.95.05, NVIDIA H200")
    assert info.driver() == "580.95.05, NVIDIA H200"
    executable("nvidia-smi", "echo 'it has failed' >&2; exit 9")
    assert info.driver() == "it has failed"


@cpu_only
def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    names = ["NVIDIA H200", "NVIDIA H200", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9 - i // 2, 0))
    expected = "2 x NVIDIA H200 (compute capability 9.0), NVIDIA L4 (compute capability 8.0)"
    assert info.gpus() == expected


@cpu_only
def test_cpu_without_a_name_in_cpuinfo(executable, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "CPU implementer\t: 0x41\n")
    executable("lscpu", "echo 'Architecture:  aarch64'; echo 'Model name:    Neoverse-V1'")
    assert info.cpu_model() == "Neoverse-V1"
    executable("lscpu", "exit 1")
    assert info.cpu_model() == os.uname().machine


# --- the extension can't be loaded ----------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """A folder with a fastrnn that is not built."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastrnn", ignore=ignored)
    return tmp_path


@pytest.fixture
def reason(broken):
    """What the ImportError says."""
    *_, last = in_copy(broken, "-c", "import fastrnn").stderr.splitlines()
    name, _, text = last.partition(": ")
    assert name == "ImportError"
    return text


@cpu_only
def test_info_without_the_extension(broken, reason):
    result = in_copy(broken, "-m", "fastrnn", "info")
    assert (result.returncode, result.stderr) == (1, "")
    found = lines_of(result.stdout)
    assert found["extension"] == reason
    assert found["torch"] == torch.__version__
    assert {"fastrnn", "Python", "CPU", "threads", "GPU", "driver"} < set(found)


@cpu_only
@pytest.mark.parametrize("command", slow_after(1, ["bench", "check"]))
def test_other_commands_without_the_extension(command, broken, reason):
    result = in_copy(broken, "-m", "fastrnn", command)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"python -m fastrnn {command}: {reason}\n"


@cpu_only
def test_another_command_that_imports_fastrnn(broken, reason):
    (broken / "other").mkdir()
    (broken / "other/__init__.py").write_text("import fastrnn")
    (broken / "other/__main__.py").write_text("")
    result = in_copy(broken, "-m", "other", "fastrnn")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: {reason}"


# --- wrong arguments ------------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "the following arguments are required: info|bench|check"),
        ("infos", "invalid choice: 'infos'"),
        ("info more", "unrecognized arguments: more"),
        ("bench --cell mgu", "argument --cell: invalid choice: 'mgu'"),
        ("bench --hidden 0", "argument --hidden: '0' is not a whole number above 0"),
        ("bench --steps 1.5", "argument --steps: '1.5' is not a whole number above 0"),
        ("bench --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("bench --cell lstmcell --layers 2", "--cell lstmcell: a cell has one layer"),
        ("bench --cell rnncell --bidirectional", "--cell rnncell: a cell has one layer and one"),
        ("bench --device cuda", "--device cuda: torch finds no GPU"),
        ("check --device cuda", "--device cuda: torch finds no GPU"),
        ("check --isa sse9", "--isa sse9: expected one of "),
        ("check --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_are_a_line(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(*arguments.split())
    assert end.value.code == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("python -m fastrnn")
    assert reason in err


# --- bench ----------------------------------------------------------------------------------------

SIZES = "--input 3 --hidden 5 --batch 2 --steps 3"


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)


def ratios(text):
    """The ratio by mode, of the lines that begin with a mode."""
    line = r"^(inference|training) +\S+ ms +\S+ ms +(\d+\.\d\d) \(\d+\.\d\d-\d+\.\d\d\)$"
    return {mode: float(ratio) for mode, ratio in re.findall(line, text, re.MULTILINE)}


@cpu_only
@pytest.mark.parametrize("cell", bench.CELLS)
def test_bench(cell, few_rounds, capsys):
    options = "" if cell.endswith("cell") else "--layers 2 --bidirectional --dtype bfloat16"
    assert main("bench", "--cell", cell, *SIZES.split(), "--threads", "1", *options.split()) == 0
    assert torch.get_num_threads() == 1
    out, _ = capsys.readouterr()
    assert set(ratios(out)) == {"inference", "training"}
    sizes = "input 3, hidden 5, batch 2, steps 3"
    more = ", layers 2, bidirectional, bfloat16" if options else ", float32"
    assert f"{bench.CELLS[cell]}, {sizes}{more}\n" in out
    assert re.search(r"sgemm: \d+ GFLOP/s", out)


@cpu_only
@pytest.mark.parametrize("modes", [["training"], ["inference"], ["training", "inference"]])
def test_bench_of_some_modes(modes, few_rounds, capsys):
    assert main("bench", *SIZES.split(), *(f"--{mode}" for mode in modes)) == 0
    assert set(ratios(capsys.readouterr().out)) == set(modes)


@cpu_only
def test_bench_prints_torchs_time_by_ours(monkeypatch, capsys):
    def timed(calls, *_, **__):
        seconds = {"torch": [6e-3, 6e-3], "fastrnn": [2e-3, 3e-3], "sgemm": [0.01, 0.01]}
        assert set(calls) == set(seconds)
        return {name: {"seconds": seconds[name]} for name in calls}

    monkeypatch.setattr(bench, "timed", timed)
    assert main("bench", *SIZES.split()) == 0
    out, _ = capsys.readouterr()
    assert ratios(out) == {"inference": 2.5, "training": 2.5}
    assert "training   6 ms       2.5 ms     2.50 (2.25-2.75)" in out
    assert f"sgemm: {2 * 1024**3 / 0.01 / 1e9:.0f} GFLOP/s" in out
    assert "slowed" not in out


@cpu_only
def test_bench_tells_of_other_load(monkeypatch, capsys):
    seconds = [0.01, 0.02, 0.02]
    monkeypatch.setattr(
        bench, "timed", lambda calls, *_, **__: {name: {"seconds": seconds} for name in calls}
    )
    assert main("bench", *SIZES.split()) == 0
    assert "Something else slowed the machine down" in capsys.readouterr().out


def planted(change):
    """A forward method whose results `change` makes wrong."""

    def plant(forward):
        def wrong(self, *args):
            output, state = forward(self, *args)
            return output, change(state)

        return wrong

    return plant


def raised(state):
    raise RuntimeError("a kernel failed\nwith details")


def with_wrong_gradient(state):
    if state.requires_grad:
        state.register_hook(lambda grad: grad * 1.001)
    return state


@cpu_only
def test_bench_of_wrong_results(monkeypatch, capsys):
    wrong = planted(lambda state: state + 0.01)
    monkeypatch.setattr(fastrnn.GRU, "forward", wrong(fastrnn.GRU.forward))
    assert main("bench", "--cell", "gru", *SIZES.split()) == 1
    out, _ = capsys.readouterr()
    assert "not timed: h_n in inference is off by" in out
    assert ratios(out) == {}


# --- check ----------------------------------------------------------------------------------------


@cpu_only
def test_check_covers_all_modules():
    cases = list(check.cases())
    assert {case.name for case in cases} == set(MODULES)
    options = {(name, value) for case in cases for name, value in case.options.items()}
    assert {("nonlinearity", "relu"), ("bidirectional", True), ("num_layers", 2)} < options
    assert "proj_size" in dict(options)
    assert any(case.lengths for case in cases)


@cpu_only
@pytest.mark.parametrize("dtype", check.DTYPES)
def test_rows_of_this_instruction_set(dtype):
    row = check.checked("cpu", dtype)
    assert row.ok, row
    assert row[:3] == ("cpu", fastrnn.build_info()["isa"], dtype)
    assert 0 < row.error < 1
    assert str(row).endswith(f"{dtype:<8}  ok      {row.error:.2g}")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", check.DTYPES)
def test_rows_of_a_gpu(dtype, monkeypatch):
    few = [case for case in check.cases() if case.H < 64][::3]  # single steps and packed sequences
    monkeypatch.setattr(check, "cases", lambda: few)
    with torch.device("cpu"):  # a user's default device, not that of the tests
        row = check.checked("cuda", dtype)
    assert row.ok, row
    assert row.isa.startswith("sm_")


@cpu_only
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state + 0.01, "FAILED  .+  GRU .+: h_n"),
        (lambda state: state * math.nan, "FAILED  inf  GRU .+: h_n"),
        (lambda state: state[:, :1], "FAILED  inf  GRU .+: h_n"),
        (with_wrong_gradient, "FAILED  .+  GRU .+: gradient of "),
        (raised, "FAILED  inf  GRU .+: RuntimeError: a kernel failed$"),
    ],
    ids=["value", "NaN", "shape", "gradient", "error"],
)
def test_wrong_results_fail(change, what, monkeypatch):
    few = [case for case in check.cases() if case.name in ("GRU", "GRUCell")]
    monkeypatch.setattr(check, "cases", lambda: few)
    monkeypatch.setattr(fastrnn.GRU, "forward", planted(change)(fastrnn.GRU.forward))
    row = check.checked("cpu", "float32")
    assert not row.ok
    assert re.search(what, str(row)), row


@cpu_only
def test_torchs_own_kernels_are_no_success(monkeypatch):
    counts = iter([{"gru on cpu": 1}, {"gru on cpu": 2}])
    monkeypatch.setattr(fastrnn, "fallbacks", lambda: next(counts))
    row = check.checked("cpu", "float32")
    assert not row.ok
    assert str(row).endswith("torch's own kernel ran: gru on cpu")


@cpu_only
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", "ended by SIGSEGV"),
        ("echo details >&2; echo 'ImportError: the reason' >&2; exit 1", "ImportError: the reason"),
        ("exit 3", "ended with status 3"),
        ("exec sleep 100", "took more than 1 s"),
        ("""echo '["cpu", "generic", "float64", 0.1, ""]'""", "ended with status 0"),
    ],
)
def test_process_that_fails(script, reason, executable, monkeypatch):
    """The rows that it printed before are kept, if they are of the instruction set."""
    row = """echo '["cpu", "avx2", "float32", 0.5, ""]'"""
    path = executable("python", f"PATH=/usr/bin:/bin\n{row}\n{script}")
    monkeypatch.setattr(check.sys, "executable", path)
    monkeypatch.setattr(check, "LIMIT", 1)
    first, second = check._process("cpu", "avx2", ["float32", "float64"])
    assert first == ("cpu", "avx2", "float32", 0.5, "")
    assert second == ("cpu", "avx2", "float64", math.inf, reason)


@pytest.mark.slow
@cpu_only
def test_check_of_every_instruction_set():
    result = python("-m", "fastrnn", "check", "--device", "cpu", "--dtype", "float32")
    assert result.returncode == 0, result.stdout + result.stderr
    supported = fastrnn.build_info()["isa_supported"]
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("cpu ")]
    assert [row[:4] for row in rows] == [["cpu", isa, "float32", "ok"] for isa in supported]
    assert f"all {len(supported)} ok, in " in result.stdout
    assert lines_of(result.stdout)["fastrnn"] == fastrnn.__version__


@cpu_only
def test_check_of_a_wrong_layer(tmp_path):
    copy = tmp_path / "fastrnn"
    shutil.copytree(PACKAGE, copy)
    with (copy / "modules.py").open("a") as file:
        file.write(
            "\nforward = LSTM.forward\n"
            "def wrong(self, *args):\n"
            "    output, (h, c) = forward(self, *args)\n"
            "    return output, (h, c + 0.01)\n"
            "LSTM.forward = wrong\n"
        )
    isa = fastrnn.build_info()["isa_supported"][0]
    result = in_copy(tmp_path, "-m", "fastrnn", "check", "--isa", isa, "--dtype", "float32")
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"^cpu +{isa} +float32 +FAILED .+ LSTM .+: c_n", result.stdout, re.MULTILINE)
    assert "1 of 1 failed, in " in result.stdout
