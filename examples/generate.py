"""Trains a byte-level language model, an LSTM, on Python's documentation, and generates text.

    h_1 ... h_T, state = LSTM(E x_1 ... E x_T, state)        logits_t = W h_t + b

predicts the probabilities of the byte after each x_t. It trains on windows of the text by truncated
backpropagation through time: the state is passed from one window to the next, the gradient is not.
The last tenth of the text is held out: the network's bits per byte on it are compared with those of
gzip and xz. Then it generates some text.

    python examples/generate.py                     # minutes
    python examples/generate.py --layer torch       # the same with torch.nn.LSTM
    python examples/generate.py --both-times        # also times a step with either layer
    python examples/generate.py --text FILE         # another text
"""

from __future__ import annotations

import argparse
import codecs
import functools
import gzip
import hashlib
import lzma
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn

if __package__:
    from . import common
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common

State = tuple[Tensor, Tensor]
LEAD = 1000  # bytes before the held-out text that the state is computed from
RATE, DECAY = 3e-3, 0.85  # the learning rate of the first epoch, and its factor per epoch
DROPOUT = 0.2


class ByteLSTM(nn.Module):
    """An Embedding, an LSTM, dropout and a Linear layer: bytes [B, T] and a state -> logits [B, T,
    256] and the next state. The default state is zeros."""

    def __init__(self, library: Any = fastrnn, hidden: int = 256, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        dropout = DROPOUT if layers > 1 else 0.0  # between layers
        self.lstm = library.LSTM(64, hidden, layers, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(DROPOUT)
        self.out = nn.Linear(hidden, 256)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        h, state = self.lstm(self.embed(x), state)
        return self.out(self.dropout(h)), state


def documentation() -> bytes:
    """The topics of Python's help(), without repeated paragraphs: some topics contain others.

    The text is that of the Python that runs this, and differs a little between versions.
    """
    from pydoc_data import topics

    paragraphs = "\n\n".join(topics.topics.values()).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(text: Tensor, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The text [N] as `batch` parallel streams, in windows of `length` bytes (the last is shorter):
    x [batch, length], and y, the byte after each. A row continues that of the window before. Up to
    `batch` bytes at the end are left out."""
    each = (len(text) - 1) // batch
    x, y = (part.view(batch, each) for part in (text[: batch * each], text[1 : batch * each + 1]))
    return zip(x.split(length, 1), y.split(length, 1), strict=True)


def step(
    model: ByteLSTM, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, state: State | None
) -> tuple[float, State]:
    """One step on a window. Returns its mean loss, and the state after it, detached."""
    optimizer.zero_grad()
    logits, (h, c) = model(x, state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), (h.detach(), c.detach())


def train_epoch(
    model: ByteLSTM, optimizer: torch.optim.Optimizer, text: Tensor, batch: int, length: int
) -> float:
    """One epoch from a state of zeros. Returns the mean loss in bits per byte."""
    model.train()
    state, total, count = None, 0.0, 0
    for x, y in windows(text, batch, length):
        loss, state = step(model, optimizer, x, y, state)
        total, count = total + loss * y.numel(), count + y.numel()
    return total / count / math.log(2)


@torch.no_grad()
def bits(model: ByteLSTM, text: Tensor, start: int, length: int = 1024) -> float:
    """Bits per byte of text[start:], start >= 1, each byte predicted from all bytes before it."""
    model.eval()
    state, losses = None, []
    for x, y in windows(text, 1, length):
        logits, state = model(x, state)
        losses.append(nn.functional.cross_entropy(logits[0], y[0], reduction="none"))
    return torch.cat(losses)[start - 1 :].double().mean().item() / math.log(2)


@torch.no_grad()
def generate(
    model: ByteLSTM, prompt: bytes, temperature: float, random: torch.Generator
) -> Iterator[int]:
    """An endless sequence of bytes after the prompt, sampled from softmax(logits / temperature).

    Each takes one call of one step: only the state carries the previous bytes.
    """
    model.eval()
    logits, state = model(to_tensor(prompt)[None])
    while True:
        chances = (logits[0, -1] / temperature).softmax(0)
        byte = torch.multinomial(chances, 1, generator=random)
        yield int(byte)
        logits, state = model(byte[None], state)


def visible(text: str) -> str:
    """The text without control characters: any byte may be sampled, also ESC."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def compressed(training: bytes, test: bytes) -> dict[str, tuple[float, str]]:
    """The bits per byte of each compressor for `test`, and what it has seen before it."""
    found = {}
    methods: dict[str, tuple[Callable[[bytes], bytes], str]] = {
        "gzip": (functools.partial(gzip.compress, compresslevel=9), "the last 32 KB before"),
        "xz": (functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME), "all before"),
    }
    for name, (method, reach) in methods.items():
        after = len(method(training + test)) - len(method(training))
        found[f"{name} after the training part"] = 8 * after / len(test), reach
        found[f"{name} alone"] = 8 * len(method(test)) / len(test), "nothing"
    return found


def both_times(args: argparse.Namespace, model: ByteLSTM, text: Tensor) -> str:
    """The times of a training step and of generation with either layer, as text."""
    steps: dict[str, Callable[[], object]] = {}
    writers: dict[str, Callable[[], object]] = {}
    x, y = next(windows(text, args.batch, args.window))
    for name, library in common.LIBRARIES.items():
        other = ByteLSTM(library, args.hidden, args.layers)
        other.load_state_dict(model.state_dict())
        random = torch.Generator().manual_seed(args.seed)
        written = generate(other, b"\n", args.temperature, random)
        writers[name] = functools.partial(lambda it: [next(it) for _ in range(100)], written)
        trained = ByteLSTM(library, args.hidden, args.layers)
        optimizer = torch.optim.Adam(trained.parameters())
        steps[name] = functools.partial(step, trained, optimizer, x, y, None)
    a_step = common.in_words(common.step_times(steps))
    speeds = {name: 100 / ms * 1000 for name, ms in common.step_times(writers).items()}
    a_second = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    return f"A training step: {a_step}\nCharacters written a second: {a_second}"


def draw(curves: dict[str, list[float]], lines: dict[str, float], to: Path) -> None:
    """Draws bits per byte by epoch: `curves`, and horizontal `lines` for the compressors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, marker="o", markersize=4, label=name)
    for i, (name, value) in enumerate(lines.items()):
        style = ["-", "--"][i % 2]
        axes.axhline(value, color=f"C{2 + i // 2}", linestyle=style, linewidth=1, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="bits a byte", title="Bits that a byte takes")
    axes.grid(alpha=0.25)
    axes.legend()
    common.save_picture(figure, to)
    plt.close(figure)


def parse(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    parser = common.usual_parser(__file__, __doc__)
    parser.add_argument("--text", type=Path, help="a file to learn (Python's documentation)")
    parser.add_argument("--epochs", type=common.whole(1), default=16)
    parser.add_argument("--hidden", type=common.whole(1), default=256, help="units (256)")
    parser.add_argument("--layers", type=common.whole(1), default=1, help="LSTMs in a stack (1)")
    parser.add_argument("--window", type=common.whole(1), default=64, help="bytes a step (64)")
    parser.add_argument("--batch", type=common.whole(1), default=16, help="streams (16)")
    parser.add_argument("--prompt", default="The ", help="what the written text starts with")
    parser.add_argument("--length", type=common.whole(0), default=400, help="bytes to write (400)")
    parser.add_argument(
        "--temperature", type=common.above_zero, default=0.7, help="of the draw (0.7)"
    )
    return parser, parser.parse_args(argv)


def read_text(parser: common.Parser, args: argparse.Namespace) -> tuple[bytes, bytes]:
    """The training and the held-out part of the text. Ends the program if it is too short."""
    if not args.prompt:
        parser.error("--prompt: it is empty, and the first byte needs one before it")
    try:
        text = args.text.read_bytes() if args.text else documentation()
    except (OSError, ImportError) as error:
        parser.error(f"--text: {error}")
    count = len(text) * 9 // 10
    least = args.batch * args.window
    if count <= least or count == len(text):
        parser.error(
            f"--text: {count} bytes to train on are fewer than the {least + 1} of a step: give a "
            "longer text, or less of --batch and --window"
        )
    return text[:count], text[count:]


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        import rich
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        common.check_picture(parser, args.out)
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    training, test = read_text(parser, args)
    digest = hashlib.sha256(training + test).hexdigest()

    torch.manual_seed(args.seed)
    model = ByteLSTM(common.LIBRARIES[args.layer], args.hidden, args.layers)
    optimizer = torch.optim.Adam(model.parameters())
    names = ("layer", "hidden", "layers", "window", "batch", "seed")
    options = {name: getattr(args, name) for name in names} | {"text": digest}
    train_bits: list[float] = []
    test_bits: list[float] = []
    saved = args.checkpoint and common.load_checkpoint(parser, args.checkpoint, options)
    if saved:
        train_bits, test_bits = saved["train_bits"], saved["test_bits"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    read, held_out = to_tensor(training), to_tensor(training[-LEAD:] + test)
    to_do = range(len(train_bits), args.epochs)
    for epoch in track(to_do, description="training", console=Console(stderr=True)):
        optimizer.param_groups[0]["lr"] = RATE * DECAY**epoch
        torch.manual_seed(args.seed + epoch)  # the same dropout masks in a resumed run
        train_bits.append(train_epoch(model, optimizer, read, args.batch, args.window))
        test_bits.append(bits(model, held_out, len(held_out) - len(test)))
        if args.checkpoint:
            state = {"train_bits": train_bits, "test_bits": test_bits, "options": options}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            common.save_checkpoint(args.checkpoint, state)

    others = compressed(training, test)
    table = Table("", title=f"The last {len(test)} bytes of the text")
    table.add_column("bits a byte", justify="right")
    table.add_column("has seen")
    ours = f"LSTM, {args.layer}, after {len(test_bits)} epochs"
    table.add_row(ours, f"{test_bits[-1]:.3f}", "the training part")
    for name, (value, reach) in others.items():
        table.add_row(name, f"{value:.3f}", reach)
    characters = len((training + test).decode(errors="replace"))
    rich.print(
        f"{len(training) + len(test)} bytes, {characters} characters, of "
        f"{'the file' if args.text else 'the documentation of this Python'}, sha256 {digest[:16]}; "
        f"{len(training)} train. {sum(p.numel() for p in model.parameters())} parameters",
        table,
        f"{args.length} bytes at temperature {args.temperature:g}:",
    )
    prompt = os.fsencode(args.prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(visible(decoder.decode(prompt)), end="")
    random = torch.Generator().manual_seed(args.seed)
    written = generate(model, prompt, args.temperature, random)
    for _, byte in zip(range(args.length), written, strict=False):
        print(visible(decoder.decode(bytes([byte]))), end="", flush=True)
    print()
    if args.both_times:
        rich.print(both_times(args, model, read))
    lines = {name: value for name, (value, _) in others.items()}
    draw({"LSTM, training": train_bits, "LSTM, held out": test_bits}, lines, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
