"""Predicts how English words are pronounced, with the architecture of machine translation.

A bidirectional LSTM reads the letters, and a second LSTM predicts the phonemes, one per step, with
attention over the letters (Luong's attention). It trains on the words of the CMU dictionary. The
baseline is a table of letters in context.

    python examples/translate.py --checkpoint said.pt            # half an hour, on two cores
    python examples/translate.py --checkpoint said.pt --prompt   # then pronounces words from stdin
    python examples/translate.py --limit 5000 --epochs 5         # a part of the dictionary
    python examples/translate.py --layer torch --both-times      # the same with torch.nn.LSTM
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.lr_scheduler import OneCycleLR

import fastrnn

if __package__:
    from . import common, pronunciations
    from .pronunciations import (
        END,
        LETTERS,
        Dictionary,
        Pairs,
        Phonemes,
        as_phonemes,
        letter_indices,
    )
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common
    import pronunciations
    from pronunciations import (
        END,
        LETTERS,
        Dictionary,
        Pairs,
        Phonemes,
        as_phonemes,
        letter_indices,
    )

SHOWN = ["cephalopod", "knickknack"]  # test words in the picture
PEAK = 3e-3  # learning rate
EXAMPLE = {"example": "translate"}  # in the options of its checkpoints


class Translator(nn.Module):
    """An encoder and a decoder with attention over `letters` and `phonemes` symbols.

    Symbol 0 is the padding of letters, and the END of phonemes.
    """

    def __init__(
        self,
        library: Any = fastrnn,
        hidden: int = 256,
        letters: int = len(LETTERS) + 1,
        phonemes: int = 39 + 1,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, hidden // 2, padding_idx=0)
        self.phonemes = nn.Embedding(phonemes, hidden // 2)
        options = {"num_layers": 2, "batch_first": True, "dropout": dropout}
        # Half the units in each direction: concatenated they are the decoder's initial state.
        self.encoder = library.LSTM(hidden // 2, hidden // 2, bidirectional=True, **options)
        self.decoder = library.LSTM(hidden // 2, hidden, **options)
        self.score = nn.Linear(hidden, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, phonemes)
        self.dropout = nn.Dropout(dropout)

    def encode(self, letters: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Letters [B, T] -> the encoder's outputs [B, T, H], the mask of the padding [B, 1, T], and
        the decoder's initial state, twice [2, B, H]."""
        padding = letters == 0
        lengths = (~padding).sum(1).cpu()
        x = self.dropout(self.letters(letters))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, state = self.encoder(packed)
        memory, _ = pad_packed_sequence(out, batch_first=True, total_length=letters.shape[1])
        # From [layers * directions, B, H / 2] to [layers, B, H].
        h, c = (torch.cat([s[0::2], s[1::2]], 2) for s in state)
        return memory, padding[:, None], (h, c)

    def decode(
        self,
        phonemes: Tensor,
        memory: Tensor,
        padding: Tensor,
        state: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Phonemes [B, S] -> logits of the phoneme after each [B, S, phonemes], the attention
        weights of the letters [B, S, T], and the state."""
        s, state = self.decoder(self.dropout(self.phonemes(phonemes)), state)
        scores = self.score(s) @ memory.transpose(1, 2)
        weights = scores.masked_fill(padding, -torch.inf).softmax(2)
        attended = torch.cat([weights @ memory, s], 2)
        return self.out(self.dropout(self.combine(attended).tanh())), weights, state

    def forward(self, letters: Tensor, phonemes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and weights, as decode returns them, for all steps at once: teacher forcing."""
        logits, weights, _ = self.decode(phonemes, *self.encode(letters))
        return logits, weights


@torch.no_grad()
def beam_search(model: Translator, letters: Tensor, beam: int, most: int) -> tuple[Tensor, Tensor]:
    """The `beam` best pronunciations of each word by beam search, the best first.

    Args:
        letters: [B, T], padded with 0.
        beam: 1 is greedy search.
        most: the maximum number of phonemes.

    Returns:
        The phonemes [B, beam, S], with END after the last; and the log-probabilities [B, beam],
        -inf where there are fewer pronunciations.
    """
    B, device = len(letters), letters.device
    memory, padding, state = model.encode(letters)
    memory, padding = (x.repeat_interleave(beam, 0) for x in (memory, padding))
    state = tuple(s.repeat_interleave(beam, 1) for s in state)
    found = torch.empty(B, beam, 0, dtype=torch.long, device=device)
    total = torch.full((B, beam), -torch.inf, device=device)
    total[:, 0] = 0  # at first all beams are the same
    last = torch.full((B * beam, 1), END, device=device)
    ended = torch.zeros(B, beam, dtype=torch.bool, device=device)
    first = torch.arange(B, device=device)[:, None] * beam
    for _ in range(most):
        logits, _, state = model.decode(last, memory, padding, state)
        follows = logits[:, 0].log_softmax(1).view(B, beam, -1)
        # After END only END follows, with probability 1.
        over = torch.full_like(follows[0, 0], -torch.inf)
        over[END] = 0
        follows = torch.where(ended[..., None], over, follows)
        total, best = (total[..., None] + follows).flatten(1).topk(beam)
        from_, phoneme = best // follows.shape[2], best % follows.shape[2]
        found = torch.cat([found.take_along_dim(from_[..., None], 1), phoneme[..., None]], 2)
        ended = phoneme == END
        if ended.all():
            break
        rows = (first + from_).flatten()
        state = tuple(s[:, rows] for s in state)
        last = phoneme.view(-1, 1)
    return found, total


@dataclass
class Run:
    """The state of a training run, the names of the phonemes, and the options."""

    model: Translator
    optimizer: torch.optim.Optimizer
    schedule: OneCycleLR
    names: list[str]
    options: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)  # by epoch

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"options": self.options, "names": self.names, "history": self.history}

    def go_on(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def step(
    model: Translator, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor]
) -> float:
    letters, given, to_say = batch
    optimizer.zero_grad()
    logits, _ = model(letters, given)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), to_say.flatten(), label_smoothing=0.05)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def most_phonemes(word: str) -> int:
    """The maximum length of a search: above the longest pronunciation of the dictionary."""
    return 2 * len(word) + 10


