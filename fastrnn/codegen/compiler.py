"""Compiles a cell's kernels for this CPU, and adds them to the process (csrc/cpu/own_cell.h)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from fastrnn import _C
from fastrnn.codegen import cache

#: dtype -> the name of its Storage in C++, the arithmetic type and the storage type.
TYPES = {
    torch.float32: ("float32", "float", "float"),
    torch.float64: ("float64", "double", "double"),
    torch.bfloat16: ("bfloat16", "float", "BFloat16"),
    torch.float16: ("float16", "float", "Half"),
}
_SOURCE = """\
#include "cpu/own_cell.h"
{header}
FASTRNN_OWN_CELL(::{struct}, {suffix}, {arithmetic}, {storage})
"""


class CompileError(RuntimeError):
    """A compiler refused the generated source of a cell."""


class NoCompiler(RuntimeError):  # noqa: N818  (it is no error: the definition runs instead)
    """There is nothing to build a cell with: no compiler, or no headers."""


@dataclass(frozen=True)
class Source:
    """What is compiled."""

    text: str
    ending: str  # of the file that keeps it
    target: str  # the instruction set or architecture, for a line on stderr


@functools.cache
def csrc() -> Path:
    """The headers of the kernels: in the package where it was installed, else next to it.

    Raises:
        NoCompiler: if they are in neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise NoCompiler(f"fastrnn's headers are not in {package}")


@functools.cache
def toolchain() -> ModuleType:
    """csrc/toolchain.py, which knows compilers and flags."""
    spec = importlib.util.spec_from_file_location("fastrnn._toolchain", csrc() / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@functools.cache
def compiler_version() -> str:
    """The first line of `c++ --version`.

    Raises:
        NoCompiler: naming what is missing, and how to install it.
    """
    try:
        toolchain().compiler_macros()
    except toolchain().BuildError as error:
        raise NoCompiler(str(error)) from None
    return str(toolchain().output_of([*toolchain().cxx(), "--version"])).splitlines()[0]


def instruction_set(dtype: torch.dtype) -> str:
    """The one in use, or for other dtypes than bfloat16 the one whose kernels it shares."""
    isa = str(_C.build_info()["isa"])
    if dtype is torch.bfloat16 or isa in toolchain().ISA_FLAGS:
        return isa
    return str(list(toolchain().ISA_FLAGS)[-1])


def load(name: str, struct: str, header: str, dtype: torch.dtype) -> None:
    """Adds a cell's kernels for a dtype to this process: from the cache, or compiled now.

    Args:
        name: the cell's name in the process.
        struct, header: the generated C++ (`Generated`).

    Raises:
        CompileError: with the compiler's last lines, and the file that it refused.
        NoCompiler: without one.
    """
    suffix, arithmetic, storage = TYPES[dtype]
    source = _SOURCE.format(
        header=header, struct=struct, suffix=suffix, arithmetic=arithmetic, storage=storage
    )
    isa = instruction_set(dtype)
    core = _core()
    flags = [*toolchain().CXX_FLAGS, *toolchain().kernel_flags(isa), *toolchain().CPU_MACROS]
    content = "\0".join([core.name, source, compiler_version(), *toolchain().cxx(), *flags])
    key = f"{name}-{suffix}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def make(file: Path, library: Path) -> None:
        # With -Wfatal-errors the last lines are of the first error.
        command = [*toolchain().cxx(), *flags, f"-I{csrc()}", "-Wfatal-errors", "-shared"]
        run([*command, str(file), "-o", str(library), *linked_with(core)])

    add(name, dtype, key, Source(source, ".cpp", isa), make)


_loaded: list[ctypes.CDLL] = []  # for as long as the process: their kernels may be in use


def _core() -> Path:
    """The library of kernels that this process has loaded: a cell's library needs the same."""
    return Path(_C.kernels_library())


def linked_with(core: Path) -> list[str]:
    """The linker's flags for a library of kernels."""
    return [f"-L{core.parent}", f"-l:{core.name}"]


def add(
    name: str, dtype: torch.dtype, key: str, source: Source, make: Callable[[Path, Path], None]
) -> None:
    """Adds a cell's kernels to this process: from the cache, or compiled now.

    Args:
        name: the cell's name in the process.
        key: of the cache.
        make: make(file, library) compiles the source in that file.
    """
    with cache.locked(key):
        found = cache.library(key) or _compiled(name, dtype, key, source, make)
    library = ctypes.CDLL(str(found))
    library.fastrnn_add_cell.restype = ctypes.c_bool
    if not library.fastrnn_add_cell(name.encode()):
        raise RuntimeError(f"fastrnn: too many cells are defined in this process to add {name}")
    _loaded.append(library)


class Refused(Exception):  # noqa: N818  (it becomes a CompileError)
    """What a compiler printed when it failed."""


def run(*commands: Sequence[str]) -> None:
    """Runs compilers side by side.

    Raises:
        Refused: if one fails.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
            for command in commands
        ]
        printed = [process.communicate()[0] for process in running]
    for process, text in zip(running, printed, strict=True):
        if process.returncode:
            raise Refused(text)


def _compiled(
    name: str, dtype: torch.dtype, key: str, source: Source, make: Callable[[Path, Path], None]
) -> Path:
    kept = cache.folder() / f"{key}{source.ending}"
    kept.write_text(source.text)
    what = f"fastrnn: compiling {name} for {str(dtype)[6:]}, {source.target}"
    print(what, end="", file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
        made = Path(folder, "cell.so")
        try:
            make(kept, made)
        except Refused as refused:
            last = "\n".join(str(refused).strip().splitlines()[-15:])
            raise CompileError(
                f"the cell {name} does not compile for {dtype}; the source is {kept}, and the "
                f"compiler's last lines are:\n{last}"
            ) from None
        finally:
            print(f": {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        return cache.keep(key, made)
