"""build_info() reports the right facts."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import slow_after
from test_isa import supported

import fastrnn
import toolchain

ORDER = [*toolchain.ISA_FLAGS, *toolchain.BFLOAT16_FLAGS]
pytestmark = [pytest.mark.once, pytest.mark.cpu("does not use any device")]


def run(code_or_module, **environment):
    command = [sys.executable, *code_or_module]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_build_info():
    info = fastrnn.build_info()
    assert set(info) == {
        *("version", "torch", "torch_running", "isa", "isa_compiled", "isa_supported"),
        *("openmp", "compiler", "cuda_archs", "cuda"),
    }
    assert info["version"] == fastrnn.__version__
    assert info["torch"] == info["torch_running"] == torch.__version__
    assert info["isa"] in info["isa_supported"]
    assert set(info["isa_supported"]) <= set(info["isa_compiled"])
    assert info["isa_compiled"] == [isa for isa in ORDER if isa in info["isa_compiled"]]
    assert info["openmp"] >= 201511
    assert info["compiler"]
    if info["cuda"] != "built":
        assert info["cuda_archs"] == []
        reasons = ["no nvcc was found", "was built without CUDA", "turned off by FASTRNN_CUDA=0"]
        reasons += ["this machine has no GPU", "torch was built with CUDA"]
        assert any(reason in info["cuda"] for reason in reasons)
    assert bool(info["cuda_archs"]) == (info["cuda"] == "built")


def test_supported_instruction_sets():
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if "ATEN_CPU_CAPABILITY" in os.environ or capability not in ["avx2", "avx512", "default"]:
        pytest.skip(f"torch reports {capability}")
    has = {
        "generic": True,
        "avx2": capability != "default",
        "avx512": capability == "avx512",
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "neon": True,
        "neon_bf16": supported("neon_bf16"),
    }
    info = fastrnn.build_info()
    compiled = {isa for isa in info["isa_compiled"] if has[isa]}
    # The operating system may deny AMX to this process.
    assert compiled - {"amx"} <= set(info["isa_supported"]) <= compiled


CODE = "import fastrnn; print(fastrnn.build_info()['isa'])"


@pytest.mark.parametrize("cap", slow_after(2, ["", *ORDER]))
def test_instruction_set_cap(cap):
    info = fastrnn.build_info()
    allowed = ORDER[: ORDER.index(cap) + 1] if cap else ORDER
    result = run(["-c", CODE], FASTRNN_ISA=cap)
    if cap and cap not in info["isa_compiled"]:
        names = ", ".join(info["isa_compiled"])
        assert f"FASTRNN_ISA is '{cap}', expected one of: {names}" in result.stderr
    else:
        best = [isa for isa in info["isa_supported"] if isa in allowed][-1]
        assert result.stdout.strip() == best, result.stderr


def test_unknown_cap_raises_an_error_that_names_it():
    """Every use of the instruction set raises it, and the interpreter keeps running."""
    code = """
import torch, fastrnn
for use in [fastrnn.build_info, lambda: fastrnn.LSTM(2, 3)(torch.zeros(1, 1, 2))] * 2:
    try:
        use()
    except (ValueError, RuntimeError) as error:
        print(error)
print(fastrnn.LSTM(2, 3, device="meta")(torch.zeros(1, 1, 2, device="meta"))[0].shape)
"""
    result = run(["-c", code], FASTRNN_ISA="avx3")
    assert result.returncode == 0, result.stderr
    *errors, shape = result.stdout.splitlines()
    assert shape == "torch.Size([1, 1, 3])"
    names = ", ".join(fastrnn.build_info()["isa_compiled"])
    assert errors == [f"FASTRNN_ISA is 'avx3', expected one of: {names}"] * 4


def test_import_changes_no_torch_settings():
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
