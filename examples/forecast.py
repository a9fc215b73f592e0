"""Forecasts the S&P 500's next close twice: once with torch.nn.LSTM, once with fastrnn.LSTM.

Both runs start from the same weights and the same seed, so that they have the same batches and
dropout masks. Only the kernels differ: their times and the differences between the forecasts are
printed.

    python examples/forecast.py              # windows of 10 days, about half a minute
    python examples/forecast.py --window 60
    python examples/forecast.py --cell gru --horizon 5 --series sp500 nasdaq --folds 4

The last line trains GRUs that forecast the next five closes of two indices. It trains four times,
on all days before an origin that moves by a quarter of the test years.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastrnn

if __package__:
    from . import common
    from .forecast_report import Results, draw, report
    from .prices import SERIES, PriceNetwork, PriceWindows, load_closes, split_windows
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common
    from forecast_report import Results, draw, report
    from prices import SERIES, PriceNetwork, PriceWindows, load_closes, split_windows

PICTURE = common.OUT / "forecast.png"


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step on x: [B, T, S], y: [B, horizon, S]. Returns the batch's mean squared error."""
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def predict(model: nn.Module, data: PriceWindows, device: torch.device) -> Tensor:
    """Scaled forecasts of all windows, without dropout: [windows, horizon, S], on the CPU."""
    model.eval()
    return torch.cat([model(x.to(device)).cpu() for x in data.inputs.split(1024)])


@dataclass
class Run:
    """The result of a training: the model, its losses by epoch (scaled MSE), its test forecasts
    ([windows, horizon, S], scaled), and the state to resume from."""

    model: PriceNetwork
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    forecast: Tensor = field(default_factory=lambda: torch.empty(0))
    state: dict[str, Any] = field(default_factory=dict)


