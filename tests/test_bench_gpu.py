"""bench/gpu.py: an error without a GPU; on one, real or emulated, its rows run."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fastrnn

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import gpu
import gpu_cases

pytestmark = pytest.mark.once


def test_rows_are_distinct():
    rows = gpu_cases.all_cases()
    assert len({case.key for case in rows}) == len(rows)
    assert {case.group for case in rows} == set(gpu_cases.GROUPS)
    assert {case.key for case in gpu_cases.quick_cases()} < {case.key for case in rows}


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench/gpu.py: torch finds no GPU; nothing was timed\n"


def test_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fastrnn, "build_info", lambda: {"cuda": "turned off"})
    assert gpu.main([]) == 2
    assert "fastrnn was built without CUDA: turned off" in capsys.readouterr().err


@pytest.mark.cuda
def test_toy_rows_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "quick_cases", gpu_cases.toy_cases)
    path = tmp_path / "gpu.json"
    picture = tmp_path / "gpu.png"
    arguments = ["--quick", "--rounds", "2", "--json", str(path), "--picture", str(picture)]
    with torch.device("cpu"):  # a user's default device, not that of the tests
        assert gpu.main(arguments) == 0
    results = json.loads(path.read_text())
    assert [row["key"] for row in results["rows"]] == [c.key for c in gpu_cases.toy_cases()]
    for row in results["rows"]:
        for name in ["fastrnn", "torch"]:
            assert len(row["contestants"][name]["seconds"]) == 2, row["contestants"][name]
        for name, found in row["contestants"].items():
            if "reason" in found:
                assert name == "haste" or "emulated" in found["reason"]
    assert results["machine"]["emulated"] == ("emulated" in torch.cuda.get_device_name())
    assert ("its clock says nothing" in capsys.readouterr().out) == gpu.emulated()
    assert picture.read_bytes().startswith(b"\x89PNG")
