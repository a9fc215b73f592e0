"""What every test can rely on: the device and the instruction set under test, torch left as found.

`pytest --device cuda` runs the tests on a GPU: it is torch's default device then, for the tensors
of a test as for its layers. Tests marked `cpu` are about the CPU alone, those marked `cuda` about
CUDA.
"""

import logging
import os
from collections.abc import Iterator

# Before torch starts its threads: those that wait for the next of very many small loops sleep
# rather than spin, or the suite takes ten times as long on a machine that has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import nn

import fastrnn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="of the tests")
    parser.addoption("--fuzz", type=int, default=500, help="random cases a test (500)")
    parser.addoption("--soak", type=float, default=2, help="seconds of test_soak (2)")
    parser.addoption("--other-cases", action="store_true", help="than those of every run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no such device")
        built = fastrnn.build_info()["cuda"]
        if built != "built":
            raise pytest.UsageError(f"--device cuda: fastrnn was built without CUDA: {built}")
        # torch's layers by its own kernels, in float32: cuDNN's have no double backward, take no
        # states of other strides, round to TF32. test_cuda.py compares with cuDNN.
        torch.backends.cudnn.enabled = False
        torch.backends.cudnn.allow_tf32 = False
        # Before the tests' files are read, which make tensors of their own.
        torch.set_default_device("cuda")
    config.addinivalue_line(
        "markers", "once: the same whatever the instruction set, so test_isa.py leaves it out"
    )
    # Of torch's own layer, once a process: nothing that a test here could do about it.
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    other = "cpu" if config.getoption("device") == "cuda" else "cuda"
    for item in items:
        mark = item.get_closest_marker(other)
        if mark:
            reason = mark.args[0] if mark.args else "a test of CUDA"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("device") == "cuda":
        return f"fastrnn: on {torch.cuda.get_device_name()}"
    return f"fastrnn: instruction set {fastrnn.build_info()['isa']}"


@pytest.fixture(scope="session", autouse=True)
def isa(record_testsuite_property) -> str:
    """The instruction set these tests run under; written into --junitxml for test_isa.py to check.

    FASTRNN_ISA is read when fastrnn is imported, so one process can only test one set: test_isa.py
    runs the others in processes of their own.
    """
    name = fastrnn.build_info()["isa"]
    record_testsuite_property("isa", name)
    order = fastrnn.build_info()["isa_compiled"]
    cap = os.environ.get("FASTRNN_ISA")
    if cap in order:
        assert order.index(name) <= order.index(cap), f"FASTRNN_ISA={cap} gave {name}"
    return name


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The same random numbers for a test whichever ran before it, and as many threads anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


TORCHS = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


@pytest.fixture
def without_direct_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules run torch's forward code and the operators: what csrc/direct.cpp is a shortcut of."""
    for name in TORCHS:
        layer = getattr(fastrnn, name)
        monkeypatch.setattr(layer, "forward", layer.forward.__wrapped__)
    for name in ("network", "step"):
        monkeypatch.setattr(fastrnn._C, name, lambda *args: None)


@pytest.fixture(autouse=True)
def torch_as_found():
    """No test may leave torch patched."""
    before = [getattr(nn, name).__init__ for name in TORCHS]
    yield
    assert [getattr(nn, name).__init__ for name in TORCHS] == before


@pytest.fixture
def reports(caplog):
    """The warnings in fastrnn's log, as a function."""
    caplog.set_level(logging.WARNING, logger="fastrnn")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
