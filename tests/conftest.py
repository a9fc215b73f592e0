"""Options, markers and fixtures: the device and instruction set under test, and torch's state.

`pytest --device cuda` runs the tests on a GPU by making it torch's default device. Tests marked
`cpu` run on the CPU only, tests marked `cuda` on CUDA only.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Must be set before torch starts its threads. Idle OpenMP threads then sleep instead of spinning:
# the suite runs very many small parallel loops, and on a busy machine spinning makes it ten times
# slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Compiled cells of one's own: not in the user's cache.
os.environ.setdefault("FASTRNN_CACHE", str(Path(__file__).resolve().parents[1] / "build" / "cells"))

import pytest
import torch
from torch import nn

import fastrnn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="device (cpu)")
    parser.addoption("--fuzz", type=int, default=500, help="random cases per test (500)")
    parser.addoption("--soak", type=float, default=2, help="duration of test_soak in seconds (2)")
    parser.addoption("--other-cases", action="store_true", help="draw new random cases")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no such device")
        built = fastrnn.build_info()["cuda"]
        if built != "built":
            raise pytest.UsageError(f"--device cuda: fastrnn was built without CUDA: {built}")
        # The reference is torch's own kernels in float32. cuDNN's have no double backward, reject
        # non-contiguous states and round to TF32. test_cuda.py compares with cuDNN.
        torch.backends.cudnn.enabled = False
        torch.backends.cudnn.allow_tf32 = False
        # Must be set before collection: test modules create tensors when they are imported.
        torch.set_default_device("cuda")
    config.addinivalue_line(
        "markers", "once: does not depend on the instruction set, so test_isa.py skips it"
    )
    # Issued once per process by torch's own layer.
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    other = "cpu" if config.getoption("device") == "cuda" else "cuda"
    for item in items:
        mark = item.get_closest_marker(other)
        if mark:
            reason = mark.args[0] if mark.args else "needs CUDA"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("device") == "cuda":
        return f"fastrnn: on {torch.cuda.get_device_name()}"
    return f"fastrnn: instruction set {fastrnn.build_info()['isa']}"


@pytest.fixture
def step_by_step(monkeypatch) -> None:
    """A GPU computes every layer step by step, as it does with resets or lengths.

    In 16 bits the other paths round less.
    """
    monkeypatch.setenv("FASTRNN_CUDA_PATH", "stepwise")


@pytest.fixture(scope="session", autouse=True)
def isa(record_testsuite_property) -> str:
    """The instruction set under test, recorded in --junitxml, where test_isa.py checks it.

    fastrnn reads FASTRNN_ISA on import, so one process can only test one instruction set.
    test_isa.py runs each of the others in a separate process.
    """
    name = fastrnn.build_info()["isa"]
    record_testsuite_property("isa", name)
    order = fastrnn.build_info()["isa_compiled"]
    cap = os.environ.get("FASTRNN_ISA")
    if cap in order:
        assert order.index(name) <= order.index(cap), f"FASTRNN_ISA={cap} selected {name}"
    return name


@pytest.fixture(autouse=True)
def fixed_seed_and_threads() -> Iterator[None]:
    """Every test starts from seed 0 with two threads, whatever ran before and on any machine.

    Calls use all of these, also if this machine has fewer cores or is busy.
    """
    fastrnn._C.adapt_threads(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


CLASS_NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


@pytest.fixture
def without_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules take the operator path: torch's forward code and fastrnn's operators.

    Without this fixture the fast path of csrc/torch/fast_path.cpp bypasses both.
    """
    for name in CLASS_NAMES:
        layer = getattr(fastrnn, name)
        monkeypatch.setattr(layer, "forward", layer.forward.__wrapped__)
    for name in ("network", "step"):
        monkeypatch.setattr(fastrnn._C, name, lambda *args: None)


@pytest.fixture(autouse=True)
def torch_is_unpatched():
    """Fails if a test leaves torch patched."""
    before = [getattr(nn, name).__init__ for name in CLASS_NAMES]
    yield
    assert [getattr(nn, name).__init__ for name in CLASS_NAMES] == before


@pytest.fixture
def reports(caplog):
    """A function that returns the warnings fastrnn has logged so far."""
    caplog.set_level(logging.WARNING, logger="fastrnn")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
