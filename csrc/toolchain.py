"""What there is to build with: torch, Python, compilers, their instruction sets, CUDA's toolkit.

Nothing here imports torch: it may be one that only lies unpacked on the disk.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# For C++20, and for the widest instruction set.
OLDEST_COMPILERS = {"GCC": 11, "clang": 14}
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
ARM64 = sysconfig.get_platform().endswith("aarch64")
# For what is compiled once, not for the kernels of an instruction set.
CPU_MACROS = ["-DFASTRNN_X86"] if X86 else ["-DFASTRNN_ARM64"] if ARM64 else []
# The instruction sets, from the narrowest to the widest. The kernels are compiled once for each,
# with its flags, and csrc/cpu/dispatch.cpp chooses at run time.
ISA_FLAGS: dict[str, list[str]] = {"generic": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
if ARM64:
    # Every 64-bit Arm CPU has NEON. Scheduled before registers are allocated, a tile's sums do not
    # fit into them.
    ISA_FLAGS["neon"] = ["-DFASTRNN_NEON", "-fno-schedule-insns"]
# Wider ones that differ from the last of these only in products of bfloat16: only those kernels are
# compiled for them.
BFLOAT16_FLAGS: dict[str, list[str]] = {}
if X86:
    BFLOAT16_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    BFLOAT16_FLAGS["amx"] = [*BFLOAT16_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
if ARM64:
    BFLOAT16_FLAGS["neon_bf16"] = [*ISA_FLAGS["neon"], "-march=armv8.2-a+bf16"]
# The last release of each minor version of torch that fastrnn supports, and a Python that `make
# matrix` runs it with.
TORCH_VERSIONS = {
    "2.6.0": "3.11",
    "2.7.1": "3.11",
    "2.8.0": "3.12",
    "2.9.1": "3.13",
    "2.10.0": "3.10",
    "2.11.0": "3.11",
    "2.12.1": "3.12",
    "2.13.0": "3.11",
    "2.14.1": "3.11",
    "2.15.0": "3.13",
}
# All that CUDA 13 compiles for, from the oldest whose tensor cores know bfloat16.
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


# -O3 takes twice as long to compile and is no faster: the kernels choose what to unroll and
# vectorize. GCC 12 gives -W(maybe-)uninitialized warnings in its own AVX-512 headers (PR 105593);
# clang does not know the latter.
CXX_FLAGS = ["-std=c++20", "-O2", "-g0", "-DNDEBUG", "-fPIC", "-fopenmp", "-ffp-contract=fast"]
CXX_FLAGS += ["-fno-math-errno", "-fvisibility=hidden", "-Wno-uninitialized"]
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class BuildError(Exception):
    """What keeps fastrnn from being built, in one line."""


# --- torch and Python -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    """An installed or unpacked torch, as its folder describes it."""

    folder: Path
    version: str
    cuda: str | None

    @classmethod
    def at(cls, folder: Path) -> Torch:
        facts = runpy.run_path(str(folder / "version.py"))
        return cls(folder, str(facts["__version__"]), facts["cuda"])

    @classmethod
    def installed(cls) -> Torch | None:
        """The torch of this environment, or None.

        In pip's isolated builds it is not importable, but sysconfig still names its folder.
        """
        spec = find_spec("torch")
        folders = [Path(spec.origin).parent] if spec and spec.origin else []
        folders += [Path(sysconfig.get_path(lib), "torch") for lib in ("purelib", "platlib")]
        return next((cls.at(f) for f in folders if (f / "version.py").exists()), None)

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])

    @property
    def cuda_build(self) -> str | None:
        """Its CUDA's major version, such as "cuda13"; None without CUDA."""
        return self.cuda and f"cuda{self.cuda.split('.')[0]}"

    @property
    def cxx11_abi(self) -> bool:
        """Whether it was compiled with the new ABI of std::string: not so 2.6 from PyPI."""
        return b"SourceLocationENSt7__cxx11" in (self.folder / "lib" / "libc10.so").read_bytes()


@dataclass(frozen=True)
class Python:
    """The interpreter that a binding is for: its headers, and how its modules' names end."""

    include: str
    suffix: str

    @classmethod
    def running(cls) -> Python:
        return cls(sysconfig.get_path("include"), str(sysconfig.get_config_var("EXT_SUFFIX")))


# --- compilers ------------------------------------------------------------------------------------


