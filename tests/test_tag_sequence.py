"""examples/tag_sequence.py: corpus, model, loss and baseline."""

import functools

import numpy as np
import pytest
import torch
from helpers import one_line_error
from torch import nn

import fastrnn

pytest.importorskip("pycantonese", reason="the corpus comes with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the plot needs the extra 'demo'")
pytest.importorskip("rich", reason="the table needs the extra 'demo'")

from examples import common, tag_sequence
from examples.tag_sequence import NO_TAG, Sentence

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]


def sentence(text, tags, talk="talk"):
    words = text.split()
    return Sentence(words, ["" if tag == "." else tag for tag in tags.split()], words, talk)


def test_corpus():
    sentences = tag_sequence.corpus()
    assert len(sentences) > 10_000
    first = sentences[0]
    assert first.words == ["喂", "遲", "啲", "去", "唔", "去", "旅行", "啊", "?"]
    assert first.tags == ["INTJ", "ADJ", "PART", "VERB", "ADV", "VERB", "NOUN", "PART", ""]
    assert first.sounds[:2] == ["wai3", "ci4"]
    assert first.sounds[-1] == "?"
    for found in sentences:
        assert len(found.words) == len(found.tags) == len(found.sounds)
        assert any(found.tags)
    untagged = {w for s in sentences for w, t in zip(s.words, s.tags, strict=True) if not t}
    assert not any(character.isalnum() for word in untagged for character in word)


def test_split_keeps_talks_together():
    sentences = tag_sequence.corpus()
    parts = tag_sequence.split(sentences)
    talks = {name: {found.talk for found in part} for name, part in parts.items()}
    assert sum(map(len, talks.values())) == len({found.talk for found in sentences})
    assert "FC-005" in talks["training"]  # one talk in two files, a and b
    assert talks["validation"] == {"FC-056", "FC-107"}  # in every run, on every machine
    for name, part in tag_sequence.split(sentences[::40]).items():
        assert {found.talk for found in part} <= talks[name]


def numbers():
    training = [sentence("ab ab c !", "X Y X ."), sentence("c a", "X Y")]
    return tag_sequence.Numbers(training, ["X", "Y"])


def test_word_indices():
    found = numbers()
    assert found.words == {"ab": 2, "c": 3}  # words that occur twice
    assert found.characters == {"!": 2, "a": 3, "b": 4, "c": 5}
    words, characters, tags = found.of(sentence("c abz !", "X Y ."))
    assert words.tolist() == [3, 1, 1]
    assert characters.tolist() == [[5, 0, 0], [3, 4, 1], [2, 0, 0]]
    assert tags.tolist() == [0, 1, NO_TAG]


def test_batch_is_padded():
    found = numbers()
    batch = tag_sequence.collate([found.of(sentence("c", "X")), found.of(sentence("ab c", "Y X"))])
    assert batch.words.tolist() == [[3, 0], [2, 3]]
    assert batch.characters.tolist() == [[[5, 0], [0, 0]], [[3, 4], [5, 0]]]
    assert batch.tags.tolist() == [[0, NO_TAG], [1, 0]]
    assert batch.lengths.tolist() == [1, 2]


def tagger(library, **options):
    return tag_sequence.Tagger(library, words=20, characters=30, tags=5, **options)


def batch(*lengths):
    T = max(lengths)
    words, tags = torch.zeros(len(lengths), T, dtype=torch.int64), torch.full((4, T), NO_TAG)
    characters = torch.zeros(len(lengths), T, 3, dtype=torch.int64)
    for row, length in enumerate(lengths):
        words[row, :length] = torch.randint(1, 20, (length,))
        characters[row, :length] = torch.randint(1, 30, (length, 3))
        tags[row, :length] = torch.randint(5, (length,))
    return tag_sequence.Batch(words, characters, tags[: len(lengths)], torch.tensor(lengths))


def test_both_layers_give_the_same_logits_and_gradients():
    ours, theirs = (tagger(library, hidden=17).eval() for library in (fastrnn, nn))
    assert isinstance(ours.gru, fastrnn.GRU)
    ours.load_state_dict(theirs.state_dict())
    sample = batch(1, 17, 5, 33)
    logits = [model(sample.words, sample.characters, sample.lengths) for model in (ours, theirs)]
    torch.testing.assert_close(*logits)
    for found in logits:
        tag_sequence.loss(found, sample.tags).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("library", common.LIBRARIES)
def test_padding_has_no_effect(library):
    """Neither on the logits, nor on the loss or its gradient."""
    model = tagger(common.LIBRARIES[library], hidden=8).eval()
    sample = batch(2, 9, 1, 4)
    pad = nn.functional.pad
    wider = tag_sequence.Batch(
        pad(sample.words, (0, 5), value=7),  # any value
        pad(pad(sample.characters, (0, 2)), (0, 0, 0, 5), value=7),  # words are padded too
        pad(sample.tags, (0, 5), value=NO_TAG),
        sample.lengths,
    )
    losses, gradients = [], []
    for found in (sample, wider):
        logits = model(found.words, found.characters, found.lengths)
        losses.append(tag_sequence.loss(logits, found.tags))
        gradients.append(torch.autograd.grad(losses[-1], [*model.gru.parameters()]))
        assert logits.shape == (4, found.words.size(1), 5)
    assert torch.equal(logits[:, :9], model(sample.words, sample.characters, sample.lengths))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)

    one_by_one = []
    for row, length in enumerate(sample.lengths):
        only = slice(row, row + 1), slice(length)
        alone = model(sample.words[only], sample.characters[only], sample.lengths[row : row + 1])
        torch.testing.assert_close(alone[0], logits[row, :length])
        one_by_one.append(nn.functional.cross_entropy(alone[0], sample.tags[only][0]) * length)
    torch.testing.assert_close(losses[0], sum(one_by_one) / sample.lengths.sum())