def say(model: Translator, names: list[str], words: Dictionary, beam: int) -> list[Phonemes]:
    """The best pronunciation of each word, in the order of `words`."""
    said: dict[str, Phonemes] = {}
    by_length = sorted(words, key=len)
    for start in range(0, len(by_length), 512):
        some = by_length[start : start + 512]
        found, _ = beam_search(model, letter_indices(some), beam, most_phonemes(some[-1]))
        said.update(zip(some, as_phonemes(found[:, 0], names), strict=True))
    return [said[word] for word in words]


def rates(model: Translator, names: list[str], words: Dictionary, beam: int) -> tuple[float, float]:
    return pronunciations.error_rates(say(model, names, words, beam), words.values())


def answer(model: Translator, names: list[str], beam: int, lines: Iterable[str]) -> Iterator[str]:
    """For each word of the lines a line with its three likeliest pronunciations."""
    for word in (word for line in lines for word in line.split()):
        spelt = word.lower().replace("\u2019", "'")
        if set(spelt) - set(LETTERS):
            yield f"{word}: not a word of the letters a to z and the apostrophe"
            continue
        found, total = beam_search(model, letter_indices([spelt]), beam, most_phonemes(spelt))
        ways = [" ".join(way) for way in as_phonemes(found[0, :3], names)]
        chances = total[0, :3].exp().tolist()
        yield f"{word}: " + ", ".join(f"{w} ({p:.0%})" for w, p in zip(ways, chances, strict=True))


