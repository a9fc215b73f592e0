"""What csrc/toolchain.py and csrc/build.py decide, and how they fail."""

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import build
import toolchain
from toolchain import BuildError, Python, Torch

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "FASTRNN_CUDA", "FASTRNN_ISAS", "CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cuda_home(tmp_path):
    """A folder with an nvcc that reports version 13.0."""
    return script(tmp_path / "bin/nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")


def script(path, text):
    """Writes an executable script; returns the folder of its bin/."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path.parent.parent


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# --- torch ----------------------------------------------------------------------------------------


def unpacked(folder, version="2.6.0+cu124", cuda="'12.4'", symbols=b""):
    (folder / "torch/lib").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ncuda = {cuda}\n")
    (folder / "torch/lib/libc10.so").write_bytes(symbols)
    return folder / "torch"


def test_torch_is_described_by_its_folder(tmp_path):
    found = Torch.at(unpacked(tmp_path))
    assert (found.version, found.minor, found.cuda) == ("2.6.0+cu124", "2.6", "12.4")
    assert not found.cxx11_abi
    new = b"_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_string"
    assert Torch.at(unpacked(tmp_path / "new", cuda=None, symbols=new)).cxx11_abi


def test_the_installed_torch():
    found = Torch.installed()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert found.cxx11_abi == torch._C._GLIBCXX_USE_CXX11_ABI


def test_the_torch_of_the_environment_is_found_in_an_isolated_build(tmp_path, monkeypatch):
    """Where it is not importable, as in pip's isolated builds."""
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert Torch.installed() is None
    unpacked(tmp_path)
    assert Torch.installed().version == "2.6.0+cu124"


# --- instruction sets -----------------------------------------------------------------------------


def test_instruction_sets_that_are_requested(monkeypatch):
    monkeypatch.setattr(toolchain, "ISA_FLAGS", {"generic": [], "wide": ["-mwide"]})
    monkeypatch.setattr(toolchain, "BFLOAT16_FLAGS", {"wide_bf16": ["-mwide", "-mbf16"]})
    assert toolchain.isas("all") == ["generic", "wide", "wide_bf16"]
    assert toolchain.isas("wide,generic") == ["generic", "wide"]
    # Its kernels of other types are those of the widest set of all types.
    assert toolchain.isas("wide_bf16") == ["wide", "wide_bf16"]
    with pytest.raises(BuildError) as error:
        toolchain.isas("wide,avx3")
    expected = "FASTRNN_ISAS has avx3, expected all or some of: generic,wide,wide_bf16"
    assert one_line(error) == expected


def test_the_instruction_sets_of_this_cpu():
    """By default the build has the widest set that this CPU has."""
    names = toolchain.isas(None)
    capability = torch.backends.cpu.get_cpu_capability()
    known = {"AVX2": "avx2", "AVX512": "avx512", "DEFAULT": "generic"}
    if "ATEN_CPU_CAPABILITY" in os.environ or capability not in known:
        pytest.skip(f"torch reports {capability}")
    assert names[0] == known[capability]
    assert ("avx512_bf16" in names) == torch.cpu._is_avx512_bf16_supported()


def test_instruction_sets_that_dispatch_is_given():
    given = toolchain.for_each_isa(["generic"])
    assert given == "X(generic, generic)"


@pytest.mark.parametrize(
    ("platform", "sets", "macros"),
    [
        (
            "linux-x86_64",
            "X(generic, generic) X(avx2, avx2) X(avx512, avx512) X(avx512_bf16, avx512)"
            " X(amx, avx512)",
            ["-DFASTRNN_X86"],
        ),
        (
            "linux-aarch64",
            "X(generic, generic) X(neon, neon) X(neon_bf16, neon)",
            ["-DFASTRNN_ARM64"],
        ),
        ("linux-riscv64", "X(generic, generic)", []),
    ],
)
def test_instruction_sets_of_a_machine(monkeypatch, platform, sets, macros):
    monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
    facts = runpy.run_path(toolchain.__file__)
    assert facts["for_each_isa"](facts["isas"]("all")) == sets
    assert facts["CPU_MACROS"] == macros


# --- CUDA -----------------------------------------------------------------------------------------


def test_nvcc_version(cuda_home, tmp_path, monkeypatch):
    assert toolchain.nvcc_version(str(cuda_home)) == "13.0"
    assert toolchain.nvcc_version(str(tmp_path / "nowhere")) is None
    monkeypatch.setenv("PATH", str(cuda_home / "bin"), prepend=":")
    assert toolchain.nvcc_version(None) == "13.0"
    # With CUDA_HOME, PATH is not searched.
    assert toolchain.nvcc_version(str(tmp_path / "nowhere")) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.nvcc_version(None) is None


