"""Forecasts the number of sunspots of the next year with a vanilla recurrent network.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        y = w h_T + b

reads one year per step, and forecasts the next year from the last state. It keeps the weights of
the epoch with the lowest validation loss. Two baselines have no network: the value of eleven years
before, and a linear autoregression.

    python examples/simple_rnn.py                  # seconds
    python examples/simple_rnn.py --layer torch    # the same with torch.nn.RNN
    python examples/simple_rnn.py --both-times     # also times a step with either layer
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastrnn

if __package__:
    from . import common
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common

SEASON = 11  # approximate years of a solar cycle
VALIDATION_FROM, TEST_FROM = 1910, 1950


class SimpleRNN(nn.Module):
    """A Linear layer on the last state of an RNN: [B, T, 1] -> [B]."""

    def __init__(self, library: Any = fastrnn, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = library.RNN(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.rnn(x)
        return self.out(h_n[-1])[:, 0]


def sunspots() -> tuple[np.ndarray, np.ndarray]:
    """The years, and the mean number of sunspots in each, from statsmodels: both [309]."""
    import statsmodels.datasets.sunspots

    data = statsmodels.datasets.sunspots.load_pandas().data
    return data["YEAR"].to_numpy(int), data["SUNACTIVITY"].to_numpy(float)


def windows(values: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """All windows of `length` values, and the value after each: [N, length, 1] and [N]."""
    series = torch.from_numpy(values).float()
    return series.unfold(0, length, 1)[:-1, :, None], series[length:]


def step(model: SimpleRNN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def autoregression(values: np.ndarray, count: int, order: int) -> np.ndarray:
    """One-step forecasts of values[count:] by a linear autoregression fitted to values[:count]."""
    rows = np.lib.stride_tricks.sliding_window_view(values, order)[:-1]
    rows = np.column_stack([rows, np.ones(len(rows))])
    weights, *_ = np.linalg.lstsq(rows[: count - order], values[order:count], rcond=None)
    return rows[count - order :] @ weights


def rmse(forecast: np.ndarray, actual: np.ndarray) -> float:
    return float(np.sqrt(np.mean((forecast - actual) ** 2)))


def draw(years: np.ndarray, values: np.ndarray, forecasts: dict[str, np.ndarray], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    axes.plot(years, values, color="0.3", linewidth=1.2, label="observed")
    for name, forecast in forecasts.items():
        axes.plot(years[-len(forecast) :], forecast, linewidth=1, label=name)
    axes.set(xlim=(years[-1] - 120, years[-1]), xlabel="year", ylabel="sunspots, mean of the year")
    axes.set_title("The next year's sunspots, forecast")
    axes.legend()
    common.save_picture(figure, to)
    plt.close(figure)


def parse(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    parser = common.usual_parser(__file__, __doc__)
    parser.add_argument("--epochs", type=common.whole(1), default=400)
    parser.add_argument("--hidden", type=common.whole(1), default=32, help="units (32)")
    parser.add_argument("--window", type=common.whole(1), default=33, help="years it sees (33)")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        import rich
        from rich.table import Table

        years, values = sunspots()
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    common.check_picture(parser, args.out)
    count = int((years < TEST_FROM).sum())
    most = int((years < VALIDATION_FROM).sum()) - SEASON
    if args.window > most:
        parser.error(
            f"--window: {args.window} years are more than the {most} there are to train on"
        )

    mean, std = values[:count].mean(), values[:count].std()
    x, y = windows((values - mean) / std, args.window)
    # The numbers of windows whose next year is before the validation years and before the test
    # years.
    training, known = (int((years < y).sum()) - args.window for y in (VALIDATION_FROM, TEST_FROM))

    def make(layer: str) -> tuple[SimpleRNN, torch.optim.Optimizer]:
        model = SimpleRNN(common.LIBRARIES[layer], args.hidden)
        return model, torch.optim.Adam(model.parameters(), lr=3e-3)

    torch.manual_seed(args.seed)
    model, optimizer = make(args.layer)

    def epoch() -> None:
        step(model, optimizer, x[:training], y[:training])

    def judge() -> float:
        return nn.functional.mse_loss(model(x[training:known]), y[training:known]).item()

    options = {name: getattr(args, name) for name in ("layer", "hidden", "window", "seed")}
    state = common.fit(parser, args, options, model, optimizer, epoch, judge)

    with torch.no_grad():
        network = model(x[known:]).double().numpy() * std + mean
    actual = values[count:]
    forecasts = {
        f"RNN, {args.layer}": network,
        f"{SEASON} years ago": values[count - SEASON : -SEASON],
        "autoregression of order 9": autoregression(values, count, 9),
    }
    table = Table("forecast", title=f"{TEST_FROM} to {years[-1]}, each one year ahead")
    table.add_column("RMSE, sunspots", justify="right")
    for name, forecast in forecasts.items():
        table.add_row(name, f"{rmse(forecast, actual):.1f}")
    rich.print(
        f"{training} training windows of {args.window} years, {known - training} for validation, "
        f"which was best after epoch {state['best_epoch']} of {state['epochs']}",
        table,
    )
    if args.both_times:
        steps = {
            layer: functools.partial(step, *make(layer), x[:training], y[:training])
            for layer in common.LIBRARIES
        }
        times = common.step_times(steps)
        rich.print(f"A training step: {common.in_words(times)}")
    draw(years, values, forecasts, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
