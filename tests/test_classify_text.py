"""examples/classify_text.py: its data, model and baseline, and the training loop common.fit."""

import collections
import functools

import pytest
import torch
from helpers import one_line_error
from torch import nn

import fastrnn

pytest.importorskip("spellchecker", reason="the words come with the extra 'demo'")
pytest.importorskip("sklearn", reason="the baseline needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the picture needs the extra 'demo'")
pytest.importorskip("rich", reason="the table needs the extra 'demo'")

from examples import classify_text, common

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]


@pytest.fixture(autouse=True)
def three_languages(monkeypatch):
    """The three with the shortest word lists: reading all nine takes seconds."""
    few = {name: classify_text.LANGUAGES[name] for name in ["es", "lv", "eu"]}
    monkeypatch.setattr(classify_text, "LANGUAGES", few)


def test_shared_and_non_alphabetic_words_are_excluded():
    lists = {
        "en": collections.Counter({"the": 9, "no": 8, "it's": 7, "apple": 3, "word": 2, "rare": 1}),
        "es": collections.Counter({"no": 9, "la": 5, "agua": 4, "rare": 1}),
    }
    pairs, left_out = classify_text.choose(lists, 2)
    assert pairs == [("the", "en"), ("apple", "en"), ("la", "es"), ("agua", "es")]
    assert left_out == 2  # "no" in both lists; the shared "rare" is not among the most frequent
    assert len(classify_text.choose(lists, 99)[0]) == 5


def test_real_word_lists():
    lists = {name: classify_text.frequencies(name) for name in classify_text.LANGUAGES}
    pairs, left_out = classify_text.choose(lists, 5000)
    counts = collections.Counter(language for _, language in pairs)
    assert counts == {"es": 5000, "lv": 5000, "eu": 5000}
    words = [word for word, _ in pairs]
    assert len(set(words)) == len(words)
    assert all(word.isalpha() for word in words)
    assert left_out > 0
    assert "no" in lists["es"]  # not
    assert "no" in lists["lv"]  # from
    assert "no" not in words
    assert {("cuando", "es"), ("mēs", "lv"), ("behar", "eu")} <= set(pairs)


def test_split_depends_only_on_the_key():
    words = [f"w{i}" for i in range(1000)]
    parts = common.split(words, key=str)
    assert sorted(word for part in parts.values() for word in part) == sorted(words)
    assert common.split(words[::-1], key=str) == {n: part[::-1] for n, part in parts.items()}
    for name, part in common.split(words[::7], key=str).items():
        assert set(part) <= set(parts[name])
    assert 80 <= len(parts["validation"]) <= 120
    assert 80 <= len(parts["test"]) <= 120
    # The hash must never change, or runs would no longer share one test set.
    assert common.split(["zebra", "word21", "kā", "word12"], key=str) == {
        "training": ["zebra", "kā"],
        "validation": ["word12"],
        "test": ["word21"],
    }
    together = [(1, "word21"), (2, "word21")]
    assert common.split(together, key=lambda item: item[1])["test"] == together


def test_encoded_letters():
    pairs = [("ab", "en"), ("bxbb", "es")]
    words = classify_text.encode(pairs, "ab", ["es", "en"])
    assert words.letters.tolist() == [[2, 3, 0, 0], [3, 1, 3, 3]]
    assert words.lengths.tolist() == [2, 4]
    assert words.languages.tolist() == [1, 0]
    assert words.batch(torch.tensor([0])).letters.tolist() == [[2, 3]]


def batch(*lengths):
    letters = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(letters, lengths, strict=True):
        row[:length] = torch.randint(1, 20, (length,))
    return letters, torch.tensor(lengths)


def test_same_logits_with_both_libraries():
    ours, theirs = (
        classify_text.TextClassifier(library, 20, 3, 17).eval() for library in (fastrnn, nn)
    )
    assert isinstance(ours.lstm, fastrnn.LSTM)
    ours.load_state_dict(theirs.state_dict())
    letters, lengths = batch(1, 17, 5, 33)
    torch.testing.assert_close(ours(letters, lengths), theirs(letters, lengths))


@pytest.mark.parametrize("library", common.LIBRARIES)
def test_padding_does_not_change_results(library):
    model = classify_text.TextClassifier(common.LIBRARIES[library], 20, 3, 8).eval()
    letters, lengths = batch(2, 9, 1, 4)
    together = model(letters, lengths)
    wider = nn.functional.pad(letters, (0, 5), value=7)  # the padding value does not matter
    assert torch.equal(model(wider, lengths), together)
    for row, length in enumerate(lengths):
        alone = model(letters[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1])


def test_classifier_uses_the_last_state_of_each_direction():
    model = classify_text.TextClassifier(nn, 20, 3, 8).eval()
    letters, lengths = batch(6, 6)
    states = model.lstm(model.embedding(letters))[0]
    ends = torch.cat([states[:, -1, :8], states[:, 0, 8:]], dim=1)
    torch.testing.assert_close(model(letters, lengths), model.out(ends))


