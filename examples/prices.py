"""The S&P 500's daily closes as a data set, and the LSTM that forecasts the next one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

TEST_YEAR = 2015  # the first year of the test set; everything before it trains


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of the relative closes that a network is trained on."""

    mean: float
    std: float


class PriceWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of daily closes, each with the close of the day after.

    A close enters as its change against the first close of its window, standardised: levels would
    take the network far outside its training range as soon as the index passes its old peak.

    closes:  [days] float64, index points, oldest first
    scaling: None fits it on these closes; a test set is given its training set's
    item i:  (inputs [window, 1], target []), float32, scaled
    """

    def __init__(self, closes: Tensor, window: int, scaling: Scaling | None = None) -> None:
        if len(closes) <= window:
            raise ValueError(f"{len(closes)} closes hold no window of {window} days and a next day")
        days = closes.unfold(0, window + 1, 1)  # [windows, window + 1], index points
        relative = days / days[:, :1] - 1
        self.scaling = scaling or Scaling(relative.mean().item(), relative.std().item())
        scaled = ((relative - self.scaling.mean) / self.scaling.std).float()
        self.base = days[:, 0]  # [windows], index points: the close that each window is relative to
        self.inputs = scaled[:, :-1, None]  # [windows, window, 1]
        self.targets = scaled[:, -1]  # [windows]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def to_points(self, scaled: Tensor) -> Tensor:
        """scaled: [windows] -> [windows] float64, index points."""
        return (scaled.double() * self.scaling.std + self.scaling.mean + 1) * self.base

    def naive(self) -> Tensor:
        """The forecast 'tomorrow = today', scaled: [windows]."""
        return self.inputs[:, -1, 0]


def load_closes() -> tuple[np.ndarray, Tensor]:
    """The S&P 500 from 1999 to 2018: dates [days] (datetime64), closes [days] in index points."""
    from arch.data import sp500

    frame = sp500.load()
    return frame.index.to_numpy(), torch.tensor(frame["Close"].to_numpy(), dtype=torch.float64)


def split_windows(
    dates: np.ndarray, closes: Tensor, window: int, test_year: int = TEST_YEAR
) -> tuple[PriceWindows, PriceWindows]:
    """Training windows of the years before `test_year`, and test windows from there on.

    The first test windows reach back into training days for their inputs, never for a target.
    """
    first = int(np.searchsorted(dates, np.datetime64(f"{test_year}-01-01")))
    if window >= first:
        raise ValueError(f"a window of {window} days is longer than the {first} training days")
    train = PriceWindows(closes[:first], window)
    return train, PriceWindows(closes[first - window :], window, train.scaling)


class PriceLSTM(nn.Module):
    """A stacked LSTM and a linear layer on its last step.

    `layer` is nn.LSTM or any class with its constructor.
    """

    def __init__(self, layer: type[nn.LSTM] = nn.LSTM, hidden: int = 64) -> None:
        super().__init__()
        self.lstm = layer(1, hidden, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, 1] -> [B], both scaled."""
        steps, _ = self.lstm(x)
        return self.head(steps[:, -1]).squeeze(-1)
