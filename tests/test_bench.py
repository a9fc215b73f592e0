"""bench/cpu.py and the scripts that read its results. No test asserts a time."""

import copy
import dataclasses
import importlib.util
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_features import skip_without_export_of_layers

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import calls
import cases
import compare
import contestants
import cpu
import figures
import growth
import readme
import timing
from cases import Case

pytestmark = [pytest.mark.once, pytest.mark.cpu("bench/cpu.py runs on the CPU")]

TINY = Case("inference", "GRU", "inference", 3, 2, 8, 8, threads=1, peers=cases.INFERENCE_PEERS)


# --- the rows -------------------------------------------------------------------------------------


def test_rows_are_distinct():
    rows = cases.all_cases()
    assert len({case.key for case in rows}) == len(rows)
    assert {case.group for case in rows} == set(cases.GROUPS)
    assert {case.key for case in cases.quick_cases()} < {case.key for case in rows}
    assert {case.group for case in cases.quick_cases()} == set(cases.GROUPS)


def test_grid():
    for mode in ["inference", "training"]:
        rows = [case for case in cases.grid() if case.mode == mode]
        assert len(rows) == len(cases.CELLS) * len(cases.SIZES) * len(cases.BATCHES)


def test_sample():
    rows = list(cases.sample())
    assert len(rows) >= 300
    assert rows == list(cases.sample())
    for name, axis in cases.SAMPLE_AXES.items():
        assert {getattr(case, name) for case in rows} == set(axis)
    for case in rows:
        forward = dataclasses.replace(case, mode="inference").operations
        assert forward <= cases.SAMPLE_BOUNDS[case.mode]


@pytest.mark.parametrize("case", cases.quick_cases(), ids=lambda case: case.key)
def test_operation_count(case):
    """Two operations per weight, row and step; three times as many in training."""
    options = {}
    if not case.cell.endswith("Cell"):
        options = contestants.options_of(case)
    layer = getattr(nn, case.cell)(case.I, case.H, device="meta", **options)
    weights = sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)
    forward = 2 * weights * sum(case.lengths)
    assert case.operations == forward * (3 if case.mode == "training" else 1)


def test_lengths():
    case = next(case for case in cases.all_cases() if case.packed)
    assert len(case.lengths) == case.B
    assert case.lengths == sorted(case.lengths, reverse=True)
    assert 5 <= min(case.lengths) < max(case.lengths) <= case.T
    assert dataclasses.replace(case, packed=False).lengths == [case.T] * case.B


def test_case_json_round_trip():
    for case in cases.quick_cases():
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


# --- the check of results -------------------------------------------------------------------------

SMALL = {"T": 4, "B": 2, "I": 5, "H": 6, "threads": 1, "peers": ("torch",)}


@pytest.mark.parametrize(
    ("cell", "mode"),
    [(cell, mode) for cell in cases.CELLS for mode in ["inference", "training", "streaming"]]
    + [(f"{cell}Cell", "streaming") for cell in cases.CELLS],
)
def test_correct_modules_pass_the_check(cell, mode):
    case = Case("sample", cell, mode, **SMALL)
    with torch.inference_mode(mode != "training"):
        found = dict(contestants.contestants(case))
        assert set(found) == {"fastrnn", "torch"}
        for call in found.values():
            call()


def test_dtypes_and_options_pass_the_check():
    options = [{"dtype": dtype} for dtype in ["float64", "bfloat16", "float16"]]
    options.append({"packed": True, "T": 9, "layers": 2, "directions": 2})
    options.append({"projection": 3, "directions": 2})
    options.append({"recompute": True, "peers": ("torch", "fastrnn keeping gates")})
    for option in options:
        case = Case("sample", "LSTM", "training", **{**SMALL, **option})
        assert all(callable(call) for _, call in contestants.contestants(case))