def output_of(command: list[str], text: str = "") -> str | None:
    """What a command prints, or None if it can't be run or fails."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiler_macros(*flags: str) -> dict[str, str]:
    """The macros that the compiler predefines.

    Raises:
        BuildError: there is no compiler, or it is too old.
    """
    name = " ".join(cxx())
    listed = output_of([*cxx(), *flags, "-x", "c++", "-dM", "-E", "-"])
    if listed is None:
        raise BuildError(
            f"no C++ compiler: '{name}' does not run; on Debian and Ubuntu `apt install g++`, or "
            "set CXX to another one"
        )
    macros = dict(re.findall(r"^#define (\w+) ?(.*)$", listed, re.MULTILINE))
    kind, macro = (
        ("clang", "__clang_major__") if "__clang_major__" in macros else ("GCC", "__GNUC__")
    )
    found, oldest = int(macros.get(macro, 0)), OLDEST_COMPILERS[kind]
    if found < oldest:
        raise BuildError(
            f"the C++ compiler is too old: '{name}' is {kind} {found}, expected {kind} {oldest} or "
            "newer; set CXX to another one"
        )
    return macros


def isas(requested: str | None) -> list[str]:
    """The instruction sets to compile for.

    Args:
        requested: FASTRNN_ISAS: "all", names separated by commas, or None or "" for the widest that
            this CPU has.
    """
    known = [*ISA_FLAGS, *BFLOAT16_FLAGS]
    if requested == "all":
        return known
    if requested:
        names = requested.split(",")
        if unknown := set(names) - set(known):
            raise BuildError(
                f"FASTRNN_ISAS has {', '.join(sorted(unknown))}, expected all or some of: "
                + ",".join(known)
            )
        # A set for bfloat16 takes its other kernels from the widest of the others.
        needed = {*names, *([list(ISA_FLAGS)[-1]] if set(names) & set(BFLOAT16_FLAGS) else [])}
        return [name for name in known if name in needed]
    base, native = compiler_macros().keys(), compiler_macros("-march=native").keys()

    def runs(flags: list[str]) -> bool:
        added = compiler_macros(*flags).keys() - base
        return {name for name in added if not name.startswith("FASTRNN")} <= native

    *_, best = [name for name, flags in ISA_FLAGS.items() if runs(flags)]
    return [best, *(name for name, flags in BFLOAT16_FLAGS.items() if runs(flags))]


def kernel_flags(isa: str) -> list[str]:
    """The flags of kernels for an instruction set."""
    return [*{**ISA_FLAGS, **BFLOAT16_FLAGS}[isa], f"-DFASTRNN_ISA={isa}"]


def for_each_isa(names: list[str]) -> str:
    """The macro FASTRNN_FOR_EACH_ISA(X): X(set, the set of its other kernels), for `names`."""
    *_, widest = [name for name in names if name in ISA_FLAGS]
    others = {name: name if name in ISA_FLAGS else widest for name in names}
    return " ".join(f"X({isa}, {other})" for isa, other in others.items())


# --- CUDA -----------------------------------------------------------------------------------------


def cuda_toolkit() -> str | None:
    """The toolkit's folder: CUDA_HOME, or that of the nvcc in PATH, or /usr/local/cuda.

    nvcc reports its folder itself: the one in PATH may be a script that runs an nvcc elsewhere.
    """
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return named
    nvcc = shutil.which("nvcc")
    if not nvcc:
        usual = Path("/usr/local/cuda")
        return str(usual) if (usual / "bin" / "nvcc").exists() else None
    steps = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    result = subprocess.run(steps, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else str(Path(nvcc).resolve().parents[1])


def nvcc(toolkit: str) -> list[str]:
    """The command of the toolkit's nvcc, or PYTORCH_NVCC."""
    return shlex.split(os.environ.get("PYTORCH_NVCC", os.path.join(toolkit, "bin", "nvcc")))


def nvcc_flags(archs: str) -> list[str]:
    """nvcc's flags for a list of architectures such as "8.0;9.0+PTX"."""
    return [*NVCC_FLAGS, "-ccbin", cxx()[-1], *gencode(archs)]


def nvcc_version(cuda_home: str | None) -> str | None:
    """The release of nvcc, such as "13.0", under `cuda_home` or in PATH; None if there is none."""
    nvcc = shutil.which("nvcc", path=os.path.join(cuda_home, "bin") if cuda_home else None)
    # An nvcc that fails counts as none: it must not stop a build for the CPU.
    printed = output_of([nvcc, "--version"]) if nvcc else None
    release = re.search(r"release (\d+\.\d+)", printed or "")
    return release.group(1) if release else None


def gpus() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as ["8.9"]."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return sorted(set((output_of(query) or "").split()))


def why_no_cuda(forced: str | None, nvcc: str | None, torch: Torch, gpu: bool) -> str | None:
    """Why the CUDA kernels are not built, or None if they are.

    Args:
        forced: the environment variable FASTRNN_CUDA, or None.
        nvcc: the release of nvcc, or None.
        torch: the torch to build for.
        gpu: whether there is a GPU. Without one, and without FASTRNN_CUDA=1, nothing would use the
            minutes that the compiler takes.

    Raises:
        BuildError: if FASTRNN_CUDA is not 0 or 1, or is 1 and they cannot be built.
    """
    if forced not in (None, "", "0", "1"):
        raise BuildError(f"FASTRNN_CUDA is '{forced}', expected 0 or 1")
    if forced == "0":
        return "turned off by FASTRNN_CUDA=0"
    reason = None
    if nvcc is None:
        reason = "no nvcc was found (set CUDA_HOME)"
    elif torch.cuda is None:
        reason = f"torch {torch.version} was built without CUDA"
    elif nvcc.split(".")[0] != torch.cuda.split(".")[0]:
        reason = f"nvcc is {nvcc}, torch was built with CUDA {torch.cuda}"
    if reason and forced == "1":
        raise BuildError(f"FASTRNN_CUDA=1, but {reason}")
    if not reason and not gpu and forced != "1":
        return "this machine has no GPU (FASTRNN_CUDA=1 builds them all the same)"
    return reason


def cuda_archs(listed: str | None) -> str:
    """The architectures to build for: `listed`, TORCH_CUDA_ARCH_LIST; else this machine's GPU's;
    else CUDA_ARCHS."""
    if listed:
        return listed
    return ";".join(gpus()) or CUDA_ARCHS


def gencode(archs: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0+PTX"."""
    flags = []
    for arch in re.split(r"[;, ]+", archs):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has '{arch}', expected such as 8.0 or 9.0+PTX")
        number = match.group(1) + match.group(2)
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match.group(3):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags
