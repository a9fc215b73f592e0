"""Runs the numeric tests under each instruction set other than the suite's own.

fastrnn reads FASTRNN_ISA once, on import, so each set needs its own process. Which tests the
process ran, and under which set, is read from its JUnit report, not from its exit status.
"""

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import slow_after

import fastrnn
import toolchain

pytestmark = [pytest.mark.once, pytest.mark.cpu("about CPU instruction sets")]

TESTS = Path(__file__).parent
NUMERIC = [
    "test_gradients.py",
    "test_dtypes.py",
    "test_determinism.py",
    "test_registry.py",
    "test_tiles.py",
    "test_fuzz.py",
    "test_numbers.py",
]
#: Takes as long as all of NUMERIC.
OPTIONS = ["test_layers.py"]
SETS = fastrnn.build_info()["isa_compiled"]  # from the narrowest to the widest
#: Sets of a family differ only in products of bfloat16.
FAMILIES = [("avx512", "avx512_bf16", "amx"), ("neon", "neon_bf16")]
BFLOAT16 = ["test_determinism.py", "test_tiles.py"]
#: group -> (its files, the least number of tests that must have run)
GROUPS = {"numeric": (NUMERIC, 800), "options": (OPTIONS, 1000), "bfloat16": (BFLOAT16, 50)}


def supported(name: str) -> bool:
    """As torch detects it on this CPU; fastrnn's own detection is under test."""
    if name == "neon":
        return True
    if name == "neon_bf16":  # torch does not tell
        auxiliary_value = ctypes.CDLL(None).getauxval
        auxiliary_value.restype = ctypes.c_ulong
        return bool(auxiliary_value(26) & 1 << 14)  # AT_HWCAP2, HWCAP2_BF16
    best = torch.backends.cpu.get_cpu_capability()  # capped by ATEN_CPU_CAPABILITY
    if name == "avx512_bf16":
        return supported("avx512") and torch.cpu._is_avx512_bf16_supported()
    if name == "amx":
        return supported("avx512_bf16") and torch.cpu._init_amx()
    return name in ["generic", *{"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}.get(best, [])]


def only_bfloat16(name: str) -> bool:
    """Whether the suite's own set already covers everything but bfloat16."""
    return any({name, fastrnn.build_info()["isa"]} <= set(family) for family in FAMILIES)


def group_for(name: str, group: str) -> str | None:
    """The group to run under this set: the requested one, or only bfloat16, or none."""
    if only_bfloat16(name):
        return "bfloat16" if group == "numeric" else None
    return group


def environment(name: str) -> dict[str, str]:
    return {**os.environ, "FASTRNN_ISA": name}


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64"), reason="only generic kernels"
)
def test_the_readme_names_the_sets():
    named = re.findall(r"`FASTRNN_ISA=([a-z0-9_|]+)`", (TESTS.parent / "README.md").read_text())
    known = [*toolchain.ISA_FLAGS, *toolchain.BFLOAT16_FLAGS]
    assert known in [sets.split("|") for sets in named]


@pytest.mark.skipif("FASTRNN_ISA" in os.environ, reason="capped by FASTRNN_ISA")
def test_best_set_is_in_use():
    best = [s for s in SETS if supported(s)][-1]
    assert fastrnn.build_info()["isa"] == best


def other_sets() -> list[str]:
    return [s for s in SETS if s != fastrnn.build_info()["isa"] and supported(s)]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The test processes, started together: each spends most of its time in Python, on one core."""
    folder = tmp_path_factory.mktemp("isa")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not once and not slow",
        "-p",
        "no:cacheprovider",
    ]
    started = {}
    for name in other_sets():
        group = group_for(name, request.param)
        if not group:
            continue
        report, log = folder / f"{name}.xml", (folder / f"{name}.log").open("w+")
        process = subprocess.Popen(
            [
                *command,
                *(["-k", "bfloat16"] if group == "bfloat16" else []),
                f"--junitxml={report}",
                *(str(TESTS / f) for f in GROUPS[group][0]),
            ],
            env=environment(name), cwd=TESTS.parent, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started[name] = process, report, log, *GROUPS[group]
    yield started
    for process, _, log, *_ in started.values():
        process.kill()  # no effect once the process has ended
        process.wait()
        log.close()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.slow
@pytest.mark.parametrize("runs", ["numeric", "options"], indirect=True)
def test_numbers(name, runs):
    if name == fastrnn.build_info()["isa"]:
        pytest.skip("the suite's own set")
    if name not in other_sets():
        pytest.skip("not supported by this CPU")
    if name not in runs:
        pytest.skip("uses the same kernels as the suite's own set")
    process, report, log, files, least = runs[name]
    status = process.wait()
    log.seek(0)
    tail = "\n".join(log.read().splitlines()[-60:])
    assert report.exists(), tail
    suite = ElementTree.parse(report).getroot().find("testsuite")
    under = {p.get("value") for p in suite.iter("property") if p.get("name") == "isa"}
    assert under == {name}, tail
    count = {key: int(suite.get(key)) for key in ["tests", "failures", "errors", "skipped"]}
    assert count["failures"] == count["errors"] == 0, tail
    assert status == 0, tail
    ran = {case.get("classname").rsplit(".")[-1] for case in suite.iter("testcase")}
    assert ran == {f.removesuffix(".py") for f in files}
    assert count["tests"] - count["skipped"] > least, count


@pytest.mark.parametrize("value", slow_after(1, ["sse9", ""]))
def test_unknown_cap_is_reported(value):
    """A misspelt FASTRNN_ISA must not be ignored silently."""
    run = subprocess.run(
        [sys.executable, "-c", "import fastrnn; print(fastrnn.build_info()['isa'])"],
        env=environment(value), cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if value:
        assert run.returncode != 0 or "sse9" in run.stderr, run.stdout
    else:
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() in SETS
