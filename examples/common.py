"""What the examples share: their command lines, checkpoints and pictures."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import fastrnn

LIBRARIES: dict[str, Any] = {"torch": nn, "fastrnn": fastrnn}
OUT = Path(__file__).resolve().parent / "out"


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def whole(least: int) -> Callable[[str], int]:
    """For add_argument: a whole number from `least` up."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) < 2**31):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return parse


def device(text: str) -> torch.device:
    """For add_argument: a device that is there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None


def check_picture(parser: Parser, path: Path) -> None:
    """Ends the program unless matplotlib can save a picture there. Makes the folder."""
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
    """Has `write` write beside `path`, and renames: under its own name only once it is whole."""
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


def load_checkpoint(parser: Parser, path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What save_checkpoint saved at `path`; None, and its folder made, if nothing is there.

    Ends the program if it is no checkpoint, or of a run with other options than `asked`: its
    "options".
    """
    if not path.exists():
        _make_folder(parser, "--checkpoint", path)
        return None
    try:
        state = torch.load(path, weights_only=True)
        options = dict(state["options"])
    except Exception as error:  # whatever a damaged file makes of torch.load
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        parser.error(f"--checkpoint: {path} is none: {reason}")
    other = {name: value for name, value in asked.items() if options.get(name) != value}
    for name, value in other.items():
        parser.error(f"--checkpoint: {path} has {name} {options.get(name)}, not {value}")
    return dict(state)


def step_times(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each of the steps, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(60):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 10:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}
