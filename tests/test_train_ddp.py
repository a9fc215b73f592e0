"""examples/train_ddp.py: the processes' shares of an epoch; small runs of one and two processes."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import one_line_error

pytest.importorskip("spellchecker", reason="the words come with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the plot needs the extra 'demo'")
pytest.importorskip("rich", reason="the table needs the extra 'demo'")

from examples import classify_text, common, train_ddp

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]

FEW = ["es", "lv", "eu"]  # reading the words of all nine languages takes seconds
ROOT = str(Path(__file__).parent.parent)
SMALL = ["--hidden", "16", "--words", "40"]


@pytest.fixture(autouse=True)
def three_languages(monkeypatch):
    few = {name: classify_text.LANGUAGES[name] for name in FEW}
    monkeypatch.setattr(classify_text, "LANGUAGES", few)


def run(folder, *arguments):
    train_ddp.main([*SMALL, "--out", str(folder / "a.png"), *arguments])


#: Runs the example several times in the processes of one torchrun; each run must end with equal
#: weights in all processes.
SCRIPT = """
import contextlib, json, sys, torch
from examples import classify_text, train_ddp
languages, *runs = map(json.loads, sys.argv[1:])
classify_text.LANGUAGES = languages
with train_ddp.processes() as found:
    train_ddp.processes = lambda: contextlib.nullcontext(found)
    built, make = [], classify_text.make
    classify_text.make = lambda *args: built.append(make(*args)) or built[-1]
    for arguments in runs:
        train_ddp.main(arguments)
        for p in built[-1][0].parameters():
            gathered = [torch.empty_like(p) for _ in range(2)]
            torch.distributed.all_gather(gathered, p.detach())
            assert torch.equal(*gathered)
        if found[0] == 0:
            print("end of a run")
"""


def run_with_two_processes(folder, *runs):
    """The runs under torchrun, in two processes; returns what each run printed."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    runs = [[*SMALL, "--out", str(folder / "b.png"), *arguments] for arguments in runs]
    arguments = [json.dumps(value) for value in [classify_text.LANGUAGES, *runs]]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    *printed, rest = done.stdout.split("end of a run\n")
    assert rest == ""
    return printed


def without_speed(printed):
    """The output without its steps per second, which must be there and above 0."""
    (speed,) = re.findall(r"^([\d.]+) steps a second$", printed, re.MULTILINE)
    assert float(speed) > 0
    return printed.replace(f"{speed} steps a second", "")


def assert_same_checkpoints(a, b):
    a, b = (torch.load(path, weights_only=True) for path in [a, b])
    assert a["epochs"] == b["epochs"] == 3
    assert a["best"] == b["best"]
    assert a["options"] == b["options"]
    for state in ["model", "kept"]:
        assert a[state].keys() == b[state].keys()
        for name, value in a[state].items():
            assert torch.equal(value, b[state][name])


@pytest.mark.slow
def test_training_resumes_identically(tmp_path, capsys):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(tmp_path, "--epochs", "3", "--checkpoint", str(whole))
    printed = capsys.readouterr().out
    run(tmp_path, "--epochs", "2", "--checkpoint", str(parts))
    capsys.readouterr()
    run(tmp_path, "--epochs", "3", "--checkpoint", str(parts), "--both-times")
    again, times = capsys.readouterr().out.split("A training step of all processes: ")
    assert without_speed(again) == without_speed(printed)
    assert re.match(r"torch [\d.]+ ms, fastrnn [\d.]+ ms$", times)
    assert "LSTM, fastrnn, 1 process " in printed
    assert_same_checkpoints(whole, parts)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # The training is complete, so there is nothing to time.
    run(tmp_path, "--epochs", "3", "--checkpoint", str(whole))
    assert "steps a second" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_resume_identically(tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    printed, _, again = run_with_two_processes(
        tmp_path,
        ["--epochs", "3", "--checkpoint", str(whole)],
        ["--epochs", "2", "--checkpoint", str(parts)],
        ["--epochs", "3", "--checkpoint", str(parts)],
    )
    assert without_speed(again) == without_speed(printed)
    assert printed.count("LSTM, fastrnn, 2 processes") == 1
    assert_same_checkpoints(whole, parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "b.png", "parts.pt", "script.py", "whole.pt",
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "count"), [(1000, 1), (1000, 3), (257, 2), (50, 4)])
def test_shares_are_equal_and_disjoint(rows, count, monkeypatch):
    """The processes' shares of an epoch; all generators have the same state when it starts."""
    monkeypatch.setattr(train_ddp.dist, "broadcast", lambda tensor, src: tensor)
    found, masks = [], []
    for epoch in range(2):
        for rank in range(count):
            torch.manual_seed(epoch)
            batches = train_ddp.shares(rows, rank, count)
            masks.append(torch.rand(3))
            found.append(torch.cat(batches))
            sizes = [len(batch) for batch in batches]
            assert sizes[:-1] == [128 // count] * (len(sizes) - 1)
            assert 1 <= sizes[-1] <= 128 // count
            assert sum(sizes) == rows // count
    for epoch in [found[:count], found[count:]]:
        assert len(torch.cat(epoch).unique()) == rows // count * count
    assert not torch.equal(found[0], found[count])
    assert len(torch.stack(masks).unique(dim=0)) == 2 * count


def test_training_learns(tmp_path, capsys):
    run(tmp_path, "--words", "200", "--epochs", "8")
    (share,) = (
        float(row.split("│")[2][:-2])
        for row in capsys.readouterr().out.splitlines()
        if "LSTM" in row
    )
    assert share > 100 * 2 / 3  # twice the accuracy of guessing one of three


error_of = partial(one_line_error, run)


def test_argument_errors_are_one_line(tmp_path, capsys):
    assert "train_ddp.py: argument --words: '0' is not" in error_of(
        capsys, tmp_path, "--words", "0"
    )
    assert "--words: 1 of each language" in error_of(capsys, tmp_path, "--words", "1")
    assert "no name for a picture" in error_of(capsys, tmp_path, "--out", "a.txt")


def test_checkpoint_of_another_run_is_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    run(tmp_path, "--epochs", "1", "--checkpoint", str(path))
    capsys.readouterr()
    state = torch.load(path, weights_only=True)
    state["options"]["processes"] = 2
    common.save_checkpoint(path, state)
    before = path.read_bytes()
    found = error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert f"--checkpoint: {path} has processes 2, not 1" in found
    assert path.read_bytes() == before
