"""Forecasts the S&P 500's next close twice: once with torch.nn.LSTM, once with fastrnn.LSTM.

Both runs start from the same weights and the same seed, so they see the same batches and draw the
same dropout masks. What differs is the kernel: its time is printed beside what it computes.

    python examples/forecast.py              # windows of 10 days, about half a minute
    python examples/forecast.py --window 60
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastrnn

if __package__:
    from . import common
    from .prices import PriceLSTM, PriceWindows, Scaling, load_closes, split_windows
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common
    from prices import PriceLSTM, PriceWindows, Scaling, load_closes, split_windows

__all__ = ["PriceLSTM", "PriceWindows", "Scaling", "load_closes", "split_windows", "train"]

LAYERS: dict[str, type[nn.LSTM]] = {"torch.nn.LSTM": nn.LSTM, "fastrnn.LSTM": fastrnn.LSTM}
PICTURE = common.OUT / "forecast.png"


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step on x: [B, T, 1], y: [B]. Returns the batch's mean squared error, a scalar."""
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def predict(model: nn.Module, data: PriceWindows, device: torch.device) -> Tensor:
    """Scaled forecasts of all windows, without dropout: [windows], on the CPU."""
    model.eval()
    return torch.cat([model(x.to(device)).cpu() for x in data.inputs.split(1024)])


@dataclass
class Run:
    """What one training left: the model, its losses by epoch (scaled MSE) and its test forecasts
    ([windows], scaled)."""

    model: PriceLSTM
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    forecast: Tensor = field(default_factory=lambda: torch.empty(0))


