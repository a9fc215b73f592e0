"""`python -m fastrnn info`: what was built, what it runs on, and what is in use."""

from __future__ import annotations

import collections
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import fastrnn

# Environment variables that change what is computed, or on how many threads.
VARIABLES = ("FASTRNN_", "OMP_", "GOMP_", "KMP_", "MKL_", "ATEN_", "CUDA_", "LD_PRELOAD")


def facts(broken: str | None = None) -> dict[str, str]:
    """The lines of the report, by name.

    Args:
        broken: why the extension can't be loaded; what only it knows is left out then.

    Raises:
        ValueError: if FASTRNN_ISA names no instruction set.
    """
    found = {"fastrnn": metadata.version("fastrnn"), "torch": torch.__version__}
    built = {} if broken else fastrnn.build_info()
    if broken:
        found["extension"] = broken
    else:
        found["torch"] += f" (built with {built['torch']})"
        found["compiler"] = built["compiler"]
    found["Python"] = f"{platform.python_version()}, {platform.platform()}"
    found["CPU"] = cpu_model()
    if built:
        found["instruction set"] = built["isa"]
        found["  supported"] = ", ".join(built["isa_supported"])
        found["  compiled"] = ", ".join(built["isa_compiled"])
    found["threads"] = (
        f"{torch.get_num_threads()}, on {len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs"
    )
    if built:
        version = built["openmp"] or "none: one thread"
        found["OpenMP"] = f"{version} (loaded: {', '.join(openmp_libraries()) or 'none'})"
        kernels = ", ".join(built["cuda_archs"]) or f"none: {built['cuda']}"
        found["CUDA kernels"] = kernels
    if torch.version.cuda:
        found["torch's CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found["GPU"] = gpus()
    found["driver"] = driver()
    if built:
        found["cells"] = ", ".join(fastrnn.CELLS)
    variables = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)]
    found["environment"] = " ".join(variables) or "none of the variables that matter is set"
    return found


def text(broken: str | None = None) -> str:
    lines = facts(broken)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def cpu_model() -> str:
    """Such as "AMD EPYC 9654 96-Core Processor"."""
    cpuinfo = Path("/proc/cpuinfo")
    texts = [cpuinfo.read_text() if cpuinfo.exists() else ""]
    if shutil.which("lscpu"):
        # Linux has no name of an Arm CPU, only its number: lscpu knows the name.
        texts.append(output_of("lscpu"))
    for text in texts:
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE | re.IGNORECASE)
        if name:
            return name.group(1)
    return platform.machine()


def openmp_libraries() -> list[str]:
    """The OpenMP libraries of this process. Each has threads of its own."""
    maps = Path("/proc/self/maps")
    found = re.findall(r"/(lib(?:g|i|)omp[^/\n]*)$", maps.read_text(), re.MULTILINE)
    return sorted(set(found))


def gpus() -> str:
    """The GPUs that torch finds, or why it finds none."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"none: {str(error).splitlines()[0]}"
    names = collections.Counter(
        "{} (compute capability {}.{})".format(
            torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)
        )
        for i in range(torch.cuda.device_count())
    )
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())


def driver() -> str:
    """The GPUs and the driver that nvidia-smi reports, also where torch was built without CUDA."""
    if not shutil.which("nvidia-smi"):
        return "none: there is no nvidia-smi"
    query = ["--query-gpu=driver_version,name", "--format=csv,noheader"]
    lines = output_of("nvidia-smi", *query).splitlines()
    return "; ".join(dict.fromkeys(lines)) or "none: nvidia-smi reports no GPU"


def output_of(*command: str) -> str:
    """What the command prints, or its error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip() or done.stderr.strip()


def why_no_cuda() -> str | None:
    """Why fastrnn computes nothing on a GPU here, or None if it does."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    built = fastrnn.build_info()["cuda"]
    return None if built == "built" else f"fastrnn was built without CUDA: {built}"
