"""Daily closes as a data set, and the network that forecasts them."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

TEST_YEAR = 2015  # the first test year; the years before it are for training
# The daily prices of arch.data: column, name, unit.
SERIES = {
    "sp500": ("Close", "S&P 500", "index points"),
    "nasdaq": ("Close", "NASDAQ", "index points"),
    "vix": ("vix", "VIX", "index points"),
    "wti": ("DCOILWTICO", "crude oil (WTI)", "dollars a barrel"),
}


@dataclass(frozen=True)
class Scaling:
    """The mean and standard deviation of the relative closes in training, both [S] float64."""

    mean: Tensor
    std: Tensor


class PriceWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of daily closes of S series, each with the closes of the `horizon` days after.

    A close is its relative change since the first close of its window, standardized: absolute
    closes would be far outside of the training range as soon as an index passes its old peak.

    closes:  [days] or [days, S] float64, oldest first
    scaling: None fits it to these closes; a test set gets that of its training set
    item i:  (inputs [window, S], targets [horizon, S]), float32, scaled
    """

    def __init__(
        self, closes: Tensor, window: int, horizon: int = 1, scaling: Scaling | None = None
    ) -> None:
        if len(closes) < window + horizon:
            after = "a next day" if horizon == 1 else f"{horizon} more"
            raise ValueError(f"{len(closes)} closes hold no window of {window} days and {after}")
        series = closes.view(len(closes), -1)
        days = series.unfold(0, window + horizon, 1).mT  # [windows, window + horizon, S]
        relative = days / days[:, :1] - 1
        self.scaling = scaling or Scaling(relative.mean((0, 1)), relative.std((0, 1)))
        scaled = ((relative - self.scaling.mean) / self.scaling.std).float()
        self.base = days[:, :1]  # [windows, 1, S]: the first close of each window
        self.inputs = scaled[:, :window]  # [windows, window, S]
        self.targets = scaled[:, window:]  # [windows, horizon, S]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def to_points(self, scaled: Tensor) -> Tensor:
        """[windows, horizon, S], scaled -> the same in the units of the series, float64."""
        return (scaled.double() * self.scaling.std + self.scaling.mean + 1) * self.base

    def naive(self) -> Tensor:
        """The forecast 'tomorrow = today' for all days ahead, scaled: [windows, horizon, S]."""
        return self.inputs[:, -1:].expand_as(self.targets)


def load_closes(names: list[str] | None = None) -> tuple[np.ndarray, Tensor]:
    """The closes of SERIES on the days that all of them have; by default those of the S&P 500.

    Returns dates [days] (datetime64), closes [days, S] float64.
    """
    import pandas as pd

    names = names or ["sp500"]
    columns = [
        importlib.import_module(f"arch.data.{name}").load()[SERIES[name][0]] for name in names
    ]
    frame = pd.concat(columns, axis=1, join="inner").dropna().sort_index()
    return frame.index.to_numpy(), torch.tensor(frame.to_numpy(), dtype=torch.float64)


def split_windows(
    dates: np.ndarray,
    closes: Tensor,
    window: int,
    test_year: int = TEST_YEAR,
    horizon: int = 1,
    folds: int = 1,
) -> list[tuple[PriceWindows, PriceWindows]]:
    """The training windows and test windows of each of `folds` origins.

    The days from `test_year` on are divided into `folds` stretches of equal length. The origin of a
    fold is the first day of its stretch. The closes before it are the training data, also of the
    scaling; the forecasts whose first day is in the stretch are the test. So no training target is
    at or after the origin, and no network has seen a day that it forecasts. The inputs of test
    windows start before the origin, and the last forecasts of a stretch reach into the next.
    """
    first = int(np.searchsorted(dates, np.datetime64(f"{test_year}-01-01")))
    if window >= first:
        raise ValueError(f"a window of {window} days is longer than the {first} training days")
    if window + horizon > first:
        said = f"a window of {window} days and {horizon} ahead"
        raise ValueError(f"{said} are more than the {first} training days")
    starts = len(dates) - horizon + 1 - first  # forecasts that end by the last day
    if starts < folds:
        raise ValueError(f"{folds} folds are more than the {max(starts, 0)} forecasts of the test")
    origins = [first + starts * fold // folds for fold in range(folds + 1)]
    found = []
    for origin, end in itertools.pairwise(origins):
        train = PriceWindows(closes[:origin], window, horizon)
        seen = closes[origin - window : end + horizon - 1]
        found.append((train, PriceWindows(seen, window, horizon, train.scaling)))
    return found


class PriceNetwork(nn.Module):
    """A stacked LSTM, GRU or RNN, and a Linear layer that forecasts all days from the last step.

    layer: nn.LSTM, or a class with the same constructor.
    """

    def __init__(
        self, layer: Any = nn.LSTM, series: int = 1, horizon: int = 1, hidden: int = 64
    ) -> None:
        super().__init__()
        self.rnn = layer(series, hidden, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(hidden, horizon * series)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, S] -> [B, horizon, S], both scaled."""
        steps, _ = self.rnn(x)
        return self.head(steps[:, -1]).unflatten(1, (-1, x.shape[-1]))