def train(
    model: PriceLSTM,
    data: tuple[PriceWindows, PriceWindows],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Trains in place on data = (training windows, test windows); the seed fixes the order of the
    batches and the dropout masks. `on_epoch` gets each epoch's training loss."""
    train_set, test_set = data
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    run = Run(model)
    for _ in range(epochs):
        model.train()
        total = torch.zeros((), device=device)
        for x, y in loader:
            total += len(y) * train_step(model, optimizer, x.to(device), y.to(device))
        run.forecast = predict(model, test_set, device)
        run.train_loss.append(total.item() / len(train_set))
        run.test_loss.append(mse(run.forecast, test_set.targets))
        on_epoch(run.train_loss[-1])
    return run


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of two [windows]."""
    return (a - b).square().mean().item()


def time_steps(
    models: dict[str, PriceLSTM],
    data: PriceWindows,
    *,
    batch_size: int,
    device: torch.device,
    blocks: int,
    steps: int = 10,
) -> dict[str, float]:
    """Median time of a training step in ms, by name, over `blocks` blocks of `steps` each.

    The models take turns block by block on the same batches, so that whatever else the machine does
    falls on all of them; copies are trained, so that the models stay as they are.
    """
    copies = {name: copy.deepcopy(model).train() for name, model in models.items()}
    optimizers = {name: torch.optim.Adam(m.parameters(), lr=0.001) for name, m in copies.items()}
    starts = [i * batch_size % max(1, len(data) - batch_size + 1) for i in range(steps)]
    batches = [
        (data.inputs[i : i + batch_size].to(device), data.targets[i : i + batch_size].to(device))
        for i in starts
    ]
    times: dict[str, list[float]] = {name: [] for name in models}
    for block in range(blocks + 1):
        for name, model in copies.items():
            time.sleep(0.02)  # the other library's threads may still be spinning
            for x, y in batches:
                start = time.perf_counter()
                train_step(model, optimizers[name], x, y).item()  # .item() waits for the device
                if block:  # the first block warms up
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


# --- report --------------------------------------------------------------------------------------


def report(runs: dict[str, Run], test_set: PriceWindows, step_ms: dict[str, float]) -> None:
    """Prints the losses, the errors and the times of both runs as tables."""
    from rich import print
    from rich.table import Table

    losses = Table("epoch", title="Loss by epoch (scaled MSE)")
    for name in runs:
        losses.add_column(f"{name}\ntrain", justify="right")
        losses.add_column("\ntest", justify="right")
    columns = [loss for run in runs.values() for loss in (run.train_loss, run.test_loss)]
    for epoch, row in enumerate(zip(*columns, strict=True), 1):
        losses.add_row(str(epoch), *(f"{loss:.6f}" for loss in row))

    forecasts = {"tomorrow = today": test_set.naive()} | {n: r.forecast for n, r in runs.items()}
    actual = test_set.to_points(test_set.targets)
    rmse = {name: mse(test_set.to_points(f), actual) ** 0.5 for name, f in forecasts.items()}
    errors = Table("forecast", title="Test error")
    errors.add_column("RMSE, index points", justify="right")
    errors.add_column("MSE, scaled", justify="right")
    for name, forecast in forecasts.items():
        errors.add_row(name, f"{rmse[name]:.3f}", f"{mse(forecast, test_set.targets):.6f}")

    times = Table("layer", title="Time of a training step (median)")
    times.add_column("ms", justify="right")
    times.add_column("torch / this", justify="right")
    reference, ours = step_ms
    for name, ms in step_ms.items():
        times.add_row(name, f"{ms:.2f}", f"{step_ms[reference] / ms:.2f}x")

    a, b = (run.forecast for run in runs.values())
    apart = (test_set.to_points(a) - test_set.to_points(b)).abs().max().item()
    naive = rmse["tomorrow = today"]
    percent = 100 * (rmse[ours] / naive - 1)
    print(losses, errors, times, sep="\n")
    print(
        f"Largest difference between the two layers' forecasts: {apart:.2g} index points "
        f"({(a - b).abs().max().item():.2g} scaled)."
    )
    print(
        f"Each forecast is of the next day's close. The RMSE of {ours} is {abs(percent):.1f} % "
        f"{'above' if percent > 0 else 'below'} that of 'tomorrow = today'; daily closes alone say "
        "next to nothing about the next one, and no model of them should be traded on."
    )


def draw(
    runs: dict[str, Run], dates: np.ndarray, closes: Tensor, test_set: PriceWindows, out: Path
) -> None:
    """Saves the picture: prices [days] and forecasts, the last 60 days enlarged, and the losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import LogLocator, NullFormatter

    styles = ({"color": "#1f6fb4", "lw": 1.6}, {"color": "#e8710a", "lw": 1.6, "ls": (0, (2, 2))})
    test_dates = dates[-len(test_set) :]
    points = {name: test_set.to_points(run.forecast) for name, run in runs.items()}

    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with plt.rc_context(look | {"grid.alpha": 0.25, "legend.frameon": False, "font.size": 10}):
        figure = plt.figure(figsize=(11, 7.5), layout="constrained")
        axes = figure.subplot_mosaic([["all", "all"], ["last", "loss"]], height_ratios=[1.15, 1])
        figure.suptitle("S&P 500: the next close, forecast by two LSTMs", fontsize=15)
        last = min(60, len(test_set))
        for key, count in (("all", len(dates)), ("last", last)):
            ax = axes[key]
            ax.plot(dates[-count:], closes[-count:], color="0.35", lw=1.2, label="close")
            for style, (name, forecast) in zip(styles, points.items(), strict=True):
                ax.plot(test_dates[-count:], forecast[-count:], label=name, **style)
            locator = AutoDateLocator()
            ax.xaxis.set_major_locator(locator)
            ax.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
            ax.set(xlabel="trading day", ylabel="index points")
        axes["all"].axvspan(test_dates[0], dates[-1], color="0.5", alpha=0.1, lw=0, label="test")
        axes["all"].margins(x=0.01)
        axes["all"].set_title("Daily close, and forecasts in the test years")
        axes["all"].legend(loc="upper left")
        axes["last"].set_title(f"The {last} trading days to {dates[-1].astype('datetime64[D]')}")

        epochs = range(1, len(next(iter(runs.values())).train_loss) + 1)
        for style, (name, run) in zip(styles, runs.items(), strict=True):
            axes["loss"].plot(epochs, run.train_loss, label=f"{name}, train", **style)
            faint = style | {"alpha": 0.45}
            axes["loss"].plot(epochs, run.test_loss, label=f"{name}, test", **faint)
        axes["loss"].set_yscale("log")
        axes["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes["loss"].yaxis.set_major_formatter("{x:g}")
        axes["loss"].yaxis.set_minor_formatter(NullFormatter())
        axes["loss"].xaxis.get_major_locator().set_params(integer=True)
        axes["loss"].set(title="Loss", xlabel="epoch", ylabel="scaled MSE")
        axes["loss"].legend()
        common.save_picture(figure, out)
        plt.close(figure)


# --- command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser(prog="forecast.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=common.whole(1), help="default: 20, with --quick 2")
    parser.add_argument(
        "--window", type=common.whole(1), default=10, help="days a forecast sees (10)"
    )
    parser.add_argument(
        "--batch-size", type=common.whole(1), default=64, help="windows a step (64)"
    )
    parser.add_argument(
        "--seed", type=common.whole(0), default=0, help="weights, batches, dropout (0)"
    )
    parser.add_argument("--device", type=common.device, default="cpu", help="cpu")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="2013 to 2015 only: a smoke test")
    args = parser.parse_args(argv)
    try:
        import rich.progress

        dates, closes = load_closes()
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    if args.quick:
        years = dates.astype("datetime64[Y]").astype(int) + 1970
        kept = (years >= 2013) & (years <= 2015)
        dates, closes = dates[kept], closes[torch.from_numpy(kept)]
    # What would fail at the end fails here, before the minutes of training.
    common.check_picture(parser, args.out)
    try:
        torch.manual_seed(args.seed)
        data = split_windows(dates, closes, args.window)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(f"{error}")
    epochs = args.epochs or (2 if args.quick else 20)

    rich.print(
        f"torch {torch.__version__}, fastrnn {fastrnn.__version__}, {args.device}, "
        f"{torch.get_num_threads()} threads: {len(data[0])} training and {len(data[1])} test "
        f"windows of {args.window} days"
    )
    initial = PriceLSTM().state_dict()
    runs: dict[str, Run] = {}
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(), "{task.fields[loss]}", transient=False
    )
    with bar:
        for name, layer in LAYERS.items():
            task = bar.add_task(f"{name:14}", total=epochs, loss="")
            model = PriceLSTM(layer).to(args.device)
            model.load_state_dict(initial)
            runs[name] = train(
                model,
                data,
                epochs=epochs,
                batch_size=args.batch_size,
                seed=args.seed,
                device=args.device,
                on_epoch=lambda loss, task=task: bar.update(
                    task, advance=1, loss=f"loss {loss:.4f}"
                ),
            )
    step_ms = time_steps(
        {name: run.model for name, run in runs.items()},
        data[0],
        batch_size=args.batch_size,
        device=args.device,
        blocks=2 if args.quick else 20,
    )
    report(runs, data[1], step_ms)
    draw(runs, dates, closes, data[1], args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