def attention(
    model: Translator, names: list[str], word: str, beam: int
) -> tuple[Phonemes, np.ndarray]:
    """The pronunciation of a word, and the attention weights [phonemes, letters]."""
    letters = letter_indices([word])
    found, _ = beam_search(model, letters, beam, most_phonemes(word))
    said = as_phonemes(found[:, 0], names)[0]
    given = nn.functional.pad(found[:, 0, : len(said)], (1, 0), value=END)
    with torch.no_grad():
        _, weights = model(letters, given[:, : len(said)])
    return said, weights[0].numpy()


def draw(
    history: list[dict[str, float]], seen: dict[str, tuple[Phonemes, np.ndarray]], to: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(seen), figsize=(13, 4.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    for name, label in [("wer", "words wrong"), ("per", "phonemes wrong")]:
        axes[0].plot(epochs, [row[name] for row in history], marker=".", label=label)
    axes[0].set(xlabel="epoch", ylabel="%, validation words, greedy", ylim=(0, None))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title("Learning")
    axes[0].legend()
    for plot, (word, (said, weights)) in zip(axes[1:], seen.items(), strict=True):
        plot.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        plot.set_xticks(range(len(word)), list(word))
        plot.set_yticks(range(len(said)), list(said))
        plot.set_title(f"Attention at each phoneme of {word}")
    common.save_picture(figure, to)
    plt.close(figure)


def parse(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    parser = common.usual_parser(__file__, __doc__)
    add = parser.add_argument
    add("--epochs", type=common.whole(1), default=12, help="the learning rate falls over them (12)")
    add(
        "--minutes",
        type=common.above_zero,
        help="begin no epoch that would end later, but train one",
    )
    add("--hidden", type=common.whole(2), default=256, help="units, an even number (256)")
    add("--batch", type=common.whole(1), default=128, help="pronunciations of a step (128)")
    add("--beam", type=common.whole(1), default=5, help="width of the search (5)")
    add("--limit", type=common.whole(1), help="words of the dictionary (all)")
    add("--prompt", action="store_true", help="say words from stdin, with that checkpoint, instead")
    return parser, parser.parse_args(argv)


def prompt(parser: common.Parser, args: argparse.Namespace) -> None:
    """Prints the pronunciations of the words on stdin, with the model of the checkpoint."""
    saved = args.checkpoint and common.load_checkpoint(parser, args.checkpoint, EXAMPLE)
    if not saved:
        parser.error("--prompt: needs the --checkpoint of an earlier run")
    model = Translator(common.LIBRARIES[args.layer], saved["options"]["hidden"])
    model.load_state_dict(saved["model"])
    model.eval()
    if sys.stdin.isatty():
        print("Words, one or more in a line; Ctrl-D ends.", file=sys.stderr)
    said = None
    try:
        for said in answer(model, saved["names"], args.beam, sys.stdin):
            print(said, flush=True)
    except UnicodeDecodeError as error:
        parser.error(f"--prompt: stdin is no text: {error}")
    if said is None:
        parser.error("--prompt: there was no word on stdin")


def train(args: argparse.Namespace, data: Pairs, parts: dict[str, Dictionary], run: Run) -> None:
    """Trains for the remaining epochs or minutes, and saves a checkpoint after each epoch."""
    from rich.console import Console
    from rich.progress import Progress

    spent = longest = 0.0
    with Progress(console=Console(stderr=True)) as progress:
        steps = -(-len(data) // args.batch)
        task = progress.add_task("training", total=steps * args.epochs)
        for epoch in range(len(run.history) + 1, args.epochs + 1):
            if args.minutes and spent + longest > args.minutes:
                break
            start = time.perf_counter()
            progress.update(task, completed=steps * (epoch - 1))
            # The seed and the epoch determine the order of the words and the dropout masks, so that
            # a resumed run gives the same results.
            torch.manual_seed(args.seed + epoch)
            run.model.train()
            losses = []
            for rows in data.batches(args.batch):
                losses.append(step(run.model, run.optimizer, data.batch(rows)))
                run.schedule.step()
                progress.advance(task)
            run.model.eval()
            per, wer = rates(run.model, run.names, parts["validation"], 1)
            progress.update(task, description=f"{wer:.1f} % of words wrong")
            took = (time.perf_counter() - start) / 60
            spent, longest = spent + took, max(longest, took)
            loss = statistics.mean(losses)
            run.history.append({"loss": loss, "per": per, "wer": wer, "minutes": took})
            if args.checkpoint:
                common.save_checkpoint(args.checkpoint, run.state())


def report(args: argparse.Namespace, parts: dict[str, Dictionary], run: Run) -> None:
    """Prints the results by epoch, and the error rates of the test words."""
    import rich
    from rich.table import Table

    table = Table("epoch", title="Training, and the validation words by greedy search")
    for name in ("loss", "PER, %", "WER, %", "minutes in all"):
        table.add_column(name, justify="right")
    total = 0.0
    for epoch, row in enumerate(run.history, 1):
        total += row["minutes"]
        cells = f"{row['loss']:.3f}", f"{row['per']:.2f}", f"{row['wer']:.2f}", f"{total:.1f}"
        table.add_row(str(epoch), *cells)
    rich.print(table)

    test = parts["test"]
    by_letter = pronunciations.LetterByLetter(parts["training"])
    found: dict[str, tuple[float | None, float]] = {}
    for search, beam in {"greedy": 1, f"a beam of {args.beam}": args.beam}.items():
        found[f"this network, {args.layer}, {search}"] = rates(run.model, run.names, test, beam)
    said = map(by_letter, test)
    found["letter by letter, in context"] = pronunciations.error_rates(said, test.values())
    table = Table("of the test words", title="Error rates; the published ones have other splits")
    for name in ("PER, %", "WER, %"):
        table.add_column(name, justify="right")
    for name, (per, wer) in (found | pronunciations.PUBLISHED).items():
        table.add_row(name, "" if per is None else f"{per:.2f}", f"{wer:.2f}")
    rich.print(table)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    if args.prompt:
        prompt(parser, args)
        return
    if args.hidden % 2:
        parser.error(f"--hidden: {args.hidden} is odd; each direction of the encoder has half")
    try:
        import rich

        names = pronunciations.phoneme_names()
        parts = pronunciations.split(pronunciations.dictionary(), args.limit)
        common.check_picture(parser, args.out)
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    if not all(parts.values()):
        parser.error(f"--limit: {args.limit} words are too few to train, validate and test on")

    data = Pairs(parts["training"], names)
    torch.manual_seed(args.seed)
    model = Translator(common.LIBRARIES[args.layer], args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps = -(-len(data) // args.batch) * args.epochs
    schedule = OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.1)
    saved_options = ("layer", "epochs", "hidden", "batch", "limit", "seed")
    options = EXAMPLE | {name: getattr(args, name) for name in saved_options}
    run = Run(model, optimizer, schedule, names, options)
    saved = args.checkpoint and common.load_checkpoint(parser, args.checkpoint, options)
    if saved:
        run.go_on(saved)
    counted = ", ".join(f"{len(words)} {name}" for name, words in parts.items())
    rich.print(f"Words: {counted}; {len(data)} pronunciations to train on")
    train(args, data, parts, run)
    model.eval()
    report(args, parts, run)
    if args.both_times:
        batch = data.batch(data.batches(args.batch)[0])

        def run_with(library: Any) -> Callable[[], object]:
            other = Translator(library, args.hidden)
            return functools.partial(
                step, other, torch.optim.Adam(other.parameters(), fused=True), batch
            )

        steps = {name: run_with(library) for name, library in common.LIBRARIES.items()}
        times = common.step_times(steps, turns=30)
        rich.print(f"A training step: {common.in_words(times)}")
    draw(run.history, {word: attention(model, names, word, args.beam) for word in SHOWN}, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