@pytest.mark.parametrize("text", ["echo 'no licence'", "echo 'release 13.0, V13.0.88'; exit 1"])
def test_nvcc_that_does_not_work(cuda_home, text):
    script(cuda_home / "bin/nvcc", text)
    assert toolchain.nvcc_version(str(cuda_home)) is None


def test_nvcc_that_is_not_executable(cuda_home):
    (cuda_home / "bin" / "nvcc").chmod(0o644)
    assert toolchain.nvcc_version(str(cuda_home)) is None


def test_toolkit_is_the_one_that_nvcc_reports(cuda_home, tmp_path, monkeypatch):
    """The nvcc in PATH is a script that runs the nvcc of another folder."""
    script(tmp_path / "local/bin/nvcc", f"exec {cuda_home}/bin/nvcc")
    script(cuda_home / "bin/nvcc", f"echo '#$ TOP={cuda_home}/bin/..' >&2")
    monkeypatch.setenv("PATH", str(tmp_path / "local/bin"))
    assert toolchain.cuda_toolkit() == str(cuda_home.resolve())
    script(cuda_home / "bin/nvcc", "")  # reports nothing
    assert toolchain.cuda_toolkit() == str((tmp_path / "local").resolve())
    monkeypatch.setenv("CUDA_PATH", "/named")
    assert toolchain.cuda_toolkit() == "/named"
    monkeypatch.setenv("CUDA_HOME", "/named/first")
    assert toolchain.cuda_toolkit() == "/named/first"


REASONS = {
    (None, None): "no nvcc was found (set CUDA_HOME)",
    (None, "13.0"): "no nvcc was found",
    ("13.0", None): "torch 2.14.1 was built without CUDA",
    ("12.8", "13.0"): "nvcc is 12.8, torch was built with CUDA 13.0",
    ("13.0", "12.8"): "nvcc is 13.0, torch was built with CUDA 12.8",
    ("1.0", "13.0"): "nvcc is 1.0",  # majors are numbers, not prefixes
    ("13.2", "13.0"): None,
    ("13.0", "13.0"): None,
}


@pytest.mark.parametrize("forced", [None, "", "0", "1"])
def test_whether_cuda_is_built(forced):
    for (nvcc, cuda), reason in REASONS.items():
        built_for = Torch(Path("torch"), "2.14.1", cuda)
        if forced == "0":
            off = toolchain.why_no_cuda(forced, nvcc, built_for, gpu=True)
            assert off == "turned off by FASTRNN_CUDA=0"
        elif reason is None:
            assert toolchain.why_no_cuda(forced, nvcc, built_for, gpu=True) is None
            without = toolchain.why_no_cuda(forced, nvcc, built_for, gpu=False)
            assert (without is None) == (forced == "1")
            assert without is None or "has no GPU" in without
        elif forced == "1":
            with pytest.raises(BuildError, match="FASTRNN_CUDA=1, but") as error:
                toolchain.why_no_cuda(forced, nvcc, built_for, gpu=False)
            assert reason in one_line(error)
        else:
            assert reason in toolchain.why_no_cuda(forced, nvcc, built_for, gpu=False)


def test_unknown_value_is_rejected():
    for forced, nvcc, cuda in itertools.product(
        ["yes", "2", "01", "1 ", "true"], [None, "13.0"], [None, "13.0"]
    ):
        with pytest.raises(BuildError) as error:
            toolchain.why_no_cuda(forced, nvcc, Torch(Path("torch"), "2.14.1", cuda), gpu=True)
        assert one_line(error) == f"FASTRNN_CUDA is '{forced}', expected 0 or 1"


def test_cuda_archs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.cuda_archs("8.6;9.0+PTX") == "8.6;9.0+PTX"
    assert toolchain.cuda_archs(None) == toolchain.cuda_archs("") == toolchain.CUDA_ARCHS
    script(tmp_path / "nvidia-smi", "echo 8.9; echo 9.0; echo 8.9")
    assert toolchain.cuda_archs(None) == "8.9;9.0"


def test_flags_of_cuda_archs():
    assert toolchain.gencode("8.0;9.0a+PTX") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90a,code=compute_90a"),
    ]
    for archs in ["Hopper", "9", "8.0 sm_90"]:
        with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST has"):
            toolchain.gencode(archs)


# --- what goes wrong ------------------------------------------------------------------------------


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler: 'no-such-compiler'.*apt install g\+\+"
    ):
        toolchain.compiler_macros()


