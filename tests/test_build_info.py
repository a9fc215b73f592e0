"""build_info() and `python -m fastrnn info` tell the truth."""

import os
import subprocess
import sys

import pytest
import torch

import fastrnn

pytestmark = pytest.mark.once


def run(code_or_module, **environment):
    command = [sys.executable, *code_or_module]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_build_info():
    info = fastrnn.build_info()
    assert info["version"] == fastrnn.__version__
    assert info["torch"] == info["torch_running"] == torch.__version__
    assert info["isa"] in info["isa_supported"]
    assert set(info["isa_supported"]) <= set(info["isa_compiled"])
    assert info["isa_compiled"][0] == info["isa_supported"][0] == "generic"
    assert info["openmp"] >= 201511
    assert info["compiler"]
    if torch.version.cuda is None:
        assert info["cuda_archs"] == []
        assert "without CUDA" in info["cuda"]
    assert bool(info["cuda_archs"]) == (info["cuda"] == "built")


def test_the_instruction_sets_are_those_of_this_cpu():
    capability = torch.backends.cpu.get_cpu_capability().lower()  # torch's own finding
    if "ATEN_CPU_CAPABILITY" in os.environ or capability not in ["avx2", "avx512", "default"]:
        pytest.skip(f"torch says {capability}")
    supported = fastrnn.build_info()["isa_supported"]
    assert ("avx512" in supported) == (capability == "avx512")
    assert ("avx2" in supported) == (capability != "default")


def test_info_command():
    info = fastrnn.build_info()
    result = run(["-m", "fastrnn", "info"])
    assert result.returncode == 0, result.stderr
    for key in ["version", "torch", "isa", "openmp", "compiler", "cuda"]:
        assert str(info[key]) in result.stdout
    for name in [*info["isa_compiled"], *fastrnn.CELLS]:
        assert name in result.stdout
    assert run(["-m", "fastrnn"]).returncode == 2


@pytest.mark.parametrize("cap", ["generic", "avx2", "avx512"])
def test_a_cap_of_the_instruction_set(cap):
    order = ["generic", "avx2", "avx512"]
    allowed = order[: order.index(cap) + 1]
    best = [isa for isa in fastrnn.build_info()["isa_supported"] if isa in allowed][-1]
    code = "import fastrnn; print(fastrnn.build_info()['isa'])"
    result = run(["-c", code], FASTRNN_ISA=cap)
    assert result.stdout.strip() == best, result.stderr


def test_an_unknown_cap_is_an_error_that_names_it():
    code = "import fastrnn; fastrnn.LSTM(2, 3)(__import__('torch').zeros(1, 1, 2))"
    result = run(["-c", code], FASTRNN_ISA="avx3")
    assert result.returncode == 1
    assert "FASTRNN_ISA is 'avx3', expected one of: generic" in result.stderr


def test_importing_changes_no_setting_of_torch():
    code = """
import torch
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.random.get_rng_state().tolist(),
            torch.nn.LSTM, torch.nn.LSTM.__init__, torch.nn.LSTM.forward, torch.lstm)
before = state()
import fastrnn
assert state() == before
"""
    result = run(["-c", code])
    assert result.returncode == 0, result.stderr
