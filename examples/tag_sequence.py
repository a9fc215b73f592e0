"""Predicts the part of speech of every word of a sentence with a bidirectional GRU.

    y_t = W [h_t forwards; h_t backwards] + b

The input is the sum of the embedding of a word and the mean of the embeddings of its characters,
which unknown words have too. Batches are packed, and the loss ignores the padding. The weights of
the epoch with the lowest validation loss are kept. The baseline is the most frequent tag of each
word.

    python examples/tag_sequence.py                  # two minutes
    python examples/tag_sequence.py --layer torch    # the same with torch.nn.GRU
    python examples/tag_sequence.py --both-times     # also times a step with either layer
"""

from __future__ import annotations

import argparse
import collections
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

if __package__:
    from . import common
else:  # run as a script, which puts this folder, not the one above it, on the path
    import common

PADDING, UNKNOWN = 0, 1  # words and characters are numbered from 2
NO_TAG = -100  # ignored by cross_entropy
BATCH = 64
DECAY = 0.8  # of the learning rate per epoch


class Sentence(NamedTuple):
    """Words, their tags ("" for punctuation marks), their pronunciations, and the recording."""

    words: list[str]
    tags: list[str]
    sounds: list[str]
    talk: str


class Batch(NamedTuple):
    """Sentences as numbers: words [B, T], characters [B, T, C], tags [B, T], and lengths [B]."""

    words: Tensor
    characters: Tensor
    tags: Tensor
    lengths: Tensor


class Tagger(nn.Module):
    """A Linear layer on the states of both directions of a GRU at every step.

    Input: words [B, T] and characters [B, T, C], int64, and lengths [B] from 1 to T. Output: logits
    [B, T, tags].
    """

    def __init__(
        self, library: Any, words: int, characters: int, tags: int, hidden: int = 96
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(words, 96, padding_idx=PADDING)
        self.characters = nn.EmbeddingBag(characters, 96, mode="mean", padding_idx=PADDING)
        self.gru = library.GRU(96, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.4)
        self.out = nn.Linear(2 * hidden, tags)

    def forward(self, words: Tensor, characters: Tensor, lengths: Tensor) -> Tensor:
        spelt = self.characters(characters.flatten(0, 1)).unflatten(0, words.shape)
        x = self.dropout(self.word(words) + spelt)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.gru(packed)
        states, _ = pad_packed_sequence(output, batch_first=True, total_length=words.size(1))
        return self.out(self.dropout(states))


@functools.cache
def corpus() -> list[Sentence]:
    """pycantonese's Hong Kong Cantonese Corpus, with tags of Universal Dependencies.

    Without sentences that have no tagged word. Files of one recording, such as FC-005a and FC-005b,
    have one name.
    """
    import pycantonese
    from pycantonese.pos_tagging.hkcancor_to_ud import hkcancor_to_ud

    chat = pycantonese.hkcancor()
    files = zip(chat.file_paths, chat.tokens(by_utterance=True, by_file=True), strict=True)
    return [
        Sentence(
            [token.word for token in tokens],
            [hkcancor_to_ud(token.pos) if token.pos else "" for token in tokens],
            [token.jyutping or token.word for token in tokens],
            re.match(r"FC-R?\d+", Path(path).name).group(),
        )
        for path, utterances in files
        for tokens in utterances
        if any(token.pos for token in tokens)
    ]


def split(sentences: list[Sentence]) -> dict[str, list[Sentence]]:
    """The sentences of "training", "validation" and "test": a recording is in only one of them."""
    return common.split(sentences, key=lambda sentence: sentence.talk)


class Numbers:
    """The indices of the words, characters and tags that a model knows.

    Words that occur once in the training data are unknown, so that the model learns to predict the
    tags of unknown words.
    """

    def __init__(self, training: list[Sentence], tags: list[str]) -> None:
        count = collections.Counter(word for sentence in training for word in sentence.words)
        several = sorted(word for word in count if count[word] > 1)
        self.words = {word: i for i, word in enumerate(several, UNKNOWN + 1)}
        characters = sorted({character for word in count for character in word})
        self.characters = {character: i for i, character in enumerate(characters, UNKNOWN + 1)}
        self.tags = {tag: i for i, tag in enumerate(tags)} | {"": NO_TAG}

    def of(self, sentence: Sentence) -> tuple[Tensor, Tensor, Tensor]:
        """Words [T], characters [T, longest word] and tags [T]."""
        spelt = [
            torch.tensor([self.characters.get(character, UNKNOWN) for character in word])
            for word in sentence.words
        ]
        return (
            torch.tensor([self.words.get(word, UNKNOWN) for word in sentence.words]),
            pad_sequence(spelt, batch_first=True, padding_value=PADDING),
            torch.tensor([self.tags[tag] for tag in sentence.tags]),
        )


def collate(sentences: list[tuple[Tensor, Tensor, Tensor]]) -> Batch:
    """The results of Numbers.of, padded to the longest sentence and the longest word."""
    words, characters, tags = zip(*sentences, strict=True)
    longest = max(spelt.size(1) for spelt in characters)
    spelt = [nn.functional.pad(some, (0, longest - some.size(1))) for some in characters]
    return Batch(
        pad_sequence(words, batch_first=True, padding_value=PADDING),
        pad_sequence(spelt, batch_first=True, padding_value=PADDING),
        pad_sequence(tags, batch_first=True, padding_value=NO_TAG),
        torch.tensor([len(some) for some in words]),
    )


def loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Mean cross-entropy of the tagged words: logits [B, T, tags], tags [B, T]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=NO_TAG)


