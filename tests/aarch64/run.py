"""Tests the kernels of 64-bit Arm: fastrnn is cross-compiled, and pytest runs it under qemu.

    python tests/aarch64/run.py                       the tests of CI: SELECTED, BFLOAT16
    python tests/aarch64/run.py tests/test_layers.py  pytest with these arguments

Everything is in build/aarch64, made on first use:

    root    Debian's Python for arm64 and its libraries, unpacked
    env     torch's wheel for Arm, pytest, and bin/python: a script that runs root's Python in qemu
    fastrnn a copy of the project, compiled by the cross compiler
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aarch64"
DEBIAN, PYTHON = "bookworm", "3.11"
LIBRARIES = [f"python{PYTHON}-dev", "libgomp1", "libstdc++6"]
# A wheel without CUDA. pip reads the conditions of requirements as on this machine, where torch
# needs NVIDIA's packages: it gets torch alone, and its other requirements from this list.
TORCH = "torch==2.9.1"
PACKAGES = ["filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"]
PACKAGES += ["numpy", "setuptools>=77.0.3", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]
PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64"]
PACKAGES_FOLDER = f"lib/python{PYTHON}/site-packages"  # of env
# CPUs of qemu: one with everything but SVE and SME, with which torch's own LSTM of bfloat16 stops
# at an instruction that qemu 7.2 does not know; and one without instructions for bfloat16.
NEW_CPU, OLD_CPU = "max,sve=off,sme=off", "cortex-a72"
#: The tests of CI, on NEW_CPU: ten minutes on two cores. Some of determinism's, because qemu takes
#: 20 seconds for one.
DETERMINISM = [
    "test_runs_and_threads[lstm-torch.bfloat16-packed]",
    "test_runs_and_threads[gru-torch.float32-padded]",
    *("test_batch_invariance[lstm-torch.float32]", "test_batch_invariance[gru-torch.bfloat16]"),
    *("test_cells", "test_packed_equals_padded", "test_dropout_does_not_depend_on_threads"),
]
SELECTED = ["-n", "2", "-m", "not slow", "tests/test_isa.py::test_best_set_is_in_use"]
SELECTED += [f"tests/test_{name}.py" for name in ("numbers", "layers", "bad_input")]
SELECTED += [f"tests/test_determinism.py::{name}" for name in DETERMINISM]
SELECTED += ["tests/test_tiles.py::test_bfloat16_tiles", "tests/test_tiles.py::test_depth"]
SELECTED += ["tests/test_build_info.py::test_instruction_set_cap"]
#: Then on OLD_CPU.
BFLOAT16 = [
    "tests/test_isa.py::test_best_set_is_in_use",
    "tests/test_tiles.py::test_bfloat16_tiles",
]
NEEDED = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
}


INHERITED = dict(os.environ)


def run(*command: str | Path, **options: object) -> None:
    done = subprocess.run([str(part) for part in command], check=False, **options)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} failed")


def once(name: str, request: str, make) -> Path:
    """The folder `name`, which make(folder) fills if it was made for another request."""
    folder = BUILD / name
    made_for = BUILD / f"{name}.request"
    if not made_for.exists() or made_for.read_text() != request:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        made_for.write_text(request)
    return folder


def unpack_debian(folder: Path) -> None:
    """Downloads packages and what they depend on by an apt of its own, and unpacks them."""
    apt = BUILD / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for name in ["etc/apt.conf.d", "etc/preferences.d", "lists/partial", "archives/partial"]:
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "etc" / "sources.list").write_text(
        f"deb [signed-by={key}] http://deb.debian.org/debian {DEBIAN} main\n"
    )
    (apt / "apt.conf").write_text(
        'APT { Architecture "arm64"; Architectures { "arm64"; }; };\n'
        f'Dir {{ Etc "{apt}/etc"; State "{apt}"; State::status "{apt}/status"; '
        f'Cache "{apt}"; }};\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    run("apt-get", "--quiet=2", "update", env=environment)
    options = ["--quiet=2", "--yes", "--no-install-recommends", "--download-only"]
    run("apt-get", *options, "install", *LIBRARIES, env=environment, stdout=subprocess.DEVNULL)
    for package in sorted(apt.glob("archives/*.deb")):
        run("dpkg-deb", "--extract", package, folder)
    shutil.rmtree(apt)


def install_packages(folder: Path, root: Path) -> None:
    target = folder / PACKAGES_FOLDER
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    pip += ["--target", str(target), "--only-binary=:all:", "--python-version", PYTHON]
    pip += [f"--platform={name}" for name in PLATFORMS]
    run(*pip, "--no-deps", TORCH)
    run(*pip, *PACKAGES)
    (folder / "pyvenv.cfg").write_text(f"home = {root}/usr/bin\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    # Python takes its environment from its name, argv[0].
    python.write_text(
        "#!/bin/sh\n"
        f"exec qemu-aarch64-static -0 '{python}' -L '{root}' '{root}/usr/bin/python{PYTHON}'"
        ' "$@"\n'
    )
    python.chmod(0o755)


def copy_project(folder: Path) -> None:
    """Copies the files with their times: those that did not change are not compiled again."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for old in [*folder.glob("csrc/**/*"), *folder.glob("tests/**/*.py")]:
        if old.is_file() and str(old.relative_to(folder)) not in names:
            old.unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def build(folder: Path, root: Path, packages: Path) -> None:
    """Compiles the copy for env, with this Python: nothing of it runs in qemu."""
    os.environ.update(
        _PYTHON_HOST_PLATFORM="linux-aarch64",
        CXX="aarch64-linux-gnu-g++",
        CPPFLAGS=f"-idirafter {root}/usr/include",  # a header of Python's includes one from there
        FASTRNN_CUDA="0",
        FASTRNN_ISAS="all",
    )
    run(sys.executable, "setup.py", "--quiet", "egg_info", cwd=folder)
    sys.path.insert(0, str(folder / "csrc"))
    from build import build  # after the variables are set
    from toolchain import Python, Torch

    python = Python(
        include=f"{root}/usr/include/python{PYTHON}",
        suffix=f".cpython-{PYTHON.replace('.', '')}-aarch64-linux-gnu.so",
    )
    build(Torch.at(packages / "torch"), folder / "fastrnn" / "lib", python)


def main(arguments: list[str]) -> None:
    missing = [package for program, package in NEEDED.items() if not shutil.which(program)]
    if missing:
        raise SystemExit(f"apt install {' '.join(missing)}")
    root = once("root", f"{DEBIAN} {LIBRARIES}", unpack_debian)
    wanted = f"{root} {TORCH} {PACKAGES}"
    env = once("env", wanted, lambda folder: install_packages(folder, root))
    project = BUILD / "fastrnn"
    copy_project(project)
    build(project, root, env / PACKAGES_FOLDER)

    def test(cpu: str, *selected: str) -> None:
        print(f"on the CPU {cpu} of qemu", flush=True)
        environment = {**INHERITED, "QEMU_CPU": cpu}
        command = ["-m", "pytest", "-p", "no:cacheprovider", *selected]
        run(env / "bin" / "python", *command, cwd=project, env=environment)

    if arguments:
        test(os.environ.get("QEMU_CPU", NEW_CPU), *arguments)
    else:
        test(NEW_CPU, *SELECTED)
        test(OLD_CPU, *BFLOAT16)


if __name__ == "__main__":
    main(sys.argv[1:])
