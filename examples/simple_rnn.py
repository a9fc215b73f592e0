"""Forecasts the number of sunspots of the next year with a vanilla recurrent network.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        y = w h_T + b

reads the years before, one at a step, and says the next from what it remembers at the last one. Of
all epochs the weights are kept that were best in the years before the test. Beside it stand two
ways without a network: the value of eleven years ago, and a linear autoregression.

    python examples/simple_rnn.py                  # seconds
    python examples/simple_rnn.py --layer torch    # the same with torch.nn.RNN
    python examples/simple_rnn.py --both-times     # and how long a step takes with either
"""

from __future__ import annotations

import argparse
import copy
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

SEASON = 11  # years of a solar cycle, about
VALIDATION_FROM, TEST_FROM = 1910, 1950


class SimpleRNN(nn.Module):
    """The last step's state of an RNN, read out by a Linear: [B, T, 1] to [B]."""

    def __init__(self, library: Any = fastrnn, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = library.RNN(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.rnn(x)
        return self.out(h_n[-1])[:, 0]


def sunspots() -> tuple[np.ndarray, np.ndarray]:
    """Years and the mean number of sunspots in each, from statsmodels: both [309]."""
    import statsmodels.datasets.sunspots

    data = statsmodels.datasets.sunspots.load_pandas().data
    return data["YEAR"].to_numpy(int), data["SUNACTIVITY"].to_numpy(float)


def windows(values: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Every `length` values in a row and the one after them: [N, length, 1] and [N]."""
    series = torch.from_numpy(values).float()
    return series.unfold(0, length, 1)[:-1, :, None], series[length:]


def step(model: SimpleRNN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def autoregression(values: np.ndarray, count: int, order: int) -> np.ndarray:
    """One-step forecasts of values[count:] by a linear autoregression fitted to values[:count]."""
    rows = np.lib.stride_tricks.sliding_window_view(values, order)[:-1]
    rows = np.column_stack([rows, np.ones(len(rows))])
    weights, *_ = np.linalg.lstsq(rows[: count - order], values[order:count], rcond=None)
    return rows[count - order :] @ weights


def rmse(forecast: np.ndarray, actual: np.ndarray) -> float:
    return float(np.sqrt(np.mean((forecast - actual) ** 2)))


def step_times(hidden: int, x: Tensor, y: Tensor) -> dict[str, float]:
    """Median milliseconds of a training step with each library's layer."""
    steps = {}
    for name, library in common.LIBRARIES.items():
        model = SimpleRNN(library, hidden)
        optimizer = torch.optim.Adam(model.parameters())
        steps[name] = functools.partial(step, model, optimizer, x, y)
    return common.step_times(steps)


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
    parser = common.Parser(prog="simple_rnn.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", choices=common.LIBRARIES, default="fastrnn")
    parser.add_argument("--epochs", type=common.whole(1), default=400)
    parser.add_argument("--hidden", type=common.whole(1), default=32, help="units (32)")
    parser.add_argument("--window", type=common.whole(1), default=33, help="years it sees (33)")
    parser.add_argument("--seed", type=common.whole(0), default=0)
    parser.add_argument("--out", type=Path, default=common.OUT / "simple_rnn.png")
    parser.add_argument("--checkpoint", type=Path, help="where to save it, and to go on from")
    parser.add_argument("--both-times", action="store_true", help="of a step with either layer")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        import rich
        from rich.console import Console
        from rich.progress import track
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
    # Windows whose next year is before the years of validation, and before those of the test.
    training, known = (int((years < y).sum()) - args.window for y in (VALIDATION_FROM, TEST_FROM))
    torch.manual_seed(args.seed)
    model = SimpleRNN(common.LIBRARIES[args.layer], args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    options = {name: getattr(args, name) for name in ("layer", "hidden", "window", "seed")}
    state: dict[str, Any] = {"epochs": 0, "best": float("inf"), "best_epoch": 0}
    saved = args.checkpoint and common.load_checkpoint(parser, args.checkpoint, options)
    if saved:
        state = saved
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    to_do = range(state["epochs"] + 1, args.epochs + 1)
    for epoch in track(to_do, description="training", console=Console(stderr=True)):
        step(model, optimizer, x[:training], y[:training])
        with torch.no_grad():
            loss = nn.functional.mse_loss(model(x[training:known]), y[training:known]).item()
        state["epochs"] = epoch
        if loss < state["best"]:
            state |= {"best": loss, "best_epoch": epoch, "kept": copy.deepcopy(model.state_dict())}
    if args.checkpoint:
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        common.save_checkpoint(args.checkpoint, state | {"options": options})
    model.load_state_dict(state["kept"])

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
        times = step_times(args.hidden, x[:training], y[:training])
        said = ", ".join(f"{name} {found:.2f} ms" for name, found in times.items())
        rich.print(f"A training step: {said}")
    draw(years, values, forecasts, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