@pytest.mark.parametrize("mode", ["inference", "training", "streaming"])
def test_contestants_with_wrong_results_are_not_timed(mode, monkeypatch):
    real = contestants.ours

    def wrong(arguments, dtype, recompute):
        changed = copy.deepcopy(arguments.layer)
        with torch.no_grad():
            changed.weight_hh_l0[0, 0] += 1e-2
        return real(dataclasses.replace(arguments, layer=changed), dtype, recompute)

    monkeypatch.setattr(contestants, "ours", wrong)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = timing.measure(Case("sample", "LSTM", mode, **SMALL), rounds=3)
    assert "is off by" in found["contestants"]["fastrnn"]["reason"]
    assert "seconds" not in found["contestants"]["fastrnn"]
    assert len(found["contestants"]["torch"]["seconds"]) == 3
    assert "ratio" not in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t + 1e-3, "is off by"),
        (lambda t: t * math.nan, "is off by"),
        (lambda t: t[:1], "has shape"),
    ],
)
def test_difference(change, reason):
    expected = {"output": torch.ones(3, dtype=torch.float64)}
    assert contestants.difference({"output": torch.ones(3)}, expected) is None
    assert reason in contestants.difference({"output": change(torch.ones(3))}, expected)
    assert contestants.difference({}, expected) == "no output"


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = dict(contestants.contestants(dataclasses.replace(TINY, peers=("ONNX Runtime",))))
    assert "is not installed" in found["ONNX Runtime"]
    assert callable(found["fastrnn"])


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_rows_end_to_end(tmp_path, monkeypatch, capsys):
    rows = [TINY, Case("training", "LSTM", "training", **SMALL)]
    monkeypatch.setattr(cpu, "all_cases", lambda: rows)
    path = tmp_path / "new" / "cpu.json"
    cpu.main(["--json", str(path), "--rounds", "3", "--picture", str(tmp_path / "cpu.png")])
    results = json.loads(path.read_text())
    assert set(results) == {
        *("machine", "versions", "date", "options", "notes", "peak", "rows"),
    }
    assert [row["key"] for row in results["rows"]] == [case.key for case in rows]
    for row in results["rows"]:
        assert "error" not in row
        assert set(row["contestants"]) == {"fastrnn", *row["peers"]}
        assert len(row["peak"]) == 3
        for name, found in row["contestants"].items():
            if "reason" in found:
                assert found["reason"].endswith("is not installed")
                assert name not in ("torch", "fastrnn")
            else:
                assert len(found["seconds"]) == 3
        timed = {name for name, found in row["contestants"].items() if "seconds" in found}
        assert {"torch", "fastrnn"} <= timed
        assert set(row["ratio"]) == timed - {"fastrnn"}
        assert all(r["low"] <= r["median"] <= r["high"] for r in row["ratio"].values())
        assert row["share"] > 0
    assert "speedup over torch" in capsys.readouterr().out
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")

    # --resume keeps finished rows, and refuses results from another machine.
    monkeypatch.setattr(cpu, "run", lambda case, rounds: pytest.fail("the row was finished"))
    cpu.main(["--json", str(path), "--resume"])
    assert json.loads(path.read_text())["rows"] == results["rows"]
    monkeypatch.setattr(cpu, "machine", lambda: {"cpu": "another"})
    with pytest.raises(SystemExit, match="another machine"):
        cpu.main(["--json", str(path), "--resume"])


def test_disturbed_rows():
    def row(*peak, threads=2):
        return {"peak": peak, "threads": threads}

    rows = {
        "best": row(300, 310, 290),
        "slow": row(200, 210, 205),
        "uneven": row(305, 310, 150),
        "one thread": row(150, 155, 149, threads=1),
    }
    assert set(cpu.undisturbed(rows)) == {"best", "one thread"}


MODULES = {"torch": "torch", "ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
MODULES |= {"JAX": "jax", "TensorFlow": "tensorflow"}
BY_MODE = {"inference": cases.INFERENCE_PEERS, "training": cases.TRAINING_PEERS}


@pytest.mark.slow
@pytest.mark.parametrize("mode", BY_MODE)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_peers_that_are_installed_compute_the_same(cell, mode):
    """A peer with wrong results would have a reason instead of a time."""
    case = dataclasses.replace(TINY, cell=cell, mode=mode, peers=BY_MODE[mode])
    row = timing.run(case, rounds=3)
    assert "error" not in row
    for name in BY_MODE[mode]:
        found = row["contestants"][name]
        if importlib.util.find_spec(MODULES[name]):
            assert "seconds" in found, found
        else:
            assert found["reason"].endswith("is not installed")


@pytest.mark.slow
def test_row_with_other_processes_running(monkeypatch):
    """The other processes run only while the row does."""
    started = []
    popen = subprocess.Popen

    def recorded(command, *args, **kwargs):
        process = popen(command, *args, **kwargs)
        if timing.BUSY in command:
            started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", recorded)
    row = timing.run(dataclasses.replace(TINY, peers=("torch",), beside=2), rounds=3)
    assert "error" not in row
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_failing_row_records_an_error():
    case = dataclasses.replace(TINY, dtype="nothing")
    row = timing.run(case, rounds=3)
    assert row["key"] == case.key
    assert "exit status 1" in row["error"]
    assert cpu.table("inference", [row]).row_count == 1


# --- scripts that read the results ----------------------------------------------------------------


def synthetic(factors):
    """Made-up results of the grid, growth and sample; fastrnn's times are scaled by `factors`."""
    chosen = [*cases.grid(), *cases.growth(), *list(cases.sample())[:4]]
    rows = []
    for case in chosen:
        ours = [factors.get(case.key, 1) * s for s in (1.0e-3, 1.01e-3, 1.02e-3)]
        found = {"fastrnn": {"calls": 10, "seconds": ours}}
        for peer in case.peers:
            found[peer] = {"calls": 10, "seconds": [2e-3] * 3}
        peak = [2e11] * 3
        row = {"key": case.key, **case.to_json(), "operations": case.operations, "peak": peak}
        rows.append({**row, "contestants": found, **timing.summary(case, found, peak)})
    machine = {"cpu": "A CPU", "isa": "avx2", "cores": 2}
    results = {"machine": machine, "versions": {"torch": "2.13.0", "jax": "0.10"}}
    return {**results, "date": "2026-01-01", "peak": cpu.peak_of(rows), "rows": rows}


def test_compare_shows_only_significant_changes(tmp_path, capsys):
    rows = synthetic({})["rows"]
    large, small = rows[3], rows[7]
    old, new = synthetic({}), synthetic({large["key"]: 1.5, small["key"]: 1.025})
    ((row, ours, control),) = compare.compare(old, new)
    assert row["key"] == large["key"]
    assert ours == pytest.approx(1.5)
    assert control == pytest.approx(1)
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, results in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(results))
    compare.main(list(map(str, paths)))
    assert (
        f"{len(rows)} rows in both: 0 faster, 1 slower (0 of these as torch)"
        in capsys.readouterr().out
    )


