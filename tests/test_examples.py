"""examples/forecast.py on a small slice: its data set, its training, its command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastrnn

pytest.importorskip("arch", reason="the prices come with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the picture needs the extra 'demo'")
pytest.importorskip("rich", reason="the tables need the extra 'demo'")

from examples import forecast
from examples.prices import PriceLSTM, PriceWindows, load_closes, split_windows

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
    assert y.shape == ()
    assert x.dtype == y.dtype == torch.float32
    # Window i is days i to i + 4, its target day i + 5.
    relative = x[:, 0].double() * data.scaling.std + data.scaling.mean + 1
    torch.testing.assert_close(relative * closes[3], closes[3:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(data.to_points(data.targets), closes[5:], rtol=1e-6, atol=0)
    torch.testing.assert_close(data.to_points(data.naive()), closes[4:-1], rtol=1e-6, atol=0)


def test_split_is_chronological_and_scaled_on_the_training_years_only():
    dates = np.concatenate([days(2014, 365), days(2015, 50)])
    closes = 1000 + torch.rand(415, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    train, test = split_windows(dates, closes, window=10, test_year=2015)
    assert len(train) == 365 - 10
    assert len(test) == 50
    torch.testing.assert_close(train.to_points(train.targets), closes[10:365])
    torch.testing.assert_close(test.to_points(test.targets), closes[365:])
    seen = torch.cat([train.inputs[..., 0], train.targets[:, None]], dim=1)
    assert abs(seen.mean().item()) < 1e-4
    assert seen.std().item() == pytest.approx(1, abs=1e-4)

    # Whatever the test years hold, the training set and its scaling stay the same.
    closes[365:] *= 3
    other, scaled_by_it = split_windows(dates, closes, window=10, test_year=2015)
    assert other.scaling == train.scaling == test.scaling == scaled_by_it.scaling
    assert torch.equal(other.inputs, train.inputs)


def test_too_few_days_are_refused():
    with pytest.raises(ValueError, match="5 closes hold no window of 5 days"):
        PriceWindows(torch.ones(5, dtype=torch.float64), window=5)
    with pytest.raises(ValueError, match="longer than the 20 training days"):
        split_windows(np.concatenate([days(2014, 20), days(2015, 9)]), torch.ones(29), window=20)


def test_prices():
    dates, closes = load_closes()
    assert dates.shape == closes.shape == (5031,)
    assert (np.diff(dates) > np.timedelta64(0)).all()
    assert closes.dtype == torch.float64
    assert 600 < closes.min() < closes.max() < 3000


@pytest.mark.parametrize("layer", [nn.LSTM, fastrnn.LSTM])
def test_model_shapes(layer):
    model = PriceLSTM(layer)
    assert isinstance(model.lstm, layer)
    assert model(torch.zeros(3, 10, 1)).shape == (3,)


def test_both_layers_train_to_close_forecasts():
    dates, closes = load_closes()
    data = split_windows(dates[3500:4200], closes[3500:4200], window=10)
    torch.manual_seed(1)
    initial = PriceLSTM().state_dict()
    runs = []
    for layer in (nn.LSTM, fastrnn.LSTM):
        model = PriceLSTM(layer)
        model.load_state_dict(initial)
        run = forecast.train(model, data, epochs=2, batch_size=64, seed=1, device=CPU)
        assert run.forecast.shape == (len(data[1]),)
        assert len(run.train_loss) == len(run.test_loss) == 2
        assert run.train_loss[1] < run.train_loss[0]
        runs.append(run)
    # Other dropout masks or another order of batches would move them apart by 1e-2 and more.
    torch.testing.assert_close(runs[0].forecast, runs[1].forecast, rtol=0, atol=1e-4)
    torch.testing.assert_close(runs[0].train_loss, runs[1].train_loss, rtol=1e-4, atol=0)


def test_quick_run_prints_its_tables_and_saves_the_picture(tmp_path):
    picture = tmp_path / "new folder" / "quick.png"
    command = [sys.executable, SCRIPT, "--quick", "--out", picture]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # what is tested, installed or not
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    for line in ("Loss by epoch", "Test error", "tomorrow = today", "Time of a training step"):
        assert line in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in picture.parent.iterdir()] == ["quick.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "0"], "'0' is not a whole number from 1 up"),
        (["--window", "ten"], "'ten' is not a whole number from 1 up"),
        (["--window", "5000"], "a window of 5000 days is longer than"),
        (["--seed", "-1"], "'-1' is not a whole number from 0 up"),
        (["--device", "abacus"], "--device"),
        (["--out", "forecast.xyz"], "forecast.xyz is no name for a picture"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        forecast.main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
