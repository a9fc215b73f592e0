"""examples/simple_rnn.py, and what the examples share: checkpoints and one-line errors."""

import functools

import numpy as np
import pytest
import torch
from helpers import one_line_error
from torch import nn

import fastrnn

pytest.importorskip("statsmodels", reason="the sunspot data comes with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the plot needs the extra 'demo'")
pytest.importorskip("rich", reason="the table needs the extra 'demo'")

from examples import common, simple_rnn

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]


def test_series_and_windows():
    years, values = simple_rnn.sunspots()
    assert (years[0], years[-1], len(values)) == (1700, 2008, 309)
    x, y = simple_rnn.windows(np.arange(10.0), 3)
    assert x.shape == (7, 3, 1)
    assert x[2, :, 0].tolist() == [2, 3, 4]
    assert y.tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_autoregression_fits_and_sees_no_future():
    values = [1.0, 2.0]
    for _ in range(60):
        values.append(1.5 * values[-1] - 0.9 * values[-2] + 1)
    series = np.array(values)
    found = simple_rnn.autoregression(series, 40, order=2)
    np.testing.assert_allclose(found, series[40:], rtol=1e-6)
    series[50:] = 0  # after the values it is fitted to
    np.testing.assert_allclose(simple_rnn.autoregression(series, 40, 2)[:10], found[:10])


def test_both_layers_give_the_same_forecasts():
    x = torch.randn(4, 9, 1)
    ours, theirs = simple_rnn.SimpleRNN(fastrnn, 8), simple_rnn.SimpleRNN(nn, 8)
    assert isinstance(ours.rnn, fastrnn.RNN)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def run(tmp_path, *arguments):
    simple_rnn.main(["--hidden", "8", "--out", str(tmp_path / "a.png"), *arguments])


def test_training_resumes_identically(tmp_path, capsys):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(tmp_path, "--epochs", "6", "--checkpoint", str(whole), "--both-times")
    printed = capsys.readouterr().out
    for line in ["RNN, fastrnn", "11 years ago", "autoregression", "A training step: torch"]:
        assert line in printed
    run(tmp_path, "--epochs", "4", "--checkpoint", str(parts))
    run(tmp_path, "--epochs", "6", "--checkpoint", str(parts))
    a, b = (torch.load(path, weights_only=True) for path in [whole, parts])
    assert a["epochs"] == b["epochs"] == 6
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "parts.pt", "whole.pt"]


error_of = functools.partial(one_line_error, run)


def test_argument_errors_are_one_line(tmp_path, capsys):
    assert "'0' is not a whole number from 1 up" in error_of(capsys, tmp_path, "--epochs", "0")
    assert "--window: 500 years are more than" in error_of(capsys, tmp_path, "--window", "500")
    assert "no name for a picture" in error_of(capsys, tmp_path, "--out", "a.txt")
    assert "invalid choice: 'keras'" in error_of(capsys, tmp_path, "--layer", "keras")


def test_damaged_checkpoint_is_rejected_and_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    for content in [b"", b"no checkpoint", b"PK\x03\x04"]:
        path.write_bytes(content)
        assert f"--checkpoint: {path} is none" in error_of(
            capsys, tmp_path, "--checkpoint", str(path)
        )
        assert path.read_bytes() == content
    common.save_checkpoint(path, {"options": {"layer": "torch"}})
    found = error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert "has layer torch, not fastrnn" in found


def test_failed_save_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    common.save_checkpoint(path, {"options": {}})
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|local object"):
        common.save_checkpoint(path, {"options": lambda: None})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