def test_compare_normalises_by_peak_throughput():
    """A machine half as fast is no change; wide quartiles hide a change."""
    old, new = synthetic({}), synthetic({})
    for row in new["rows"]:
        row["peak"] = [rate / 2 for rate in row["peak"]]
        for found in row["contestants"].values():
            found["seconds"] = [2 * value for value in found["seconds"]]
    assert compare.compare(old, new) == []
    row = new["rows"][0]
    row["contestants"]["fastrnn"]["seconds"] = [2e-3, 2.4e-3, 2.8e-3]
    assert compare.change(old["rows"][0], row, "fastrnn") == (pytest.approx(2.4 / 2.02), True)
    row["contestants"]["fastrnn"]["seconds"] = [1e-3, 2.4e-3, 2.8e-3]
    assert compare.change(old["rows"][0], row, "fastrnn") == (pytest.approx(2.4 / 2.02), False)


def test_compare_recognises_changes_that_torch_shares():
    assert compare.alike(1.5, 1.4)
    assert compare.alike(0.8, 0.9)
    assert not compare.alike(0.8, 1.1)
    assert not compare.alike(1.5, 1.01)
    assert not compare.alike(1.5, None)


def test_speedups():
    rows = synthetic({})["rows"][:4]
    rows[0]["ratio"]["torch"] = {"low": 0.5, "median": 0.6, "high": 0.7}
    rows[1]["ratio"]["torch"] = {"low": 0.8, "median": 0.9, "high": 1.1}
    rows[2]["ratio"] = {}
    found = figures.speedups(rows)
    assert found["rows"] == 3
    assert (found["slower"], found["beyond"]) == (2, 1)
    assert (found["lowest"], found["median"]) == (0.6, 0.9)
    assert figures.speedups([]) is None


def test_growth(tmp_path):
    """One figure per axis, with all its sizes and a line of the expected slope."""
    results = synthetic({})
    rows = [row for row in results["rows"] if row["group"] == "growth"]
    for axis, sizes in cases.GROWTH_AXES.items():
        for cell in ["LSTM", "GRU"]:
            points = growth.series(rows, cell, axis, "fastrnn")
            assert [size for size, _ in points] == sizes
    assert growth.guide("H", [(16, 9.0), (64, 16.0)], cores=2) == [(16, 1.0), (64, 16.0)]
    lines = growth.guide("threads", [(1, 4.0), (2, 9.0), (4, 9.0)], cores=2)
    assert lines == [(1, 4.0), (2, 2.0), (4, 2.0)]
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(results))
    growth.main([str(path), str(tmp_path / "out")])
    pictures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pictures == sorted(f"growth_{axis}.png" for axis in cases.GROWTH_AXES)


def test_section_of_a_page_is_replaced():
    text = "before\n<!-- cpu -->\nold\n<!-- end of cpu -->\nafter\n"
    new = readme.written(text, "cpu", "| new |")
    assert new == "before\n<!-- cpu -->\n| new |\n<!-- end of cpu -->\nafter\n"
    assert readme.written(new, "cpu", "| new |") == new
    with pytest.raises(SystemExit, match="no place"):
        readme.written("nothing", "cpu", "| new |")


