"""Compiles a cell's kernels for this process's GPUs, and adds them (csrc/cuda/own_cell.cuh)."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import torch

from fastrnn import _C
from fastrnn.codegen import compiler
from fastrnn.codegen.compiler import NoCompiler, csrc, toolchain

#: dtype -> the storage type on the device.
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
}
_SOURCE = """\
#include "cuda/own_cell.cuh"
{header}
FASTRNN_OWN_CELL(::{struct}, {suffix}, {storage})
"""


def load(name: str, struct: str, header: str, dtype: torch.dtype) -> None:
    """Adds a cell's kernels for a dtype to this process: from the cache, or compiled now.

    Args:
        name: the cell's name in the process.
        struct, header: the generated C++ (`Generated`).

    Raises:
        CompileError: with nvcc's last lines, and the file that it refused.
        NoCompiler: without an nvcc of torch's CUDA, a C++ compiler, or a GPU.
    """
    suffix, storage = compiler.TYPES[dtype][0], TYPES[dtype]
    source = _SOURCE.format(header=header, struct=struct, suffix=suffix, storage=storage)
    toolkit = cuda_toolkit()
    archs = architectures(toolkit)
    nvcc = [*toolchain().nvcc(toolkit), *toolchain().nvcc_flags(archs)]
    cores = [Path(_C.kernels_library()), Path(_C.cuda_kernels_library())]
    content = [*(core.name for core in cores), kernels_hash(), source, compiler.compiler_version()]
    content += [str(toolchain().nvcc_version(toolkit)), *nvcc]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    # Side by side: each half takes about as long. float64 has no kernels of the persistent path.
    halves = [[], ["-DFASTRNN_PERSISTENT"]][: 1 if dtype is torch.float64 else 2]

    def make(file: Path, library: Path) -> None:
        objects = [str(library.with_name(f"{i}.o")) for i in range(len(halves))]
        compiler.run(
            *(
                [*nvcc, *macros, f"-I{csrc()}", "-c", str(file), "-o", to]
                for macros, to in zip(halves, objects, strict=True)
            )
        )
        command = [*toolchain().cxx(), "-shared", *objects, "-o", str(library)]
        for core in cores:
            command += compiler.linked_with(core)
        compiler.run([*command, f"-L{toolkit}/lib64", "-lcudart"])

    target = f"compute capability {archs.replace('+PTX', '').replace(';', ' and ')}"
    key = f"{name}-cuda-{suffix}-{digest}"
    compiler.add(name, dtype, key, compiler.Source(source, ".cu", target), make)


def cuda_toolkit() -> str:
    """The folder of a CUDA toolkit of the version that torch was built with.

    Raises:
        NoCompiler: if there is none.
    """
    toolkit: str | None = toolchain().cuda_toolkit()
    version = toolchain().nvcc_version(toolkit)
    built = toolchain().Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda)
    reason = toolchain().why_no_cuda(None, version, built, gpu=True)
    if toolkit is None or reason is not None:
        raise NoCompiler(reason)
    return toolkit


def architectures(toolkit: str) -> str:
    """Those of this process's GPUs, such as "9.0+PTX".

    With PTX, which takes no time and which runs where nvcc does not know the GPU: it is then that
    of the newest that nvcc does.

    Raises:
        NoCompiler: if there is no GPU.
    """
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not found:
        raise NoCompiler("no GPU was found")
    listed = toolchain().output_of([*toolchain().nvcc(toolkit), "--list-gpu-arch"]) or ""
    known = [divmod(int(number), 10) for number in re.findall(r"compute_(\d+)$", listed, re.M)]
    chosen = {max([k for k in known if k <= gpu], default=gpu) for gpu in found}
    return ";".join(f"{major}.{minor}+PTX" for major, minor in sorted(chosen))


@functools.cache
def kernels_hash() -> str:
    """Of the kernels' templates. The names of the libraries already have one of the headers."""
    sources = sorted(csrc().glob("cuda/**/*.cuh"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
