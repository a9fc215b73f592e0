"""Shared by the examples: command lines, checkpoints, pictures and the training loop."""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

import fastrnn

LIBRARIES: dict[str, Any] = {"torch": nn, "fastrnn": fastrnn}
OUT = Path(__file__).resolve().parent / "out"
Item = TypeVar("Item")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def whole(least: int) -> Callable[[str], int]:
    """For add_argument: a whole number, at least `least`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) < 2**31):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return parse


def above_zero(text: str) -> float:
    """For add_argument: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def usual_parser(file: str, doc: str) -> Parser:
    """A parser for the example in `file` with the options that most examples have."""
    path = Path(file)
    parser = Parser(prog=path.name, description=doc.partition("\n")[0])
    parser.add_argument("--layer", choices=LIBRARIES, default="fastrnn")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, default=OUT / f"{path.stem}.png", help="the picture")
    parser.add_argument("--checkpoint", type=Path, help="where to save it, and to go on from")
    parser.add_argument("--both-times", action="store_true", help="of a step with either layer")
    return parser


def device(text: str) -> torch.device:
    """For add_argument: a device that exists."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None


def check_picture(parser: Parser, path: Path) -> None:
    """Ends the program unless matplotlib can save a picture at `path`. Creates the folder."""
    import matplotlib.figure

    kinds = matplotlib.figure.FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in kinds or path.is_dir():
        parser.error(f"--out: {path} is no name for a picture such as picture.png")
    _make_folder(parser, "--out", path)


def _make_folder(parser: Parser, option: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{option}: {error}")


def _whole_or_not(path: Path, write: Callable[[Path], None]) -> None:
    """Replaces `path` atomically: `write` writes another file, which is then renamed."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_picture(figure: Any, path: Path) -> None:
    _whole_or_not(path, lambda part: figure.savefig(part, dpi=130))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors, numbers and dictionaries of them."""
    _whole_or_not(path, lambda part: torch.save(state, part))


def load_checkpoint(parser: Parser, path: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """What save_checkpoint saved at `path`. Without a file: None, and the folder is created.

    Ends the program if the file is no checkpoint, or if its "options" differ from `options`.
    """
    if not path.exists():
        _make_folder(parser, "--checkpoint", path)
        return None
    try:
        state = torch.load(path, weights_only=True)
        found = dict(state["options"])
    except Exception as error:  # a damaged file raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        parser.error(f"--checkpoint: {path} is none: {reason}")
    other = {name: value for name, value in options.items() if found.get(name) != value}
    for name, value in other.items():
        parser.error(f"--checkpoint: {path} has {name} {found.get(name)}, not {value}")
    return dict(state)


def split(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """The items of "training", "validation" and "test", in order.

    The hash of an item's key decides: one in ten is for validation, one in ten for the test. So the
    part of an item does not depend on other items, and items with the same key are in one part.
    """
    parts: dict[str, list[Item]] = {"training": [], "validation": [], "test": []}
    names = ["test", "validation", *["training"] * 8]
    for item in items:
        parts[names[zlib.crc32(key(item).encode()) % 10]].append(item)
    return parts


def fit(
    parser: Parser,
    args: argparse.Namespace,
    options: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: Callable[[], None],
    judge: Callable[[], float],
    rank: int = 0,
) -> dict[str, Any]:
    """Trains up to args.epochs. Resumes from args.checkpoint, which is saved after every epoch.

    The model ends in evaluation mode with the weights of the lowest `judge`, the validation loss.
    `epoch` draws random numbers from torch's default generator, whose state is saved too: a resumed
    run gives the same bits. Of several processes that train together, only rank 0 saves and shows
    its progress; all resume from its checkpoint.

    Returns:
        "epochs" trained, the "best" loss, its "best_epoch", and the rest of the checkpoint.
    """
    from rich.console import Console
    from rich.progress import track

    state = {"epochs": 0, "best": float("inf"), "best_epoch": 0}
    state["kept"] = copy.deepcopy(model.state_dict())
    saved = args.checkpoint and load_checkpoint(parser, args.checkpoint, options)
    if saved:
        try:
            state = {name: saved[name] for name in state}
            model.load_state_dict(saved["kept"])
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
        except Exception as error:  # another program's checkpoint raises anything
            reason = " ".join(str(error).split())[:100]
            parser.error(f"--checkpoint: {args.checkpoint} is of another model: {reason}")
    to_do = range(state["epochs"] + 1, args.epochs + 1)
    console = Console(stderr=True, quiet=rank > 0)
    for number in track(to_do, description="training", console=console):
        model.train()
        epoch()
        model.eval()
        with torch.no_grad():
            loss = judge()
        state["epochs"] = number
        if loss < state["best"]:
            kept = copy.deepcopy(model.state_dict())
            state |= {"best": loss, "best_epoch": number, "kept": kept}
        if args.checkpoint and rank == 0:
            now = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            now |= {"random": torch.get_rng_state(), "options": options}
            save_checkpoint(args.checkpoint, state | now)
    model.load_state_dict(state["kept"])
    model.eval()
    return state


def step_times(steps: dict[str, Callable[[], object]], turns: int = 60) -> dict[str, float]:
    """Median milliseconds of each step. They alternate; the first ten turns are the warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 10:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def in_words(times: dict[str, float]) -> str:
    """The result of step_times as text."""
    return ", ".join(f"{name} {found:.2f} ms" for name, found in times.items())