def test_words_without_a_tag_do_not_count_in_the_loss():
    model = tagger(nn, hidden=8).eval()
    sample = batch(3, 3, 3, 3)
    logits = model(sample.words, sample.characters, sample.lengths)
    logits.retain_grad()
    sample.tags[:, 1] = NO_TAG
    tag_sequence.loss(logits, sample.tags).backward()
    assert not logits.grad[:, 1].any()
    assert logits.grad[:, 0].any()
    predicted, tags = tag_sequence.predict(
        model, [(w, c, t) for w, c, t, _ in zip(*sample, strict=True)]
    )
    assert torch.equal(tags, sample.tags[:, [0, 2]].flatten())
    torch.testing.assert_close(predicted, logits[:, [0, 2]].flatten(0, 1))


def test_baseline():
    training = tag_sequence.tagged_words(
        [
            sentence("a b , a", "N V . N"),
            sentence("a c d e", "V N V V"),
        ]
    )
    assert training[:3] == [("a", "N"), ("b", "V"), ("a", "N")]
    assert tag_sequence.most_frequent_tags(training, ["a", "c", "new"]) == ["N", "N", "V"]
    # Without rare words all words count.
    assert tag_sequence.most_frequent_tags([("a", "N")] * 2, ["new"]) == ["N"]


def run(tmp_path, *arguments):
    small = ["--hidden", "16", "--every", "60"]
    tag_sequence.main([*small, "--out", str(tmp_path / "a.png"), *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("layer", common.LIBRARIES)
def test_training_resumes_identically(tmp_path, capsys, layer):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(tmp_path, "--layer", layer, "--epochs", "3", "--checkpoint", str(whole))
    printed = capsys.readouterr().out
    run(tmp_path, "--layer", layer, "--epochs", "2", "--checkpoint", str(parts))
    capsys.readouterr()
    run(tmp_path, "--layer", layer, "--epochs", "3", "--checkpoint", str(parts))
    assert capsys.readouterr().out == printed
    for line in [f"GRU, {layer}", "each word's most frequent tag", "unknown words"]:
        assert line in printed
    a, b = (torch.load(path, weights_only=True) for path in [whole, parts])
    assert a["epochs"] == b["epochs"] == 3
    assert a["best"] == b["best"]
    for state in ["model", "kept"]:
        assert a[state].keys() == b[state].keys()
        for name, value in a[state].items():
            assert torch.equal(value, b[state][name])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "parts.pt", "whole.pt"]


@pytest.mark.slow
def test_training_learns(tmp_path, capsys):
    run(tmp_path, "--every", "20", "--epochs", "6", "--both-times")
    printed = capsys.readouterr().out
    assert "A training step of 64 sentences: torch" in printed
    (row,) = (row.split("│") for row in printed.splitlines() if "GRU" in row)
    parts = tag_sequence.split(tag_sequence.corpus()[::20])
    tags = [tag for _, tag in tag_sequence.tagged_words(parts["test"])]
    most_frequent = max(np.unique(tags, return_counts=True)[1]) / len(tags)
    assert float(row[2][:-2]) > 100 * 2 * most_frequent


error_of = functools.partial(one_line_error, run)


def test_argument_errors_are_one_line(tmp_path, capsys):
    assert "'0' is not a whole number from 1 up" in error_of(capsys, tmp_path, "--every", "0")
    found = error_of(capsys, tmp_path, "--every", "100000")
    assert "--every: 100000 leaves no sentence for the" in found
    assert "no name for a picture" in error_of(capsys, tmp_path, "--out", "a.txt")
    file = tmp_path / "file"
    file.write_text("kept")
    assert "--checkpoint: " in error_of(capsys, tmp_path, "--checkpoint", str(file / "a.pt"))
    assert "--out: " in error_of(capsys, tmp_path, "--out", str(file / "a.png"))
    assert f"--checkpoint: {file} is none" in error_of(capsys, tmp_path, "--checkpoint", str(file))
    assert file.read_text() == "kept"


def test_checkpoint_of_another_run_is_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    run(tmp_path, "--epochs", "1", "--checkpoint", str(path))
    before = path.read_bytes()
    capsys.readouterr()
    for arguments, reason in [
        (["--layer", "torch"], "layer fastrnn"),
        (["--every", "61"], "every"),
    ]:
        found = error_of(capsys, tmp_path, "--checkpoint", str(path), *arguments)
        assert f"--checkpoint: {path} has {reason}" in found
    state = torch.load(path, weights_only=True)
    common.save_checkpoint(path, state | {"optimizer": {}})
    damaged = path.read_bytes()
    found = error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert f"--checkpoint: {path} is of another model" in found
    assert path.read_bytes() == damaged != before
