"""`python -m fastrnn info` prints what was built and what is in use."""

from __future__ import annotations

import argparse

import fastrnn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastrnn", description=__doc__)
    parser.add_argument("command", choices=["info"], help="print the build and what is in use")
    parser.parse_args()
    info = fastrnn.build_info()
    lines = {
        "fastrnn": info["version"],
        "torch": f"{info['torch']} (running {info['torch_running']})",
        "instruction set": f"{info['isa']} (compiled: {', '.join(info['isa_compiled'])}; "
        f"this CPU has: {', '.join(info['isa_supported'])})",
        "OpenMP": info["openmp"] or "none: one thread",
        "compiler": info["compiler"],
        "CUDA": ", ".join(info["cuda_archs"]) or f"none: {info['cuda']}",
        "cells": ", ".join(fastrnn.CELLS),
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