def test_baseline_and_confusion_matrix():
    training = [("bcb", "x"), ("cbc", "x"), ("aeae", "y"), ("eae", "y")]
    assert classify_text.ngrams(training, ["bcbc", "aea", "cb"]) == ["x", "y", "x"]
    # Prefixes and suffixes are features: the classes differ only in the order of the letters.
    ends = [(a + b, "x") for a in "ab" for b in "cdefg"]
    training = [*ends, *((word[::-1], "y") for word, _ in ends)]
    assert classify_text.ngrams(training, ["ah", "ha", "bk", "kb"]) == ["x", "y", "x", "y"]
    found = classify_text.confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def run(tmp_path, *arguments):
    small = ["--hidden", "16", "--words", "40"]
    classify_text.main([*small, "--out", str(tmp_path / "a.png"), *arguments])


@pytest.mark.parametrize("layer", common.LIBRARIES)
def test_resumed_run_equals_uninterrupted_run(tmp_path, capsys, layer):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(tmp_path, "--layer", layer, "--epochs", "4", "--checkpoint", str(whole))
    printed = capsys.readouterr().out
    run(tmp_path, "--layer", layer, "--epochs", "3", "--checkpoint", str(parts))
    capsys.readouterr()
    run(tmp_path, "--layer", layer, "--epochs", "4", "--checkpoint", str(parts))
    assert capsys.readouterr().out == printed
    for line in [f"LSTM, {layer}", "logistic regression", "120 words, without"]:
        assert line in printed
    a, b = (torch.load(path, weights_only=True) for path in [whole, parts])
    assert a["epochs"] == b["epochs"] == 4
    assert a["best"] == b["best"]
    for state in ["model", "kept"]:
        assert a[state].keys() == b[state].keys()
        for name, value in a[state].items():
            assert torch.equal(value, b[state][name])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "parts.pt", "whole.pt"]


def test_model_learns(tmp_path, capsys):
    run(tmp_path, "--words", "200", "--epochs", "8", "--both-times")
    printed = capsys.readouterr().out
    assert "A training step of 128 words: torch" in printed
    (accuracy,) = (float(row.split("│")[2][:-2]) for row in printed.splitlines() if "LSTM" in row)
    assert accuracy > 100 * 2 / 3  # twice the accuracy of guessing


def test_the_best_weights_are_kept():
    model = nn.Linear(1, 1)
    losses = iter([3.0, 1.0, float("nan"), 2.0])
    seen = []

    def epoch():
        assert model.training
        nn.init.constant_(model.weight, len(seen) + 1)

    def judge():
        assert not model.training
        seen.append(model.weight.item())
        return next(losses)

    parser = common.Parser()
    args = parser.parse_args([])
    args.epochs, args.checkpoint = 4, None
    optimizer = torch.optim.Adam(model.parameters())
    state = common.fit(parser, args, {}, model, optimizer, epoch, judge)
    assert (state["epochs"], state["best"], state["best_epoch"]) == (4, 1.0, 2)
    assert seen == [1, 2, 3, 4]
    assert model.weight.item() == 2


error_of = functools.partial(one_line_error, run)


def test_invalid_arguments_exit_with_one_line(tmp_path, capsys):
    assert "'0' is not a whole number from 1 up" in error_of(capsys, tmp_path, "--words", "0")
    assert "--words: 1 of each language leave none for the" in error_of(
        capsys, tmp_path, "--words", "1"
    )
    assert "no name for a picture" in error_of(capsys, tmp_path, "--out", "a.txt")
    file = tmp_path / "file"
    file.write_text("kept")
    assert "--checkpoint: " in error_of(capsys, tmp_path, "--checkpoint", str(file / "a.pt"))
    assert "--checkpoint: " in error_of(capsys, tmp_path, "--checkpoint", str(tmp_path))
    assert file.read_text() == "kept"


def test_invalid_checkpoint_is_reported_and_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    run(tmp_path, "--epochs", "1", "--checkpoint", str(path))
    capsys.readouterr()
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)
    other = nn.Linear(2, 2).state_dict()
    for content, reason in [
        (good[: len(good) // 2], "is none"),
        (b"", "is none"),
        ({"options": 5}, "is none"),
        ({"options": state["options"]}, "is of another model"),
        (state | {"model": other}, "is of another model"),
        (state | {"kept": other}, "is of another model"),
        (state | {"random": torch.zeros(3)}, "is of another model"),
        (state | {"options": {**state["options"], "seed": 3}}, "has seed 3, not 0"),
    ]:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            common.save_checkpoint(path, content)
        before = path.read_bytes()
        assert f"--checkpoint: {path} {reason}" in error_of(
            capsys, tmp_path, "--checkpoint", str(path)
        )
        assert path.read_bytes() == before
