"""fastrnn/binding.py loads what was built for the running torch, or says what to do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import binding

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]
RUNNING = f"torch{binding.minor(torch.__version__)}"
SUFFIX = binding.EXTENSION_SUFFIXES[0]


@pytest.fixture
def lib(tmp_path, monkeypatch):
    """An empty folder in place of fastrnn/lib."""
    monkeypatch.setattr(binding, "LIB", tmp_path)
    # A failed load must not leave the module behind that other tests use.
    monkeypatch.setitem(sys.modules, "fastrnn._C", fastrnn._C)
    return tmp_path


def add(lib, torch_build, suffix=SUFFIX, content=b"not a library"):
    path = lib / torch_build / f"_C{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def message():
    with pytest.raises(ImportError) as error:
        binding.load()
    assert "\n" not in str(error.value)
    assert "`pip install .`" in str(error.value)
    return str(error.value)


def test_the_loaded_binding_is_the_one_for_this_torch():
    path = Path(fastrnn._C.__file__)
    assert path in binding.candidates()
    assert path.parent.name.startswith(f"{RUNNING}-")
    assert fastrnn._C.__name__ == "fastrnn._C"


@pytest.mark.parametrize("cuda", [None, "12.9", "13.0"])
def test_candidates(lib, monkeypatch, cuda):
    """A torch with CUDA prefers the binding with kernels for its CUDA; another can't load it."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    cpu, with_cuda = add(lib, f"{RUNNING}-cpu"), add(lib, f"{RUNNING}-cuda13")
    add(lib, "torch1.13-cpu")
    add(lib, f"{RUNNING}-cpu", ".cpython-27m.so")
    assert binding.candidates() == ([with_cuda, cpu] if cuda == "13.0" else [cpu])


def test_nothing_is_built(lib):
    assert message().startswith("fastrnn is not built: run ")


def test_built_for_another_torch(lib):
    add(lib, "torch1.12-cpu")
    add(lib, "torch1.13-cuda12")
    expected = f"fastrnn is built for torch 1.12, torch 1.13, and this is torch {torch.__version__}"
    assert message().startswith(expected)


def test_built_for_another_python(lib):
    add(lib, f"{RUNNING}-cpu", ".cpython-27m.so")
    assert message().startswith(
        f"fastrnn is built for another Python, and this is torch {torch.__version__} and Python "
        f"{sys.version_info[0]}.{sys.version_info[1]}: "
    )


def test_a_binding_that_does_not_load(lib):
    path = add(lib, f"{RUNNING}-cpu")
    found = message()
    assert found.startswith(f"fastrnn's binding for torch {torch.__version__} does not load (")
    assert str(path) in found


def test_a_binding_of_other_kernels(lib):
    """Kernels with other headers have another name: the binding does not load, and says so."""
    shutil.copytree(Path(fastrnn._C.__file__).parent, lib / f"{RUNNING}-cpu")
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(fastrnn.__file__).parent.parent)!r})
import importlib.util
spec = importlib.util.spec_from_file_location("binding", {binding.__file__!r})
binding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(binding)
binding.LIB = pathlib.Path({str(lib)!r})
binding.load()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fastrnn's binding for torch"), done.stderr
    assert "libfastrnn_cpu-" in last
    assert "build it again" in last
