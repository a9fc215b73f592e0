"""Compiles fastrnn with ninja, into the folder fastrnn/lib:

    csrc/cpu   ->  libfastrnn_cpu-<headers>.so     the kernels: nothing of torch, one for all torch
    csrc/cuda  ->  libfastrnn_cuda-<headers>.so    the same for GPUs, if they are built
    csrc/torch ->  torch<minor>-<cpu|cuda13>/_C.<Python>.so   the binding, for one torch and Python

<headers> is a hash of the headers that both sides include, so that a binding loads only kernels
that it was compiled for. fastrnn/binding.py chooses the binding when fastrnn is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from toolchain import (
    CPU_MACROS,
    CXX_FLAGS,
    ISA_FLAGS,
    BuildError,
    Python,
    Torch,
    compiler_macros,
    cuda_archs,
    cuda_toolkit,
    cxx,
    for_each_isa,
    gpus,
    isas,
    kernel_flags,
    nvcc,
    nvcc_flags,
    nvcc_version,
    output_of,
    why_no_cuda,
)

CSRC = Path(__file__).resolve().parent
BUILD = CSRC.parent / "build"

#: What a compiler of a kernel needs at most.
MEMORY = "1.1 GB"


# --- ninja ----------------------------------------------------------------------------------------


def words(*parts: str) -> str:
    """A command for ninja and the shell."""
    return " ".join(map(shlex.quote, parts)).replace("$", "$$")


class Manifest:
    """A build.ninja in a folder of its own: compiled objects, and one library of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "rule compile",
            "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule link",
            "  command = $compiler -shared $in $flags -o $out",
            "  description = $out",
        ]
        self.objects: list[str] = []

    def compile(self, source: Path, compiler: list[str], flags: list[str], copy: str = "") -> None:
        name = str(source.relative_to(CSRC))
        target = f"{copy}/{name}.o".lstrip("/")
        self.objects.append(target)
        self.add(target, "compile", [str(source)], compiler, flags)

    def add(
        self, out: str, rule: str, sources: list[str], compiler: list[str], flags: list[str]
    ) -> None:
        escaped = " ".join(re.sub(r"([ :$])", r"$\1", source) for source in sources)
        self.lines.append(f"build {out}: {rule} {escaped}")
        self.lines += [f"  compiler = {words(*compiler)}", f"  flags = {words(*flags)}"]

    def link(self, name: str, compiler: list[str], flags: list[str]) -> Path:
        """Compiles all and links the library; returns where it is.

        Raises:
            BuildError: ninja failed; what it printed is on stderr.
        """
        self.add(name, "link", self.objects, compiler, flags)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        except OSError as error:
            raise BuildError(f"can't write to {error.filename}: {error.strerror}") from None
        run_ninja(self.folder)
        return self.folder / name


def run_ninja(folder: Path) -> None:
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise BuildError("no ninja: `pip install ninja`")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    output = ""
    with subprocess.Popen(
        [ninja, "-C", str(folder), "-j", jobs],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)  # how far it is: csrc/progress.py
            output += line
    if process.returncode == 0:
        return
    if re.search(r"out of memory|virtual memory exhausted|Killed|signal 9", output):
        raise BuildError(
            f"the compiler ran out of memory with {jobs} files at a time, of up to "
            f"{MEMORY} each: MAX_JOBS=1 compiles one at a time"
        )
    if "No space left on device" in output:
        raise BuildError(f"no space is left on the disk of {folder}")
    raise BuildError("the compiler failed: its messages are above")


def given(variable: str) -> list[str]:
    """The flags in an environment variable."""
    return shlex.split(os.environ.get(variable, ""))


# --- the libraries of kernels ---------------------------------------------------------------------


def headers_hash() -> str:
    """Of all headers that csrc/torch shares with the kernels."""
    headers = [p for p in sorted(CSRC.rglob("*.h")) if CSRC / "torch" not in p.parents]
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in headers)).hexdigest()[:8]


def cpu_library(names: list[str]) -> Path:
    """Builds csrc/cpu for these instruction sets."""
    manifest = Manifest(BUILD / "cpu")
    flags = [*CXX_FLAGS, *given("CPPFLAGS"), *given("CXXFLAGS")]
    # The slowest first.
    sources = sorted((CSRC / "cpu").glob("*.cpp"), key=lambda p: ("16" not in p.name, p.name))
    for source in sources:
        if not source.name.startswith("kernels_"):
            listed = f"-DFASTRNN_FOR_EACH_ISA(X)={for_each_isa(names)}"
            manifest.compile(source, cxx(), [*flags, *CPU_MACROS, listed])
            continue
        for name in names:
            if name in ISA_FLAGS or "bfloat16" in source.name:
                manifest.compile(source, cxx(), [*flags, *kernel_flags(name)], name)
    library = f"libfastrnn_cpu-{headers_hash()}.so"
    return manifest.link(library, cxx(), ["-fopenmp", f"-Wl,-soname,{library}", *given("LDFLAGS")])


