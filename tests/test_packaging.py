"""The packages: a wheel that runs without a compiler, and a complete source distribution.

additions/run.py tests that the source distribution builds.
"""

import itertools
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.once, pytest.mark.cpu("about packages"), pytest.mark.slow]

ROOT = Path(__file__).parent.parent
# Compares the gradients with those of torch's layer.
USE = """
import shutil, torch, fastrnn
assert shutil.which("c++") is shutil.which("ninja") is None
ours, theirs = fastrnn.LSTM(5, 17, 2), torch.nn.LSTM(5, 17, 2)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(4, 3, 5)
for layer in ours, theirs:
    layer(x)[0].sum().backward()
for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad)
print(fastrnn.__file__)
"""

# A step of a cell of one's own, and what computed it.
OWN = """
import torch, fastrnn
step = fastrnn.cells.mgu.step(5, 17)
x, h = torch.randn(3, 5), torch.randn(3, 17)
f_x, n_x = torch.nn.functional.linear(x, step.weight_ih, step.bias_ih).chunk(2, 1)
f_h, n_h = torch.nn.functional.linear(h, step.weight_hh, step.bias_hh).chunk(2, 1)
f = torch.sigmoid(f_x + f_h)
torch.testing.assert_close(step(x, h), h + f * (torch.tanh(n_x + f * n_h) - h))
print(fastrnn.fallbacks())
"""


def sources(*folders):
    """The files in these folders, without compiled ones."""
    found = {p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()}
    return {str(p.relative_to(ROOT)) for p in found if p.suffix not in (".so", ".pyc")}


def test_wheel_runs_without_a_compiler(tmp_path):
    """Built by pip's defaults, in isolation, for the torch that this environment has."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, env={**os.environ, "FASTRNN_CUDA": "0"}, check=True)
    (wheel,) = tmp_path.glob("fastrnn-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sources("fastrnn") <= names
    compiled = sorted(name for name in names if name.endswith(".so"))
    minor = ".".join(torch.__version__.split(".")[:2])
    patterns = ["fastrnn/lib/libfastrnn_cpu-*.so", f"fastrnn/lib/torch{minor}-cpu/_C.*.so"]
    assert all(itertools.starmap(fnmatch, zip(compiled, patterns, strict=True))), compiled
    others = {name for name in names if ".dist-info/" not in name} - sources("fastrnn")
    headers = {f"fastrnn/{name}" for name in sources("csrc") if name.endswith((".h", ".cuh"))}
    needed = {name for name in headers if "/torch/" not in name}
    assert others == {*compiled, *needed, "fastrnn/csrc/toolchain.py"}

    environment = tmp_path / "bare"
    venv.create(environment)
    python = environment / "bin/python"
    # torch comes from this environment by PYTHONPATH. Python does not read .pth files there, so an
    # editable install of fastrnn stays out.
    bare = {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": str(tmp_path / "nothing")}
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"],
        env=bare, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    zipfile.ZipFile(wheel).extractall(where)
    # The wheel comes before this environment's packages, where another fastrnn may be installed.
    bare["PYTHONPATH"] = os.pathsep.join([where, bare["PYTHONPATH"]])
    result = subprocess.run(
        [str(python), "-c", USE],
        env=bare,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == Path(where) / "fastrnn"
    for path, by_definition in [(bare["PATH"], True), (os.environ["PATH"], False)]:
        result = subprocess.run(
            [str(python), "-c", OWN],
            env={**bare, "PATH": path, "FASTRNN_CACHE": str(tmp_path / "cells")},
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert ("mgu without a compiler" in result.stdout) == by_definition


def test_source_distribution_is_complete(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    # setup.py imports modules of csrc: what Python compiles of them there must stay out.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (archive,) = tmp_path.glob("fastrnn-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = sources("csrc", "fastrnn") | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert needed <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]