def train(
    model: PriceNetwork,
    data: tuple[PriceWindows, PriceWindows],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[float], None] = lambda loss: None,
    saved: dict[str, Any] | None = None,
) -> Run:
    """Trains the model in place on data = (training windows, test windows). The seed determines the
    order of the batches and the dropout masks. `on_epoch` gets each epoch's training loss. `saved`
    is the state of a run of fewer epochs to resume from."""
    train_set, test_set = data
    torch.manual_seed(seed)
    dropout: Any = torch.cuda if device.type == "cuda" else torch
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    run = Run(model)
    if saved:
        run = Run(model, saved["train_loss"], saved["test_loss"], saved["forecast"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        dropout.set_rng_state(saved["dropout"])
        order.set_state(saved["order"])
    for _ in range(len(run.train_loss), epochs):
        model.train()
        total = torch.zeros((), device=device)
        for x, y in loader:
            total += len(y) * train_step(model, optimizer, x.to(device), y.to(device))
        run.forecast = predict(model, test_set, device)
        run.train_loss.append(total.item() / len(train_set))
        run.test_loss.append(nn.functional.mse_loss(run.forecast, test_set.targets).item())
        on_epoch(run.train_loss[-1])
    run.state = {name: getattr(run, name) for name in ("train_loss", "test_loss", "forecast")}
    run.state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    run.state |= {"dropout": dropout.get_rng_state(), "order": order.get_state()}
    return run


def time_steps(
    models: dict[str, PriceNetwork],
    data: PriceWindows,
    *,
    batch_size: int,
    device: torch.device,
    blocks: int,
    steps: int = 10,
) -> dict[str, float]:
    """Median milliseconds of a training step, by name, over `blocks` blocks of `steps` each.

    The blocks of the models alternate, with the same batches, so that other load on the machine
    slows down all of them. Copies are trained: the models are not changed.
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


# --- command line --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    parser = common.Parser(prog="forecast.py", description=__doc__.partition("\n")[0])
    whole = common.whole
    parser.add_argument("--layer", choices=[*common.LIBRARIES, "both"], default="both")
    parser.add_argument("--cell", choices=["lstm", "gru", "rnn"], default="lstm")
    parser.add_argument("--epochs", type=whole(1), help="default: 20, with --quick 2")
    parser.add_argument("--window", type=whole(1), default=10, help="days a forecast sees (10)")
    parser.add_argument("--horizon", type=whole(1), default=1, help="days it says at once (1)")
    parser.add_argument(
        "--series", nargs="+", choices=SERIES, default=["sp500"], help="what it sees and says"
    )
    parser.add_argument("--folds", type=whole(1), default=1, help="origins to train up to (1)")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="windows a step (64)")
    parser.add_argument("--seed", type=whole(0), default=0, help="weights, batches, dropout (0)")
    parser.add_argument("--device", type=common.device, default="cpu", help="cpu")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="where to save it, and to go on from")
    parser.add_argument(
        "--both-times", action="store_true", help="of a step with either layer; --layer both has it"
    )
    parser.add_argument("--quick", action="store_true", help="2013 to 2015 only: a smoke test")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    args.series = list(dict.fromkeys(args.series))
    try:
        import rich.progress

        dates, closes = load_closes(args.series)
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    if args.quick:
        years = dates.astype("datetime64[Y]").astype(int) + 1970
        kept = (years >= 2013) & (years <= 2015)
        dates, closes = dates[kept], closes[torch.from_numpy(kept)]
    # Fails here instead of after the minutes of training.
    common.check_picture(parser, args.out)
    try:
        torch.manual_seed(args.seed)
        data = split_windows(dates, closes, args.window, horizon=args.horizon, folds=args.folds)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(f"{error}")
    epochs = args.epochs or (2 if args.quick else 20)
    names = ("layer", "cell", "window", "horizon", "series", "folds", "batch_size", "seed", "quick")
    options = {name: getattr(args, name) for name in names}
    states: dict[str, dict[str, Any]] = {}
    saved = args.checkpoint and common.load_checkpoint(parser, args.checkpoint, options)
    if saved:
        states = saved["runs"]
        most = max(len(state["train_loss"]) for state in states.values())
        if most > epochs:
            parser.error(f"--checkpoint: {args.checkpoint} has {most} epochs, more than {epochs}")

    ahead = "" if args.horizon == 1 else f", {args.horizon} days ahead"
    folds = "" if args.folds == 1 else f" in the first of {args.folds} folds"
    rich.print(
        f"torch {torch.__version__}, fastrnn {fastrnn.__version__}, {args.device}, "
        f"{torch.get_num_threads()} threads: {len(data[0][0])} training and {len(data[0][1])} test "
        f"windows of {args.window} days{ahead}{folds}"
    )
    cell = args.cell.upper()
    layers = {f"torch.nn.{cell}": getattr(nn, cell), f"fastrnn.{cell}": getattr(fastrnn, cell)}
    chosen = [name for name in layers if args.layer == "both" or name.startswith(args.layer)]
    sizes = len(args.series), args.horizon
    initial = PriceNetwork(layers[chosen[0]], *sizes).state_dict()

    def network(name: str) -> PriceNetwork:
        model = PriceNetwork(layers[name], *sizes).to(args.device)
        model.load_state_dict(initial)
        return model

    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(), "{task.fields[loss]}", transient=False
    )
    with bar:
        for name in chosen:
            task = bar.add_task(f"{name:14}", total=epochs * len(data), loss="")
            for fold, sets in enumerate(data, 1):
                key = f"{name} {fold}"
                bar.advance(task, len(states[key]["train_loss"]) if key in states else 0)
                run = train(
                    network(name),
                    sets,
                    epochs=epochs,
                    batch_size=args.batch_size,
                    seed=args.seed,
                    device=args.device,
                    on_epoch=lambda loss, task=task: bar.update(
                        task, advance=1, loss=f"loss {loss:.4f}"
                    ),
                    saved=states.get(key),
                )
                runs[name].append(run)
                states[key] = run.state
                if args.checkpoint:
                    common.save_checkpoint(args.checkpoint, {"runs": states, "options": options})
    step_ms: dict[str, float] = {}
    if args.both_times or args.layer == "both":
        step_ms = time_steps(
            {name: runs[name][0].model if name in runs else network(name) for name in layers},
            data[0][0],
            batch_size=args.batch_size,
            device=args.device,
            blocks=2 if args.quick else 20,
        )
    results = Results(
        [SERIES[name][1:] for name in args.series],
        dates,
        closes,
        [test for _, test in data],
        {name: [run.forecast for run in found] for name, found in runs.items()},
        {name: [(run.train_loss, run.test_loss) for run in found] for name, found in runs.items()},
    )
    report(results, step_ms)
    draw(results, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
