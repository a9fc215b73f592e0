"""Loads fastrnn._C, the compiled part that was built for the torch and the Python that run.

    fastrnn/lib/libfastrnn_cpu-<headers>.so                  the kernels
    fastrnn/lib/torch2.13-cpu/_C.cpython-311-x86_64-....so   the binding for torch 2.13, Python 3.11
    fastrnn/lib/torch2.14-cuda13/_C....so                    one with kernels for CUDA 13

Several environments can share one folder, each with a binding of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

LIB = Path(__file__).parent / "lib"
HOW = "run `pip install .` in fastrnn's source folder, or `make` there"


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def candidates() -> list[Path]:
    """The bindings for this torch and Python, in order of preference."""
    cuda = torch.version.cuda
    builds = [f"cuda{cuda.split('.')[0]}", "cpu"] if cuda else ["cpu"]
    folders = [LIB / f"torch{minor(torch.__version__)}-{build}" for build in builds]
    paths = [folder / f"_C{suffix}" for folder in folders for suffix in EXTENSION_SUFFIXES]
    return [path for path in paths if path.exists()]


def why_none() -> str:
    """Why there is no binding, in one line."""
    running = f"torch {torch.__version__} and Python {sys.version_info[0]}.{sys.version_info[1]}"
    built = sorted({path.parent.name.rsplit("-", 1)[0] for path in LIB.glob("torch*/_C*.so")})
    if not built:
        return f"fastrnn is not built: {HOW}"
    same = f"torch{minor(torch.__version__)}" in built
    what = (
        "another Python" if same else ", ".join(name.replace("torch", "torch ") for name in built)
    )
    return f"fastrnn is built for {what}, and this is {running}: {HOW}"


def load() -> ModuleType:
    """Imports the binding as fastrnn._C.

    Raises:
        ImportError: there is none for this torch and Python, or it does not load. The message says
            why and what to run.
    """
    found = candidates()
    if not found:
        raise ImportError(why_none())
    spec = importlib.util.spec_from_file_location("fastrnn._C", found[0])
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            f"fastrnn's binding for torch {torch.__version__} does not load ({error}): build it "
            f"again: {HOW}"
        ) from None
    sys.modules["fastrnn._C"] = module
    return module
