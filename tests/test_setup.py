"""What setup.py decides before anything is compiled."""

import importlib.util
import itertools
from pathlib import Path

import pytest

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def setup():
    path = Path(__file__).parent.parent / "setup.py"
    spec = importlib.util.spec_from_file_location("fastrnn_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(tmp_path):
    """A folder with an nvcc that says it is 13.0."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_nvcc_version(setup, cuda_home, tmp_path, monkeypatch):
    assert setup.nvcc_version(str(cuda_home)) == "13.0"
    assert setup.nvcc_version(str(tmp_path / "nowhere")) is None
    monkeypatch.setenv("PATH", str(cuda_home / "bin"), prepend=":")
    assert setup.nvcc_version(None) == "13.0"


REASONS = {
    (None, None): "no nvcc was found",
    (None, "13.0"): "no nvcc was found",
    ("13.0", None): "was built without CUDA",
    ("12.8", "13.0"): "nvcc is 12.8, torch was built with CUDA 13.0",
    ("13.2", "13.0"): None,
    ("13.0", "13.0"): None,
}


@pytest.mark.parametrize("forced", [None, "", "0", "1"])
def test_whether_cuda_is_built(setup, forced):
    for (nvcc, torch_cuda), reason in REASONS.items():
        if forced == "0":
            assert setup.why_no_cuda(forced, nvcc, torch_cuda) == "turned off by FASTRNN_CUDA=0"
        elif reason is None:
            assert setup.why_no_cuda(forced, nvcc, torch_cuda) is None
        elif forced == "1":
            with pytest.raises(SystemExit, match="FASTRNN_CUDA=1, but") as error:
                setup.why_no_cuda(forced, nvcc, torch_cuda)
            assert reason in str(error.value)
            assert "\n" not in str(error.value)
        else:
            assert reason in setup.why_no_cuda(forced, nvcc, torch_cuda)


def test_an_unknown_value_is_refused(setup):
    for nvcc, torch_cuda in itertools.product([None, "13.0"], repeat=2):
        with pytest.raises(SystemExit, match="FASTRNN_CUDA is 'yes', expected 0 or 1"):
            setup.why_no_cuda("yes", nvcc, torch_cuda)


def test_cuda_archs(setup, monkeypatch):
    assert setup.cuda_archs("8.6;9.0+PTX", gpu=False) == "8.6;9.0+PTX"
    monkeypatch.setattr(setup.torch.cuda, "get_device_capability", lambda: (8, 9))
    assert setup.cuda_archs(None, gpu=True) == "8.9"
    torch_archs = ["sm_50", "sm_80", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setattr(setup.torch.cuda, "get_arch_list", lambda: torch_archs)
    assert setup.cuda_archs(None, gpu=False) == "8.0;9.0;12.0+PTX"
    monkeypatch.setattr(setup.torch.cuda, "get_arch_list", list)
    assert setup.cuda_archs("", gpu=False).endswith("+PTX")