def test_readme_lists_every_slower_row():
    results = synthetic({})
    shown = readme.cpu_speed([results])
    assert "| 4 | 1.98 | 1.98 | 0 |" in shown  # the random rows
    assert "Every row below 1" not in shown
    slow = {row["key"]: row for row in results["rows"] if row["H"] in (64, 100)}
    results = synthetic(dict.fromkeys(slow, 5))
    shown = readme.cpu_speed([results])
    below = shown.partition("Every row below 1:")[2]
    found = [row for row in results["rows"] for name in row["ratio"] if name in figures.PEERS]
    assert below.count("**0.40**") == sum(row["key"] in slow for row in found)
    assert "| inference | JAX | GRU, inference, float32 | B = 1, H = 64: **0.40**; " in below
    sample = [row for row in results["rows"] if row["group"] == "sample" and row["key"] in slow]
    for row in sample:
        layers = "1 layer," if row["layers"] == 1 else f"{row['layers']} layers,"
        assert f"T = {row['T']}, B = {row['B']}, H = {row['H']}, {layers}" in below


def test_grid_table():
    table = readme.cpu_grid(synthetic({})).splitlines()
    assert len(table) == 2 + len(cases.CELLS) * len(cases.SIZES) * len(cases.BATCHES)
    assert table[2].startswith("| LSTM | 1 | 64 | 1.0 ms |")
    assert all(line.endswith("| 1.98 | 1.98 | 1.98 | 1.98 | 1.98 | 1.98 |") for line in table[2:])


def test_readme_covers_every_group_of_results():
    cpu = [*readme.CPU_RUNS, "lopsided"]
    for runs, names in [(cpu, readme.CPU_GROUPS), (["gpu"], readme.GPU_GROUPS)]:
        groups = [{row["group"] for row in readme.load(run)["rows"]} for run in runs]
        assert set.union(*groups) == set(names)
        assert sum(map(len, groups)) == len(names)  # no group is in two files


def test_gpu_page():
    names = ["torch", "torch in a graph", "fastrnn in a graph", "fastrnn stepwise"]
    ratios = {name: {"median": 3.0 / (1 + i)} for i, name in enumerate(names)}
    rows = [
        {"group": group, "cell": cell, "dtype": dtype, "H": H, "B": B,
         "contestants": {"fastrnn": {"seconds": [0.0003]}},
         "ratio": ratios | ({"fastrnn persistent": {"median": 1.0}} if B == 64 else {})}
        for group in ["inference", "training"]
        for cell in ["LSTM", "GRU"]
        for dtype in ["float16", "float32"]
        for H in [64, 128, 256, 512, 1024, 2048]
        for B in [1, 8, 32, 64, 256]
    ]  # fmt: skip
    machine = {"gpu": "A GPU", "cuda": "13.0", "cudnn": 9}
    results = {"machine": machine, "versions": {"torch": "9"}, "date": "today", "rows": rows}
    page = readme.gpu_grid(results)
    assert page.startswith("A GPU, torch 9, CUDA 13.0,\ncuDNN 9, today. T = 100")
    assert "| GRU | float32 | 512 | 32 | 300 µs | 3.00 | 1.50 | 0.75 |  | 3.00 |" in page
    assert "| GRU | float32 | 64 | 64 | 300 µs | 3.00 | 1.50 | 0.75 | 1.00 | 3.00 |" in page


def test_counter_table():
    rows = [
        {"cell": "GRU", "pass": "forward", "H": 64, "B": 8, "dtype": dtype, "path": path,
         "all_launches": launches, "all_bytes": launches * 2**20}
        for dtype in ["float32", "float16"]
        for path, launches in [("stepwise", 44), ("persistent", 4), ("beside", 42)]
    ]  # fmt: skip
    table = readme.counters({"rows": rows}).splitlines()
    assert table[2:] == ["| GRU | forward | 64 | 8 | 4 | 44 | 42 | 4.00 | 44.00 | 42.00 |"]


# --- bench/calls.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["LSTM", "GRUCell"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k == "compile" else []) for k in calls.KINDS],
)
def test_kinds_of_calls(kind, module):
    """Every kind of call gives torch's results."""
    if not calls.fits(kind, module):
        pytest.skip("torch has no such call of this module")
    if kind == "export":
        skip_without_export_of_layers()
    how = calls.KINDS[kind]
    for training in [False, True]:
        if how.step if training else how.inference:
            _, wrong = calls.contestants(kind, module, 2, training)
            if wrong and "torch can't: could not create a primitive" in wrong:
                pytest.skip("oneDNN has no bfloat16 LSTM for this CPU")
            assert wrong is None
