"""The tables and the picture of examples/forecast.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __package__:
    from . import common
    from .prices import PriceWindows
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common
    from prices import PriceWindows

NAIVE = "tomorrow = today"


@dataclass
class Results:
    """The forecasts of all folds, in order.

    series:  the name and unit of each series
    dates, closes:  [days] and [days, S], with the training days
    tests:   the test windows of each fold
    scaled:  by layer, the forecasts of each fold [windows, horizon, S]
    losses:  by layer, the training and test losses of each fold by epoch
    """

    series: list[tuple[str, str]]
    dates: np.ndarray
    closes: Tensor
    tests: list[PriceWindows]
    scaled: dict[str, list[Tensor]]
    losses: dict[str, list[tuple[list[float], list[float]]]]

    def __post_init__(self) -> None:
        self.layers = list(self.scaled)
        forecasts = {NAIVE: [test.naive() for test in self.tests]} | self.scaled
        targets = [test.targets for test in self.tests]
        # All [windows of all folds, horizon, S]: scaled errors, and errors and values in units.
        self.scaled_errors = {n: torch.cat(f) - torch.cat(targets) for n, f in forecasts.items()}
        self.points = {name: self._to_points(f) for name, f in forecasts.items()}
        actual = self._to_points(targets)
        self.errors = {name: f - actual for name, f in self.points.items()}
        self.horizon = actual.shape[1]
        # For each fold the first days of its forecasts, as indices into dates.
        first = len(self.dates) - self.horizon + 1 - len(actual)
        ends = np.cumsum([len(test) for test in self.tests]) + first
        self.folds = [slice(end - len(t), end) for t, end in zip(self.tests, ends, strict=True)]

    def _to_points(self, folds: list[Tensor]) -> Tensor:
        return torch.cat([t.to_points(f) for t, f in zip(self.tests, folds, strict=True)])

    def mean_losses(self, name: str) -> tuple[list[float], list[float]]:
        """The training and test losses by epoch, averaged over the folds."""
        train, test = np.mean(self.losses[name], axis=0).tolist()
        return train, test


def rmse(errors: Tensor) -> Tensor:
    """The RMSE of each series: [windows, horizon, S] -> [S]."""
    return errors.square().mean((0, 1)).sqrt()


def error_table(results: Results, title: str, parts: dict[str, tuple[slice, slice]]) -> Any:
    """Errors by forecast for each part: a slice of the windows and one of the days ahead."""
    from rich.table import Table

    table = Table(title=title)
    if len(parts) > 1:
        table.add_column("")
    table.add_column("forecast", no_wrap=True)
    for name, unit in results.series:
        label = f"RMSE, {unit}" if len(results.series) == 1 else f"RMSE, {name},\n{unit}"
        table.add_column(label, justify="right")
    table.add_column("MSE, scaled", justify="right")
    for part, where in parts.items():
        for i, (name, errors) in enumerate(results.errors.items()):
            row = [f"{value:.3f}" for value in rmse(errors[where])]
            scaled = results.scaled_errors[name][where].square().mean()
            label = [part if i == 0 else ""] if len(parts) > 1 else []
            table.add_row(*label, name, *row, f"{scaled:.6f}")
        table.add_section()
    return table


def report(results: Results, step_ms: dict[str, float]) -> None:
    """Prints tables of the losses, the errors and, if given, the times."""
    from rich import print
    from rich.table import Table

    mean = "" if len(results.tests) == 1 else f", mean of {len(results.tests)} folds"
    losses = Table("epoch", title=f"Loss by epoch (scaled MSE{mean})")
    for name in results.layers:
        losses.add_column(f"{name}\ntrain", justify="right")
        losses.add_column("\ntest", justify="right")
    columns = [losses_of for name in results.layers for losses_of in results.mean_losses(name)]
    for epoch, row in enumerate(zip(*columns, strict=True), 1):
        losses.add_row(str(epoch), *(f"{loss:.6f}" for loss in row))
    print(losses)

    every = slice(None)
    print(error_table(results, "Test error", {"": (every, every)}))
    if len(results.folds) > 1:
        first = results.folds[0].start
        parts = {}
        for fold in results.folds:
            origin = results.dates[fold.start].astype("datetime64[D]")
            parts[f"{origin}"] = slice(fold.start - first, fold.stop - first), every
        print(error_table(results, "Test error by fold, from its origin on", parts))
    if results.horizon > 1:
        steps = {f"{k + 1}": (every, slice(k, k + 1)) for k in range(results.horizon)}
        print(error_table(results, "Test error by days ahead", steps))

    if step_ms:
        times = Table("layer", title="Time of a training step (median)")
        times.add_column("ms", justify="right")
        times.add_column("torch / this", justify="right")
        reference, _ = step_ms
        for name, ms in step_ms.items():
            times.add_row(name, f"{ms:.2f}", f"{step_ms[reference] / ms:.2f}x")
        print(times)
    if len(results.layers) == 2:
        a, b = results.layers
        apart = (results.points[a] - results.points[b]).abs().amax((0, 1)).tolist()
        units = (unit for _, unit in results.series)
        said = ", ".join(f"{gap:.2g} {unit}" for gap, unit in zip(apart, units, strict=True))
        scaled = (results.scaled_errors[a] - results.scaled_errors[b]).abs().max().item()
        print(
            f"Largest difference between the two layers' forecasts: {said} ({scaled:.2g} scaled)."
        )
    ours = results.layers[-1]
    percent = (100 * (rmse(results.errors[ours]) / rmse(results.errors[NAIVE]) - 1)).tolist()
    ratios = [f"{abs(p):.1f} % {'above' if p > 0 else 'below'}" for p in percent]
    if len(ratios) > 1:
        names = (name for name, _ in results.series)
        ratios = [f"{r} ({name})" for r, name in zip(ratios, names, strict=True)]
    days = "day's close" if results.horizon == 1 else f"{results.horizon} days' closes"
    print(
        f"Each forecast is of the next {days}. The RMSE of {ours} is {', '.join(ratios)} "
        f"that of '{NAIVE}'; daily closes alone say next to nothing about the next one, and no "
        "model of them should be traded on."
    )


def draw(results: Results, out: Path) -> None:
    """Saves the picture: each series and its forecasts, the last 60 days of the first series, the
    losses and, for more than one day ahead, the errors by day."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import LogLocator, NullFormatter

    styles = ({"color": "#1f6fb4", "lw": 1.6}, {"color": "#e8710a", "lw": 1.6, "ls": (0, (2, 2))})
    dates, horizon = results.dates, results.horizon
    first, end = results.folds[0].start, results.folds[-1].stop
    shown = {name: results.points[name] for name in results.layers}
    below = ["last", "loss"] if horizon == 1 else ["last", "loss", "ahead"]
    rows = [[name] * len(below) for name, _ in results.series]

    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with plt.rc_context(look | {"grid.alpha": 0.25, "legend.frameon": False, "font.size": 10}):
        figure = plt.figure(figsize=(11, 3.5 + 4 * len(rows)), layout="constrained")
        axes = figure.subplot_mosaic([*rows, below], height_ratios=[1.15] * len(rows) + [1])
        names = " and ".join(name for name, _ in results.series)
        what = "the next close" if horizon == 1 else f"the closes of the next {horizon} days"
        figure.suptitle(f"{names}: {what}, forecast by {' and '.join(shown)}", fontsize=15)

        for i, (name, unit) in enumerate(results.series):
            ax = axes[name]
            ax.plot(dates, results.closes[:, i], color="0.35", lw=1.2, label="close")
            days = dates[first + horizon - 1 : end + horizon - 1]
            for style, (layer, forecast) in zip(styles, shown.items(), strict=False):
                ax.plot(days, forecast[:, -1, i], label=layer, **style)
            ax.axvspan(dates[first], dates[-1], color="0.5", alpha=0.1, lw=0, label="test")
            for fold in results.folds[1:]:
                ax.axvline(dates[fold.start], color="0.5", lw=0.8)
            ax.margins(x=0.01)
            ahead = "" if horizon == 1 else f" {horizon} days ahead"
            ax.set_title(f"{name}: daily close, and forecasts{ahead} in the test years")
            ax.legend(loc="upper left")
            ax.set(xlabel="trading day", ylabel=unit)

        last = min(60, end - first)
        since = len(dates) - last
        name, unit = results.series[0]
        ax = axes["last"]
        begin = since - (horizon > 1)  # a path starts from the close before it
        ax.plot(dates[begin:], results.closes[begin:, 0], color="0.35", lw=1.2)
        for style, forecast in zip(styles, shown.values(), strict=False):
            if horizon == 1:
                ax.plot(dates[since:], forecast[since - first :, 0, 0], **style)
            for day in range(since, end, horizon) if horizon > 1 else []:
                path = torch.cat([results.closes[day - 1, :1], forecast[day - first, :, 0]])
                ax.plot(dates[day - 1 : day + horizon], path, **style)
        ax.set_title(f"{name}: the {last} trading days to {dates[-1].astype('datetime64[D]')}")
        ax.set(xlabel="trading day", ylabel=unit)
        for ax in (*(axes[name] for name, _ in results.series), axes["last"]):
            locator = AutoDateLocator()
            ax.xaxis.set_major_locator(locator)
            ax.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))

        for style, layer in zip(styles, results.layers, strict=False):
            train, test = results.mean_losses(layer)
            epochs = range(1, len(train) + 1)
            axes["loss"].plot(epochs, train, label=f"{layer}, train", **style)
            faint = style | {"alpha": 0.45}
            axes["loss"].plot(epochs, test, label=f"{layer}, test", **faint)
        axes["loss"].set_yscale("log")
        axes["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes["loss"].yaxis.set_major_formatter("{x:g}")
        axes["loss"].yaxis.set_minor_formatter(NullFormatter())
        axes["loss"].xaxis.get_major_locator().set_params(integer=True)
        mean = "" if len(results.folds) == 1 else ", mean of the folds"
        axes["loss"].set(title=f"Loss{mean}", xlabel="epoch", ylabel="scaled MSE")
        axes["loss"].legend()

        if horizon > 1:
            ahead = range(1, horizon + 1)
            naive = results.errors[NAIVE].square().mean(0).sqrt()  # [horizon, S]
            for style, layer in zip(styles, results.layers, strict=False):
                ratio = results.errors[layer].square().mean(0).sqrt() / naive
                for i, (name, _) in enumerate(results.series):
                    marked = style | {"marker": "osD^"[i], "label": f"{layer}, {name}"}
                    axes["ahead"].plot(ahead, ratio[:, i], **marked)
            axes["ahead"].axhline(1, color="0.35", lw=1.2)
            axes["ahead"].xaxis.get_major_locator().set_params(integer=True)
            axes["ahead"].set(title=f"RMSE / RMSE of '{NAIVE}'", xlabel="days ahead")
            axes["ahead"].legend()
        common.save_picture(figure, out)
        plt.close(figure)