def step(model: Tagger, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    loss(model(batch.words, batch.characters, batch.lengths), batch.tags).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def predict(model: Tagger, sentences: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [N, tags] and tags [N] of all tagged words, in order."""
    logits, tags = [], []
    for i in range(0, len(sentences), 256):
        batch = collate(sentences[i : i + 256])
        tagged = batch.tags != NO_TAG
        logits.append(model(batch.words, batch.characters, batch.lengths)[tagged])
        tags.append(batch.tags[tagged])
    return torch.cat(logits), torch.cat(tags)


def tagged_words(sentences: list[Sentence]) -> list[tuple[str, str]]:
    """Pairs of a word and its tag, for all tagged words, in order."""
    return [
        (word, tag)
        for sentence in sentences
        for word, tag in zip(sentence.words, sentence.tags, strict=True)
        if tag
    ]


def most_frequent_tags(training: list[tuple[str, str]], words: list[str]) -> list[str]:
    """The most frequent tag of each of `words` in training.

    Unknown words get the most frequent tag of the words that occur once.
    """
    tags: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for word, tag in training:
        tags[word][tag] += 1
    once = [found for found in tags.values() if found.total() == 1] or tags.values()
    guess = sum(once, collections.Counter()).most_common(1)[0][0]
    return [tags[word].most_common(1)[0][0] if word in tags else guess for word in words]


def draw(
    right: dict[str, np.ndarray],
    actual: np.ndarray,
    sentence: Sentence,
    probabilities: np.ndarray,
    tags: list[str],
    to: Path,
) -> None:
    """Draws the accuracy by tag, and the predictions for one sentence.

    right: for each method, whether it was right for each word; actual: [N], the words' tags;
    probabilities: [T, tags], those of the words of `sentence`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, axes) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    counts = np.bincount(actual, minlength=len(tags))
    shown = [int(i) for i in np.argsort(-counts) if counts[i]]
    for place, (name, found) in enumerate(right.items()):
        shares = [100 * found[actual == i].mean() for i in shown]
        left.barh(np.arange(len(shown)) + 0.4 * place, shares, 0.4, label=name)
    left.set_yticks(np.arange(len(shown)) + 0.2, [f"{tags[i]}, {counts[i]}" for i in shown])
    left.invert_yaxis()
    left.set(xlabel="told right, %", ylabel="tag, and its words in the test", title="By tag")
    figure.legend(loc="outside lower left", ncols=2)

    image = axes.imshow(probabilities.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for place, tag in enumerate(sentence.tags):
        if tag:
            axes.plot(place, tags.index(tag), "o", color="tab:orange")
    axes.set_xticks(range(len(sentence.words)), sentence.sounds, rotation=45, ha="right")
    axes.set_yticks(range(len(tags)), tags)
    axes.set_title("A sentence of the test: probabilities, and the corpus's tags as points")
    figure.colorbar(image)
    common.save_picture(figure, to)
    plt.close(figure)


def parse(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    parser = common.usual_parser(__file__, __doc__)
    parser.add_argument("--epochs", type=common.whole(1), default=10)
    parser.add_argument("--hidden", type=common.whole(1), default=96, help="units each way (96)")
    parser.add_argument("--every", type=common.whole(1), default=1, help="n-th sentence alone (1)")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        import rich
        from rich.table import Table

        sentences = corpus()
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastrnn[demo]' brings what this example needs")
    common.check_picture(parser, args.out)
    tags = sorted({tag for sentence in sentences for tag in sentence.tags if tag})
    parts = split(sentences[:: args.every])
    for name, found in parts.items():
        if not found:
            parser.error(f"--every: {args.every} leaves no sentence for the {name} part")
    numbers = Numbers(parts["training"], tags)
    data = {name: [numbers.of(sentence) for sentence in found] for name, found in parts.items()}

    def make(layer: str) -> tuple[Tagger, torch.optim.Optimizer]:
        words, characters = (UNKNOWN + 1 + len(n) for n in (numbers.words, numbers.characters))
        model = Tagger(common.LIBRARIES[layer], words, characters, len(tags), args.hidden)
        return model, torch.optim.Adam(model.parameters(), lr=3e-3)

    torch.manual_seed(args.seed)
    model, optimizer = make(args.layer)

    def some(rows: Tensor) -> Batch:
        return collate([data["training"][row] for row in rows])

    def epoch() -> None:
        for rows in torch.randperm(len(data["training"])).split(BATCH):
            step(model, optimizer, some(rows))
        for group in optimizer.param_groups:  # saved with the optimizer
            group["lr"] *= DECAY

    def judge() -> float:
        return nn.functional.cross_entropy(*predict(model, data["validation"])).item()

    options = {name: getattr(args, name) for name in ("layer", "hidden", "every", "seed")}
    state = common.fit(parser, args, options, model, optimizer, epoch, judge)

    known, test = tagged_words(parts["training"]), tagged_words(parts["test"])
    logits, actual = predict(model, data["test"])
    baseline = most_frequent_tags(known, [word for word, _ in test])
    right = {
        f"GRU, {args.layer}": (logits.argmax(1) == actual).numpy(),
        "each word's most frequent tag": np.array(
            [predicted == tag for predicted, (_, tag) in zip(baseline, test, strict=True)]
        ),
    }
    seen = {word for word, _ in known}
    unknown = np.array([word not in seen for word, _ in test])
    table = Table("way", title=f"Tags told right, one of {len(tags)}")
    table.add_column(f"{len(test)} words", justify="right")
    table.add_column(f"{unknown.sum()} unknown words", justify="right")
    for name, found in right.items():
        of_unknown = f"{100 * found[unknown].mean():.1f} %" if unknown.any() else "-"
        table.add_row(name, f"{100 * found.mean():.1f} %", of_unknown)
    rich.print(
        f"{len(parts['training'])} sentences to train on, {len(parts['validation'])} for "
        f"validation, which was best after epoch {state['best_epoch']} of {state['epochs']}, and "
        f"{len(parts['test'])} of other talks for the test",
        table,
    )
    if args.both_times:
        batch = some(torch.randperm(len(data["training"]))[:BATCH])
        runs = {layer: make(layer) for layer in common.LIBRARIES}
        times = common.step_times(
            {layer: functools.partial(step, *run, batch) for layer, run in runs.items()}
        )
        rich.print(f"A training step of {len(batch.lengths)} sentences: {common.in_words(times)}")
    # A sentence of about this length, all characters of which are in matplotlib's font.
    shown = [(not "".join(s.sounds).isascii(), abs(len(s.words) - 12)) for s in parts["test"]]
    row = shown.index(min(shown))
    with torch.no_grad():
        batch = collate([data["test"][row]])
        predicted = model(batch.words, batch.characters, batch.lengths)[0].softmax(1).numpy()
    draw(right, actual.numpy(), parts["test"][row], predicted, tags, args.out)
    rich.print(f"Picture: {args.out}")


if __name__ == "__main__":
    main()