def cuda_library(toolkit: str, archs: str) -> Path:
    """Builds csrc/cuda for these architectures."""
    manifest = Manifest(BUILD / "cuda")
    includes = ["-isystem", os.path.join(toolkit, "include")]
    for source in sorted((CSRC / "cuda").rglob("*.cu")):
        manifest.compile(source, nvcc(toolkit), nvcc_flags(archs))
    for source in sorted((CSRC / "cuda").rglob("*.cpp")):
        manifest.compile(source, cxx(), [*CXX_FLAGS, *includes, *given("CXXFLAGS")])
    library = f"libfastrnn_cuda-{headers_hash()}.so"
    where = [f"-L{os.path.join(toolkit, 'lib64')}", "-lcudart"]
    return manifest.link(library, cxx(), [*where, f"-Wl,-soname,{library}", *given("LDFLAGS")])


# --- the binding ----------------------------------------------------------------------------------


def text_macros(values: Mapping[str, str]) -> list[str]:
    return [f'-D{name}="{value}"' for name, value in values.items()]


def binding(
    torch: Torch,
    python: Python,
    kernels: list[Path],
    *,
    cuda: str | None,
    note: str,
    archs: str,
) -> Path:
    """Builds csrc/torch.

    Args:
        kernels: the libraries to link with.
        cuda: the toolkit's folder, or None for a binding without CUDA.
        note: "built", or why it has no CUDA kernels.
        archs: the architectures of the CUDA kernels, or "".
    """
    place = f"torch{torch.minor}-{torch.cuda_build if cuda else 'cpu'}"
    manifest = Manifest(BUILD / f"{place}{python.suffix}")
    version = (output_of([*cxx(), "--version"]) or "unknown").splitlines()[0]
    include = torch.folder / "include"
    folders = [include, include / "torch" / "csrc" / "api" / "include", Path(python.include)]
    flags = [*CXX_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}"]
    flags += [part for folder in folders for part in ("-isystem", str(folder))]
    # torch's CUDA headers include headers that come with the wheels that it depends on.
    if cuda:
        nvidia = sorted((torch.folder.parent / "nvidia").glob("*/include"))
        cuda_folders = [Path(cuda, "include"), *nvidia]
        flags += [part for folder in cuda_folders for part in ("-isystem", str(folder))]
        flags += ["-DFASTRNN_HAS_CUDA"]
    flags += [*CPU_MACROS, *given("CPPFLAGS"), *given("CXXFLAGS")]
    flags += text_macros(
        {
            "FASTRNN_TORCH_VERSION": torch.version,
            "FASTRNN_COMPILER": version,
            "FASTRNN_CUDA_NOTE": note,
            "FASTRNN_CUDA_ARCHS": archs,
        }
    )
    for source in sorted((CSRC / "torch").rglob("*.cpp")):
        if cuda or "cuda" not in source.parts:
            manifest.compile(source, cxx(), flags)
    libraries = ["c10", "torch_cpu", "torch", "torch_python"]
    libraries += ["c10_cuda", "torch_cuda"] if cuda else []
    link = [
        "-fopenmp",
        "-Wl,--no-as-needed",
        f"-L{torch.folder / 'lib'}",
        *(f"-l{name}" for name in libraries),
    ]
    link += [f"-L{os.path.join(cuda, 'lib64')}", "-lcudart"] if cuda else []
    link += [*map(str, kernels), "-Wl,-rpath,$ORIGIN/..", *given("LDFLAGS")]
    return manifest.link(f"{place}/_C{python.suffix}", cxx(), link)


# --- all of it ------------------------------------------------------------------------------------


def install(built: Path, to: Path) -> Path:
    """Copies a library, in one step: a process that has loaded the old one keeps it."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        new = to / f".{built.name}.new"
        shutil.copy(built, new)
        os.replace(new, to / built.name)
    except OSError as error:
        raise BuildError(f"can't write to {error.filename}: {error.strerror}") from None
    return to / built.name


def build(torch: Torch, lib: Path, python: Python | None = None) -> list[Path]:
    """Builds the kernels, and the binding for one torch and Python, into the folder `lib`.

    Everything is compiled before anything is copied there. Returns what is built.

    Args:
        torch, python: what the binding is for; Python: the running one.
        lib: the folder.

    Environment: FASTRNN_ISAS, FASTRNN_CUDA, TORCH_CUDA_ARCH_LIST, CXX, CPPFLAGS, CXXFLAGS, LDFLAGS,
    CUDA_HOME, MAX_JOBS (see README.md, and docs/installing.md).

    Raises:
        BuildError: with what is wrong, and what to do.
    """
    compiler_macros()  # whether there is a compiler, and new enough
    toolkit = cuda_toolkit()
    reason = why_no_cuda(os.environ.get("FASTRNN_CUDA"), nvcc_version(toolkit), torch, bool(gpus()))
    archs = "" if reason else cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    kernels = [cpu_library(isas(os.environ.get("FASTRNN_ISAS")))]
    cuda = None
    if reason is None:
        cuda = toolkit
        kernels.append(cuda_library(str(toolkit), archs))
    note = reason or "built"
    built = binding(torch, python or Python.running(), kernels, cuda=cuda, note=note, archs=archs)
    installed = [install(library, lib) for library in kernels]
    installed.append(install(built, lib / built.parent.name))
    # Libraries of other headers: no binding that was built with these loads them.
    current = headers_hash()
    for old in lib.glob("libfastrnn_*.so"):
        if current not in old.name:
            old.unlink()
    return installed
