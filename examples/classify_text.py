"""Classifies words by language with a bidirectional LSTM over their letters.

    y = w [h_T forwards; h_1 backwards] + b

The words are the most frequent ones of nine languages in Latin script. Batches are packed, so that
both directions begin and end at the letters of each word and never read the padding. The weights of
the epoch with the lowest validation loss are kept. The baseline is a logistic regression on n-grams
of the letters.

    python examples/classify_text.py                  # two minutes
    python examples/classify_text.py --layer torch    # the same with torch.nn.LSTM
    python examples/classify_text.py --both-times     # also times a step with either layer
"""

from __future__ import annotations

import argparse
import collections
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

if __package__:
    from . import common
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common

LANGUAGES = {
    "en": "English",
    "de": "German",
    "nl": "Dutch",
    "fr": "French",
    "es": "Spanish",
    "pt": "Portuguese",
    "it": "Italian",
    "lv": "Latvian",
    "eu": "Basque",
}
PADDING, UNKNOWN = 0, 1  # letters are numbered from 2
BATCH = 128
DECAY = 0.85  # of the learning rate per epoch


class TextClassifier(nn.Module):
    """A Linear layer on the last states of both directions of an LSTM.

    Input: letters [B, T], int64, and lengths [B] from 1 to T. Output: logits [B, classes].
    """

    def __init__(self, library: Any, letters: int, classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 64, padding_idx=PADDING)
        self.lstm = library.LSTM(64, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(2 * hidden, classes)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        x = self.dropout(self.embedding(letters))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)
        return self.out(self.dropout(torch.cat([h_n[0], h_n[1]], dim=1)))


@functools.cache
def frequencies(language: str) -> collections.Counter[str]:
    """The words of pyspellchecker's list, and how often each occurs in a corpus."""
    import spellchecker

    return spellchecker.SpellChecker(language).word_frequency.dictionary


def choose(
    lists: dict[str, collections.Counter[str]], count: int
) -> tuple[list[tuple[str, str]], int]:
    """The `count` most frequent words of each list that are in no other list.

    Only words of letters: most entries with other characters are names, or no words.

    Returns:
        Pairs of a word and the name of its list; and how many words were left out because they are
        in several lists, although they are more frequent than the last chosen word.
    """
    lists_with = collections.Counter(word for words in lists.values() for word in words)
    chosen, left_out = [], 0
    for name, words in lists.items():
        own: list[tuple[str, str]] = []
        for word in sorted(filter(str.isalpha, words), key=words.__getitem__, reverse=True):
            if len(own) == count:
                break
            if lists_with[word] == 1:
                own.append((word, name))
            else:
                left_out += 1
        chosen += own
    return chosen, left_out


class Words(NamedTuple):
    """Words as numbers: letters [N, longest], padded; lengths [N]; languages [N]."""

    letters: Tensor
    lengths: Tensor
    languages: Tensor

    def batch(self, rows: Tensor) -> Words:
        """These rows, padded to the longest of them."""
        lengths = self.lengths[rows]
        return Words(self.letters[rows, : lengths.max()], lengths, self.languages[rows])


def encode(pairs: list[tuple[str, str]], alphabet: str, languages: list[str]) -> Words:
    """Pairs of a word and its language as indices into `alphabet` and `languages`."""
    number = {letter: i for i, letter in enumerate(alphabet, UNKNOWN + 1)}
    rows = [torch.tensor([number.get(letter, UNKNOWN) for letter in word]) for word, _ in pairs]
    return Words(
        pad_sequence(rows, batch_first=True, padding_value=PADDING),
        torch.tensor([len(row) for row in rows]),
        torch.tensor([languages.index(language) for _, language in pairs]),
    )


class Data(NamedTuple):
    """The data of training and test."""

    parts: dict[str, list[tuple[str, str]]]  # "training", "validation", "test": pairs of `choose`
    words: dict[str, Words]  # the same pairs as numbers
    letters: int  # the number of indices of letters
    left_out: int  # words in several lists


def load(parser: common.Parser, count: int) -> Data:
    """The `count` words of each language. Ends the program if they leave a part empty."""
    pairs, left_out = choose({language: frequencies(language) for language in LANGUAGES}, count)
    parts = common.split(pairs, key=lambda pair: pair[0])
    for name, found in parts.items():
        if not found:
            parser.error(f"--words: {count} of each language leave none for the {name} part")
    alphabet = "".join(sorted({letter for word, _ in parts["training"] for letter in word}))
    words = {name: encode(found, alphabet, list(LANGUAGES)) for name, found in parts.items()}
    return Data(parts, words, UNKNOWN + 1 + len(alphabet), left_out)


def make(layer: str, letters: int, hidden: int) -> tuple[TextClassifier, torch.optim.Optimizer]:
    model = TextClassifier(common.LIBRARIES[layer], letters, len(LANGUAGES), hidden)
    return model, torch.optim.Adam(model.parameters(), lr=4e-3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Words) -> None:
    optimizer.zero_grad()
    logits = model(batch.letters, batch.lengths)
    nn.functional.cross_entropy(logits, batch.languages).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, words: Words, batches: Iterable[Tensor]
) -> None:
    """One epoch: a step with each batch of rows of `words`."""
    for rows in batches:
        step(model, optimizer, words.batch(rows))
    for group in optimizer.param_groups:  # saved with the optimizer
        group["lr"] *= DECAY


@torch.no_grad()
def predict(model: TextClassifier, words: Words) -> Tensor:
    """Logits [N, classes] of all words."""
    rows = torch.arange(len(words.lengths)).split(1024)
    batches = [words.batch(some) for some in rows]
    return torch.cat([model(batch.letters, batch.lengths) for batch in batches])


