"""examples/forecast.py on a small part of the data: data set, training and command line."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line_error
from torch import nn

import fastrnn

pytest.importorskip("arch", reason="the prices come with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the picture needs the extra 'demo'")
pytest.importorskip("rich", reason="the tables need the extra 'demo'")

from examples import forecast
from examples.forecast_report import Results, rmse
from examples.prices import SERIES, PriceNetwork, PriceWindows, load_closes, split_windows

pytestmark = pytest.mark.cpu("the examples run on the CPU")

SCRIPT = Path(forecast.__file__)
CPU = torch.device("cpu")


def days(year: int, count: int) -> np.ndarray:
    return np.datetime64(f"{year}-01-01") + np.arange(count)


def test_windows_and_targets_are_aligned():
    closes = torch.arange(100, 120, dtype=torch.float64)
    data = PriceWindows(closes, window=5)
    assert len(data) == 15
    x, y = data[3]
    assert x.shape == (5, 1)
    assert y.shape == (1, 1)
    assert x.dtype == y.dtype == torch.float32
    # Window i contains days i to i + 4, and its target is day i + 5.
    relative = x[:, 0].double() * data.scaling.std + data.scaling.mean + 1
    torch.testing.assert_close(relative * closes[3], closes[3:8], rtol=1e-6, atol=0)
    points, naive = (data.to_points(scaled)[:, 0, 0] for scaled in (data.targets, data.naive()))
    torch.testing.assert_close(points, closes[5:], rtol=1e-6, atol=0)
    torch.testing.assert_close(naive, closes[4:-1], rtol=1e-6, atol=0)


def test_split_is_chronological_and_scaled_by_training_years_only():
    dates = np.concatenate([days(2014, 365), days(2015, 50)])
    closes = 1000 + torch.rand(415, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    [(train, test)] = split_windows(dates, closes, window=10, test_year=2015)
    assert len(train) == 365 - 10
    assert len(test) == 50
    torch.testing.assert_close(train.to_points(train.targets)[:, 0, 0], closes[10:365])
    torch.testing.assert_close(test.to_points(test.targets)[:, 0, 0], closes[365:])
    seen = torch.cat([train.inputs, train.targets], dim=1)
    assert abs(seen.mean().item()) < 1e-4
    assert seen.std().item() == pytest.approx(1, abs=1e-4)

    # The training set and its scaling do not depend on the test years.
    closes[365:] *= 3
    [(other, other_test)] = split_windows(dates, closes, window=10, test_year=2015)
    assert other.scaling == train.scaling == test.scaling == other_test.scaling
    assert torch.equal(other.inputs, train.inputs)


@pytest.mark.once
def test_windows_of_several_series_and_days_ahead():
    closes = torch.stack([torch.arange(100, 120), torch.arange(900, 860, -2)], 1).double()
    data = PriceWindows(closes, window=5, horizon=3)
    assert len(data) == 13
    x, y = data[4]
    assert (x.shape, y.shape) == ((5, 2), (3, 2))
    relative = x.double() * data.scaling.std + data.scaling.mean + 1
    torch.testing.assert_close(relative * closes[4], closes[4:9], rtol=1e-6, atol=0)
    torch.testing.assert_close(data.to_points(data.targets)[4], closes[9:12], rtol=1e-6, atol=0)
    naive = closes[8].expand(3, 2)
    torch.testing.assert_close(data.to_points(data.naive())[4], naive, rtol=1e-6, atol=0)
    # Each series has its own scale.
    seen = torch.cat([data.inputs, data.targets], 1)
    torch.testing.assert_close(seen.mean((0, 1)), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.std((0, 1)), torch.ones(2))


@pytest.mark.once
@pytest.mark.parametrize(("horizon", "folds"), [(1, 1), (1, 4), (5, 4), (3, 7)])
def test_fold_trains_only_on_data_before_its_origin(horizon, folds):
    dates = np.concatenate([days(2014, 60), days(2015, 45)])
    closes = 100 + torch.rand(105, 2, dtype=torch.float64)
    found = split_windows(dates, closes, 10, horizon=horizon, folds=folds)
    assert len(found) == folds
    origin = 60
    for fold, (train, test) in enumerate(found):
        # The last training target is the close before the origin; the first test target is at it.
        torch.testing.assert_close(train.to_points(train.targets)[-1, -1], closes[origin - 1])
        torch.testing.assert_close(test.to_points(test.targets)[0, 0], closes[origin])
        later = closes.clone()
        later[origin:] = 1000
        other, _ = split_windows(dates, later, 10, horizon=horizon, folds=folds)[fold]
        assert torch.equal(other.inputs, train.inputs)
        assert torch.equal(other.targets, train.targets)
        assert torch.equal(other.scaling.mean, train.scaling.mean)
        assert torch.equal(test.scaling.std, train.scaling.std)
        assert len(train) == origin - 10 - horizon + 1
        origin += len(test)
    # Exactly one forecast starts on each test day that leaves room for the whole horizon.
    assert origin == 105 - horizon + 1
    sizes = [len(test) for _, test in found]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.once
def test_naive_errors_by_series_fold_and_day_ahead():
    dates = np.concatenate([days(2014, 60), days(2015, 43)])
    rising = torch.arange(103, dtype=torch.float64)
    closes = torch.stack([100 + rising, 500 - 2 * rising], 1)
    tests = [test for _, test in split_windows(dates, closes, 10, horizon=4, folds=2)]
    perfect = [test.targets for test in tests]
    losses = {"perfect": [([4.0, 2.0], [3.0, 1.0]), ([2.0, 1.0], [2.0, 2.0])]}
    series = [("up", "points"), ("down", "points")]
    results = Results(series, dates, closes, tests, {"perfect": perfect}, losses)
    assert results.folds == [slice(60, 80), slice(80, 100)]
    naive = results.errors["tomorrow = today"]
    ahead = torch.arange(1, 5, dtype=torch.float64)
    expected = torch.stack([-ahead, 2 * ahead], 1).expand(40, 4, 2)
    torch.testing.assert_close(naive, expected, rtol=1e-5, atol=0)
    mean = (ahead.square().mean()).sqrt()
    torch.testing.assert_close(rmse(naive), torch.stack([mean, 2 * mean]), rtol=1e-5, atol=0)
    assert rmse(results.errors["perfect"]).tolist() == [0, 0]
    assert results.mean_losses("perfect") == ([3.0, 1.5], [2.5, 1.5])


def test_too_few_days_raise():
    with pytest.raises(ValueError, match="5 closes hold no window of 5 days"):
        PriceWindows(torch.ones(5, dtype=torch.float64), window=5)
    with pytest.raises(ValueError, match="5 closes hold no window of 3 days and 3 more"):
        PriceWindows(torch.ones(5, dtype=torch.float64), window=3, horizon=3)
    dates = np.concatenate([days(2014, 20), days(2015, 9)])
    with pytest.raises(ValueError, match="longer than the 20 training days"):
        split_windows(dates, torch.ones(29), window=20)
    with pytest.raises(ValueError, match="window of 16 days and 5 ahead are more than the 20"):
        split_windows(dates, torch.ones(29), window=16, horizon=5)
    with pytest.raises(ValueError, match="7 folds are more than the 6 forecasts"):
        split_windows(dates, torch.ones(29), window=5, horizon=4, folds=7)


def test_prices():
    dates, closes = load_closes()
    assert (dates.shape, closes.shape) == ((5031,), (5031, 1))
    assert (np.diff(dates) > np.timedelta64(0)).all()
    assert closes.dtype == torch.float64
    assert 600 < closes.min() < closes.max() < 3000
    both_dates, both = load_closes(["nasdaq", "sp500"])
    assert (both_dates == dates).all()
    assert torch.equal(both[:, 1:], closes)
    fewer, all_four = load_closes(list(SERIES))
    assert all_four.shape == (len(fewer), 4)
    assert not all_four.isnan().any()
    assert fewer[0] >= np.datetime64("2014-01-01")
    assert torch.equal(all_four[:, :1], closes[np.isin(dates, fewer)])


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_same_forecasts_with_both_libraries(cell):
    ours, theirs = (
        PriceNetwork(getattr(library, cell), series=2, horizon=5).eval()
        for library in (fastrnn, nn)
    )
    assert isinstance(ours.rnn, getattr(fastrnn, cell))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 17, 2)
    assert ours(x).shape == (3, 5, 2)
    torch.testing.assert_close(ours(x), theirs(x))
    assert PriceNetwork(getattr(nn, cell))(torch.zeros(3, 10, 1)).shape == (3, 1, 1)


def test_training_with_both_libraries_gives_close_forecasts():
    dates, closes = load_closes()
    [data] = split_windows(dates[3500:4200], closes[3500:4200], window=10)
    torch.manual_seed(1)
    initial = PriceNetwork().state_dict()
    runs = []
    for layer in (nn.LSTM, fastrnn.LSTM):
        model = PriceNetwork(layer)
        model.load_state_dict(initial)
        run = forecast.train(model, data, epochs=2, batch_size=64, seed=1, device=CPU)
        assert run.forecast.shape == (len(data[1]), 1, 1)
        assert len(run.train_loss) == len(run.test_loss) == 2
        assert run.train_loss[1] < run.train_loss[0]
        runs.append(run)
    # Different dropout masks or another order of batches would change them by 1e-2 or more.
    torch.testing.assert_close(runs[0].forecast, runs[1].forecast, rtol=0, atol=1e-4)
    torch.testing.assert_close(runs[0].train_loss, runs[1].train_loss, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_quick_run_prints_its_tables_and_saves_the_picture(tmp_path):
    picture = tmp_path / "new folder" / "quick.png"
    command = [sys.executable, SCRIPT, "--quick", "--out", picture]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # also if not installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    for line in ("Loss by epoch", "Test error", "tomorrow = today", "Time of a training step"):
        assert line in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in picture.parent.iterdir()] == ["quick.png"]


def test_model_learns_a_periodic_series():
    closes = 100 + 10 * torch.sin(torch.arange(500, dtype=torch.float64) / 3)
    dates = np.concatenate([days(2014, 400), days(2015, 100)])
    [data] = split_windows(dates, closes, window=10, horizon=3)
    model = PriceNetwork(fastrnn.GRU, horizon=3)
    run = forecast.train(model, data, epochs=12, batch_size=16, seed=0, device=CPU)
    _, test = data
    naive = nn.functional.mse_loss(test.naive(), test.targets).item()
    assert run.test_loss[-1] < 0.1 * naive


def small(tmp_path, *arguments):
    forecast.main(
        [
            *("--quick", "--layer", "fastrnn", "--cell", "gru", "--horizon", "3", "--folds", "2"),
            *("--series", "sp500", "nasdaq", "--out", str(tmp_path / "out" / "a.png")),
            *arguments,
        ]
    )


@pytest.mark.slow
@pytest.mark.once
def test_folds_and_resumed_run(tmp_path, capsys):
    whole, parts = tmp_path / "new" / "whole.pt", tmp_path / "parts.pt"
    small(tmp_path, "--epochs", "2", "--checkpoint", str(whole), "--both-times")
    printed = capsys.readouterr().out
    for line in [
        "by fold",
        "2015-01-02",
        "by days ahead",
        "Time of a training step",
        "torch.nn",
    ]:
        assert line in printed
    small(tmp_path, "--epochs", "1", "--checkpoint", str(parts))
    assert "Time of" not in capsys.readouterr().out
    small(tmp_path, "--epochs", "2", "--checkpoint", str(parts))
    a, b = (torch.load(path, weights_only=True)["runs"] for path in [whole, parts])
    assert list(a) == list(b) == ["fastrnn.GRU 1", "fastrnn.GRU 2"]
    for fold, state in a.items():
        assert len(state["train_loss"]) == 2
        for name in ["train_loss", "test_loss"]:
            assert state[name] == b[fold][name]
        assert torch.equal(state["forecast"], b[fold]["forecast"])
        for name, value in state["model"].items():
            assert torch.equal(value, b[fold]["model"][name])
    assert (tmp_path / "out" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


error_of = functools.partial(one_line_error, small)


@pytest.mark.once
def test_invalid_checkpoint_is_reported_and_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    path.write_bytes(b"no checkpoint")
    found = error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert f"--checkpoint: {path} is none" in found
    path.unlink()
    small(tmp_path, "--checkpoint", str(path))
    capsys.readouterr()
    before = path.read_bytes()
    found = error_of(capsys, tmp_path, "--checkpoint", str(path), "--cell", "rnn")
    assert "has cell gru, not rnn" in found
    found = error_of(capsys, tmp_path, "--checkpoint", str(path), "--epochs", "1")
    assert "has 2 epochs, more than 1" in found
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    assert f"{path} is none" in error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert path.read_bytes() == before[:-100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "'0' is not a whole number from 1 up"),
        (["--window", "ten"], "'ten' is not a whole number from 1 up"),
        (["--window", "5000"], "a window of 5000 days is longer than"),
        (["--seed", "-1"], "'-1' is not a whole number from 0 up"),
        (["--device", "abacus"], "--device"),
        (["--out", "forecast.xyz"], "forecast.xyz is no name for a picture"),
        (["--cell", "qrnn"], "invalid choice: 'qrnn'"),
        (["--series", "dax"], "invalid choice: 'dax'"),
        (["--layer", "keras"], "invalid choice: 'keras'"),
        (["--horizon", "5000"], "are more than the 4025 training days"),
        (["--folds", "5000"], "5000 folds are more than the 1006 forecasts"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_invalid_arguments_exit_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        forecast.main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