@pytest.mark.parametrize(
    ("macro", "message"),
    [
        ("__GNUC__ 9", r"GCC 9, expected GCC 11 or newer"),
        ("__clang_major__ 13", r"clang 13, expected clang 14 or newer"),
    ],
)
def test_compiler_too_old(tmp_path, monkeypatch, macro, message):
    script(tmp_path / "bin/c++", f"echo '#define {macro}'")
    monkeypatch.setenv("CXX", str(tmp_path / "bin/c++"))
    with pytest.raises(BuildError, match=message) as error:
        toolchain.compiler_macros()
    assert "set CXX" in one_line(error)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of lib/ and build/, where everything is built by a compiler that does nothing."""
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    monkeypatch.setenv("FASTRNN_ISAS", "generic")
    monkeypatch.setenv("FASTRNN_CUDA", "0")
    compiles_as(tmp_path, monkeypatch, "exit 0")
    return tmp_path


def compiles_as(place, monkeypatch, text):
    real = shutil.which("c++")
    writes = 'for last; do :; done; echo built > "$last"'
    first = f'case "$*" in *-dM*|--version) exec {real} "$@";; esac'
    script(place / "bin/c++", f"{first}\n{writes}\n{text}")
    monkeypatch.setenv("CXX", str(place / "bin/c++"))


def built(place):
    lib = place / "lib"
    return sorted(str(p.relative_to(lib)) for p in lib.rglob("*") if p.is_file())


def test_what_is_built(place, monkeypatch, capfd):
    """One library of kernels, and a binding for each torch and Python."""
    for version, suffix in [("2.6.1", ".cpython-310.so"), ("2.13.0", ".cpython-314t.so")]:
        torch_there = Torch.at(unpacked(place / version, version, None))
        found = build.build(torch_there, place / "lib", Python("/include", suffix))
        assert all(path.read_text() == "built\n" for path in found)
    kernels = f"libfastrnn_cpu-{build.headers_hash()}.so"
    bindings = ["torch2.13-cpu/_C.cpython-314t.so", "torch2.6-cpu/_C.cpython-310.so"]
    assert built(place) == [kernels, *bindings]
    assert re.search(r"^\[1/\d+\] ", capfd.readouterr().err, re.MULTILINE)  # how far it is
    # Kernels with other headers take the place of these, which no new binding loads.
    monkeypatch.setattr(build, "headers_hash", lambda: "0123abcd")
    build.build(torch_there, place / "lib", Python("/include", suffix))
    assert built(place) == ["libfastrnn_cpu-0123abcd.so", *bindings]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'fatal error: Killed signal terminated program cc1plus'; exit 1",
         r"out of memory with 3 files at a time, of up to \d.* each: MAX_JOBS=1"),
        ("echo 'error: No space left on device'; exit 1", "no space is left"),
        ("echo 'error: expected ;'; exit 1", "the compiler failed: its messages are above"),
    ],
)  # fmt: skip
def test_compiler_that_fails(place, monkeypatch, capfd, text, message):
    compiles_as(place, monkeypatch, text)
    monkeypatch.setenv("MAX_JOBS", "3")
    torch_there = Torch.at(unpacked(place))
    with pytest.raises(BuildError, match=message) as error:
        build.build(torch_there, place / "lib", Python("/include", ".so"))
    one_line(error)
    assert text.split("'")[1] in capfd.readouterr().err
    assert built(place) == []


@pytest.mark.parametrize("folder", ["build", "lib"])
def test_folder_that_cannot_be_written(place, folder):
    (place / folder).write_text("a file")
    torch_there = Torch.at(unpacked(place))
    with pytest.raises(BuildError, match=f"can't write to .*{folder}") as error:
        build.build(torch_there, place / "lib", Python("/include", ".so"))
    one_line(error)


def test_no_ninja(place, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *args, **options: None)
    with pytest.raises(BuildError, match="no ninja: `pip install ninja`"):
        build.build(Torch.at(unpacked(place)), place / "lib", Python("/include", ".so"))


def setup_py(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_setup_py_says_what_is_wrong_in_one_line(tmp_path):
    where = ["build_ext", "--build-lib", str(tmp_path)]
    done = setup_py(*where, CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fastrnn: no C++ compiler: 'no-such-compiler'")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_metadata(tmp_path):
    """The package's metadata has the licence, its file and the README."""
    done = setup_py("egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (info,) = tmp_path.glob("*/PKG-INFO")
    metadata = Parser().parsestr(info.read_text())
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"].lower() in (ROOT / "LICENSE").read_text()
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