def loss(model: TextClassifier, words: Words) -> float:
    return nn.functional.cross_entropy(predict(model, words), words.languages).item()


def ngrams(training: list[tuple[str, str]], words: list[str]) -> list[str]:
    """The languages of `words` by logistic regression on the counts of n-grams of letters.

    n is 1 to 4, with a space before and after each word. One regression per language against the
    others, fitted by stochastic gradient descent; alpha was chosen by the validation accuracy.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        CountVectorizer(analyzer="char_wb", ngram_range=(1, 4), lowercase=False),
        SGDClassifier(loss="log_loss", alpha=1e-5, random_state=0),
    )
    texts, languages = zip(*training, strict=True)
    return model.fit(texts, languages).predict(words).tolist()


def confusion(actual: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How often each class (row) was predicted as each class (column): [classes, classes]."""
    return torch.bincount(actual * classes + predicted, minlength=classes**2).view(classes, -1)


def draw(
    table: Tensor, right: dict[str, list[bool]], lengths: list[int], languages: list[str], to: Path
) -> None:
    """Draws the confusion matrix [classes, classes], and the accuracy by length of the word.

    right: for each method, whether it was right for each word; lengths: those of the words.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, axes) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    percent = (100 * table / table.sum(1, keepdim=True).clamp(min=1)).numpy()
    left.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent):
        colour = "white" if value > 50 else "black"
        left.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    left.set_xticks(range(len(languages)), languages, rotation=45, ha="right")
    left.set_yticks(range(len(languages)), languages)
    left.set(xlabel="told", ylabel="language", title="Test words of each language, %: the LSTM")

    capped = np.clip(lengths, 3, 12)  # few are shorter or longer
    at = sorted(set(capped.tolist()))
    for name, found in right.items():
        shares = [100 * np.mean(np.array(found)[capped == length]) for length in at]
        axes.plot(at, shares, marker="o", label=name)
    axes.set_xticks(at, [{3: "≤ 3", 12: "≥ 12"}.get(length, str(length)) for length in at])
    axes.set(xlabel="letters of the word", ylabel="told right, %", title="By length")
    axes.legend()
    common.save_picture(figure, to)
    plt.close(figure)


def report(
    data: Data, state: dict[str, Any], predicted: Tensor, right: dict[str, list[bool]], out: Path
) -> None:
    """Prints the results of training (`state` is that of common.fit) and draws the picture.

    predicted: the languages that the LSTM predicted for the test words; right: as for `draw`.
    """
    import rich
    from rich.table import Table

    table = Table(
        "way", title=f"The language of {len(predicted)} test words, one of {len(LANGUAGES)}"
    )
    table.add_column("told right", justify="right")
    for name, found in right.items():
        table.add_row(name, f"{100 * np.mean(found):.1f} %")
    counts = {name: len(found) for name, found in data.parts.items()}
    rich.print(
        f"{sum(counts.values())} words, without {data.left_out} as frequent ones that are in "
        f"several lists: {counts['training']} to train on, {counts['validation']} for "
        f"validation, which was best after epoch {state['best_epoch']} of {state['epochs']}",
        table,
    )
    test = data.words["test"]
    matrix = confusion(test.languages, predicted, len(LANGUAGES))
    draw(matrix, right, test.lengths.tolist(), list(LANGUAGES.values()), out)
    rich.print(f"Picture: {out}")


def parse(
    argv: list[str] | None, file: str = __file__, doc: str = __doc__
) -> tuple[common.Parser, argparse.Namespace]:
    """The options of this example, or of the example in `file` that trains its model."""
    parser = common.usual_parser(file, doc)
    parser.add_argument("--epochs", type=common.whole(1), default=12)
    parser.add_argument("--hidden", type=common.whole(1), default=128, help="units each way (128)")
    parser.add_argument(
        "--words", type=common.whole(1), default=5000, help="of each language (5000)"
    )
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        import rich
        import sklearn  # noqa: F401  fails before the minutes of training

        data = load(parser, args.words)
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    common.check_picture(parser, args.out)
    words, parts = data.words, data.parts

    torch.manual_seed(args.seed)
    model, optimizer = make(args.layer, data.letters, args.hidden)

    def epoch() -> None:
        batches = torch.randperm(len(parts["training"])).split(BATCH)
        train(model, optimizer, words["training"], batches)

    def judge() -> float:
        return loss(model, words["validation"])

    options = {name: getattr(args, name) for name in ("layer", "hidden", "words", "seed")}
    state = common.fit(parser, args, options, model, optimizer, epoch, judge)

    test = words["test"]
    predicted = predict(model, test).argmax(1)
    baseline = ngrams(parts["training"], [word for word, _ in parts["test"]])
    right = {
        f"LSTM, {args.layer}": (predicted == test.languages).tolist(),
        "logistic regression of n-grams": [
            a == language for a, (_, language) in zip(baseline, parts["test"], strict=True)
        ],
    }
    report(data, state, predicted, right, args.out)
    if args.both_times:
        batch = words["training"].batch(torch.randperm(len(parts["training"]))[:BATCH])
        runs = {layer: make(layer, data.letters, args.hidden) for layer in common.LIBRARIES}
        times = common.step_times(
            {layer: functools.partial(step, *run, batch) for layer, run in runs.items()}
        )
        rich.print(f"A training step of {len(batch.lengths)} words: {common.in_words(times)}")


if __name__ == "__main__":
    main()
