"""setup.py's decisions before anything is compiled."""

import importlib.util
import itertools
import os
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]


@pytest.fixture(scope="module")
def setup():
    path = Path(__file__).parent.parent / "setup.py"
    spec = importlib.util.spec_from_file_location("fastrnn_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(tmp_path):
    """A folder with an nvcc that reports version 13.0."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_nvcc_version(setup, cuda_home, tmp_path, monkeypatch):
    assert setup.nvcc_version(str(cuda_home)) == "13.0"
    assert setup.nvcc_version(str(tmp_path / "nowhere")) is None
    monkeypatch.setenv("PATH", str(cuda_home / "bin"), prepend=":")
    assert setup.nvcc_version(None) == "13.0"
    # With CUDA_HOME, PATH is not searched.
    assert setup.nvcc_version(str(tmp_path / "nowhere")) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.nvcc_version(None) is None


@pytest.fixture
def no_cuda_variables(monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)


def test_toolkit_is_the_one_that_nvcc_reports(
    setup, cuda_home, tmp_path, monkeypatch, no_cuda_variables
):
    """The nvcc in PATH is a script that runs the nvcc of another folder."""
    script = tmp_path / "local" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\nexec {cuda_home}/bin/nvcc\n")
    script.chmod(0o755)
    (cuda_home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={cuda_home}/bin/..' >&2\n")
    monkeypatch.setenv("PATH", str(script.parent))
    assert setup.cuda_toolkit() == str(cuda_home.resolve())
    (cuda_home / "bin" / "nvcc").write_text("#!/bin/sh\n")  # reports nothing
    assert setup.cuda_toolkit() == str((tmp_path / "local").resolve())
    monkeypatch.setenv("CUDA_PATH", "/named")
    assert setup.cuda_toolkit() == "/named"
    monkeypatch.setenv("CUDA_HOME", "/named/first")
    assert setup.cuda_toolkit() == "/named/first"


def test_toolkit_is_torchs_without_nvcc_in_path(setup, tmp_path, monkeypatch, no_cuda_variables):
    monkeypatch.setenv("PATH", str(tmp_path))
    for found in [None, "/usr/local/cuda"]:
        monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", found)
        assert setup.cuda_toolkit() == found


def test_extension_is_built_with_that_toolkit(setup, cuda_home, monkeypatch):
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", "/somewhere/else")
    monkeypatch.setattr(setup.torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("FASTRNN_CUDA", raising=False)
    (cuda_home / "lib64").mkdir()
    assert str(cuda_home / "include") in setup.extension().include_dirs


def test_nvcc_without_release(setup, cuda_home):
    (cuda_home / "bin" / "nvcc").write_text("#!/bin/sh\necho 'no licence'\n")
    assert setup.nvcc_version(str(cuda_home)) is None


def test_nvcc_that_is_not_executable(setup, cuda_home):
    (cuda_home / "bin" / "nvcc").chmod(0o644)
    assert setup.nvcc_version(str(cuda_home)) is None


REASONS = {
    (None, None): "no nvcc was found (set CUDA_HOME)",
    (None, "13.0"): "no nvcc was found",
    ("13.0", None): "was built without CUDA",
    ("12.8", "13.0"): "nvcc is 12.8, torch was built with CUDA 13.0",
    ("13.0", "12.8"): "nvcc is 13.0, torch was built with CUDA 12.8",
    ("1.0", "13.0"): "nvcc is 1.0",  # majors are numbers, not prefixes
    ("13.2", "13.0"): None,
    ("13.0", "13.0"): None,
}


@pytest.mark.parametrize("forced", [None, "", "0", "1"])
def test_whether_cuda_is_built(setup, forced):
    for (nvcc, torch_cuda), reason in REASONS.items():
        if forced == "0":
            assert setup.why_no_cuda(forced, nvcc, torch_cuda) == "turned off by FASTRNN_CUDA=0"
        elif reason is None:
            assert setup.why_no_cuda(forced, nvcc, torch_cuda) is None
        elif forced == "1":
            with pytest.raises(SystemExit, match="FASTRNN_CUDA=1, but") as error:
                setup.why_no_cuda(forced, nvcc, torch_cuda)
            assert reason in str(error.value)
            assert "\n" not in str(error.value)
        else:
            assert reason in setup.why_no_cuda(forced, nvcc, torch_cuda)


def test_unknown_value_is_rejected(setup):
    for forced, nvcc, torch_cuda in itertools.product(
        ["yes", "2", "01", "1 ", "true"], [None, "13.0"], [None, "13.0"]
    ):
        with pytest.raises(SystemExit) as error:
            setup.why_no_cuda(forced, nvcc, torch_cuda)
        assert str(error.value) == f"fastrnn: FASTRNN_CUDA is '{forced}', expected 0 or 1"


def macros(extension):
    return dict(extension.define_macros)


@pytest.mark.parametrize(
    ("forced", "reason"),
    [
        (None, "no nvcc was found (set CUDA_HOME)"),
        ("0", "turned off by FASTRNN_CUDA=0"),
    ],
)
def test_extension_records_why_it_has_no_cuda(setup, monkeypatch, capsys, forced, reason):
    monkeypatch.setattr(setup, "nvcc_version", lambda home: None)
    monkeypatch.delenv("FASTRNN_CUDA", raising=False)
    if forced is not None:
        monkeypatch.setenv("FASTRNN_CUDA", forced)
    found = macros(setup.extension())
    assert found["FASTRNN_CUDA_NOTE"] == f'"{reason}"'
    assert found["FASTRNN_CUDA_ARCHS"] == '""'
    assert found["FASTRNN_TORCH_VERSION"] == f'"{setup.torch.__version__}"'
    assert reason in capsys.readouterr().err


def test_cuda_forced_without_nvcc_stops_the_build(setup, monkeypatch):
    monkeypatch.setattr(setup, "nvcc_version", lambda home: None)
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    with pytest.raises(SystemExit) as error:
        setup.extension()
    assert str(error.value) == "fastrnn: FASTRNN_CUDA=1, but no nvcc was found (set CUDA_HOME)"


def test_kernels_are_compiled_by_build_ext(setup, monkeypatch):
    """Kernels are compiled once for each instruction set, all other sources once."""
    monkeypatch.setenv("FASTRNN_CUDA", "0")
    names = {Path(source).name for source in setup.extension().sources}
    assert {"operators.cpp", "check.cpp", "dispatch.cpp"} <= names
    assert not [name for name in names if name.startswith("kernels_")]
    assert next(iter(setup.ISA_FLAGS)) == "generic"
    assert setup.ISA_FLAGS["generic"] == []  # runs anywhere


def test_instruction_sets_that_dispatch_is_given(setup, monkeypatch):
    monkeypatch.setattr(setup, "ISA_FLAGS", {"generic": [], "wide": ["-mwide"]})
    monkeypatch.setattr(setup, "BFLOAT16_FLAGS", {"wide_bf16": ["-mwide", "-mbf16"]})
    expected = "X(generic, generic) X(wide, wide) X(wide_bf16, wide)"
    assert setup.for_each_isa() == expected
    monkeypatch.setenv("FASTRNN_CUDA", "0")
    flags = setup.extension().extra_compile_args
    assert f"-DFASTRNN_FOR_EACH_ISA(X)={expected}" in flags["cxx"]
    assert not [flag for flag in flags["nvcc"] if "ISA" in flag]  # it splits them at commas
    monkeypatch.setattr(setup, "BFLOAT16_FLAGS", {})
    monkeypatch.setattr(setup, "ISA_FLAGS", {"generic": []})
    assert setup.for_each_isa() == "X(generic, generic)"


def test_cuda_archs(setup, monkeypatch):
    assert setup.cuda_archs("8.6;9.0+PTX", gpu=False) == "8.6;9.0+PTX"
    monkeypatch.setattr(setup.torch.cuda, "get_device_capability", lambda: (8, 9))
    assert setup.cuda_archs(None, gpu=True) == "8.9"
    torch_archs = ["sm_50", "sm_80", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setattr(setup.torch.cuda, "get_arch_list", lambda: torch_archs)
    assert setup.cuda_archs(None, gpu=False) == "8.0;9.0;12.0+PTX"
    assert setup.cuda_archs("", gpu=False) == "8.0;9.0;12.0+PTX"
    monkeypatch.setattr(setup.torch.cuda, "get_arch_list", list)
    assert setup.cuda_archs(None, gpu=False) == "8.0;9.0+PTX"  # torch without CUDA lists none


def test_nvcc_that_fails(setup, cuda_home):
    (cuda_home / "bin" / "nvcc").write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\nexit 1\n")
    assert setup.nvcc_version(str(cuda_home)) is None


def test_headers_of_torchs_nvidia_packages(setup, tmp_path, monkeypatch):
    """The headers that torch's CUDA headers include come with the wheels, in nvidia/*/include."""
    packages = tmp_path / "site-packages"
    for name in ["torch", "nvidia/cu13/include", "nvidia/cusparselt/include", "nvidia/nccl/lib"]:
        (packages / name).mkdir(parents=True)
    monkeypatch.setattr(setup.torch, "__file__", str(packages / "torch" / "__init__.py"))
    found = [Path(p).relative_to(packages).as_posix() for p in setup.nvidia_includes()]
    assert found == ["nvidia/cu13/include", "nvidia/cusparselt/include"]
    monkeypatch.setattr(setup.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert setup.nvidia_includes() == []


def test_metadata(tmp_path):
    """The package's metadata has the licence, its file and the README."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=root, env={**os.environ, "FASTRNN_CUDA": "0"}, check=True)
    (info,) = tmp_path.glob("*/PKG-INFO")
    metadata = Parser().parsestr(info.read_text())
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"].lower() in (root / "LICENSE").read_text()
    assert metadata.get_payload().strip() == (root / "README.md").read_text().strip()
