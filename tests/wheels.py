"""Installs a wheel in bare environments with several versions of torch, and checks it there.

    python tests/wheels.py dist/fastrnn-*.whl [TORCH ...]

There is no compiler in PATH. Prints how long `pip install` takes. A torch with CUDA must get the
binding with CUDA kernels if the wheel has one for it. With a torch that the wheel has no binding
for, the import must say in one line what is supported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "wheels" / "bare"
VERSIONS = ["2.6.0", "2.9.1", "2.13.0", "2.15.0"]
# What `import fastrnn` says where torch is another than those that the wheel has bindings for.
OTHER = """
import torch
torch.__version__ = "2.99.0"
import fastrnn
"""
# Prints the folder of the binding that is loaded, and the one for the torch's CUDA.
LOADED = """
import os, fastrnn, torch
major = str(torch.version.cuda).split(".")[0]
minor = ".".join(torch.__version__.split(".")[:2])
print(os.path.basename(os.path.dirname(fastrnn._C.__file__)), f"torch{minor}-cuda{major}")
"""


def checked(wheel: Path, version: str) -> str:
    """Installs the wheel next to this torch; returns the last line of fastrnn's own check."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    python = FOLDER / "bin" / "python"
    # Without the compilers of this machine, and without packages outside the environment.
    bare = {
        "PATH": str(FOLDER / "bin"),
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONNOUSERSITE": "1",
    }
    bare |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, f"torch=={version}", "numpy"], env=bare, check=True)
    began = time.monotonic()
    subprocess.run([*install, str(wheel.resolve())], env=bare, check=True)
    seconds = time.monotonic() - began
    found = subprocess.run(
        [str(python), "-m", "fastrnn", "check"],
        env=bare, cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(f"torch {version}:\n{found.stdout}{found.stderr}")
    loaded, with_cuda = subprocess.run(
        [str(python), "-c", LOADED],
        env=bare, cwd=FOLDER, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.split()  # fmt: skip
    in_wheel = {Path(name).parent.name for name in zipfile.ZipFile(wheel).namelist()}
    if (loaded == with_cuda) != (with_cuda in in_wheel):
        raise SystemExit(f"torch {version}: loads {loaded}, and the wheel has {in_wheel}")
    other = subprocess.run(
        [str(python), "-c", OTHER],
        env=bare, cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = other.stderr.splitlines()[-1] if other.stderr else ""
    if "torch 2.99.0" not in last or f"torch {'.'.join(version.split('.')[:2])}" not in last:
        raise SystemExit(f"with an unknown torch the import says:\n{other.stderr}")
    shutil.rmtree(FOLDER)
    last = found.stdout.splitlines()[-1]
    return f"torch {version}, {loaded}: installed in {seconds:.1f} s; {last}"


if __name__ == "__main__":
    for version in sys.argv[2:] or VERSIONS:
        print(checked(Path(sys.argv[1]), version), flush=True)
