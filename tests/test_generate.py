"""examples/generate.py on a small text: windows, losses, generation, command line."""

import functools
import gzip
import itertools
import lzma
import math

import pytest
import torch
from helpers import one_line_error
from torch import nn

import fastrnn

pytest.importorskip("matplotlib", reason="the plot needs the extra 'demo'")
pytest.importorskip("rich", reason="the table needs the extra 'demo'")

from examples import generate

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]

TEXT = b"".join(b"%d sheep and %d dogs\n" % (i, i * i % 7) for i in range(130))


def test_text_is_the_documentation_without_repeated_paragraphs():
    text = generate.documentation()
    assert len(text) > 200_000
    assert b'"assert" statement' in text
    paragraphs = text.split(b"\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


def test_windows_continue_each_stream_and_drop_less_than_a_batch():
    text = torch.arange(24)  # 23 pairs: 3 streams of 7, and 2 dropped
    xs, ys = zip(*generate.windows(text, batch=3, length=3), strict=True)
    assert [x.shape for x in xs] == [(3, 3), (3, 3), (3, 1)]
    assert torch.equal(torch.cat(xs, 1), text[:21].view(3, 7))
    assert torch.equal(torch.cat(ys, 1), torch.cat(xs, 1) + 1)


@pytest.mark.parametrize("layers", [1, 2])
def test_both_layers_give_the_same_logits_and_losses(layers):
    ours, theirs = (generate.ByteLSTM(library, 33, layers) for library in (fastrnn, nn))
    assert isinstance(ours.lstm, fastrnn.LSTM)
    ours.load_state_dict(theirs.state_dict())
    text = generate.to_tensor(TEXT)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # the same dropout masks
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses.append(generate.train_epoch(model, optimizer, text, 4, 17))
    torch.testing.assert_close(*(torch.tensor(loss) for loss in losses))
    torch.testing.assert_close(ours.out.weight, theirs.out.weight)
    ours.load_state_dict(theirs.state_dict())
    x = text[None, :100]
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("library", [fastrnn, nn])
def test_windows_with_carried_state_equal_one_pass(library):
    model = generate.ByteLSTM(library, 17, 2).eval()
    text = generate.to_tensor(TEXT[:400])
    whole, (h, c) = model(text[None, :-1])
    state, parts = None, []
    for x, _ in generate.windows(text, 1, 33):
        logits, state = model(x, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, (h, c))

    log_probabilities = whole[0].log_softmax(1).gather(1, text[1:, None])[:, 0]
    for start in (1, 300):
        expected = -log_probabilities[start - 1 :].mean().item() / math.log(2)
        model.train()  # bits() switches dropout off
        assert generate.bits(model, text, start, length=33) == pytest.approx(expected, rel=1e-5)


def test_training_carries_the_state_detached():
    model = generate.ByteLSTM(fastrnn, 8)
    seen = []
    forward = model.forward
    model.forward = lambda x, state: seen.append(state) or forward(x, state)
    text = generate.to_tensor(TEXT)
    generate.train_epoch(model, torch.optim.SGD(model.parameters(), 0.0), text[:201], 4, 20)
    assert seen[0] is None
    streams = text[:200].view(4, 50)
    assert len(seen) == 3
    for i, state in enumerate(seen[1:], 1):
        assert not any(part.requires_grad for part in state)
        torch.testing.assert_close(state, forward(streams[:, : 20 * i])[1])


@pytest.mark.parametrize("library", [fastrnn, nn])
def test_generated_stream_equals_one_pass(library):
    model = generate.ByteLSTM(library, 33)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    # At this temperature sampling takes the most likely byte.
    stream = generate.generate(model, b"1 sheep", 1e-4, torch.Generator())
    written = bytes(itertools.islice(stream, 40))
    assert not model.training
    whole, _ = model(generate.to_tensor(b"1 sheep" + written)[None])
    assert bytes(whole[0, 6:-1].argmax(1).tolist()) == written
    assert len(set(written)) > 3


def test_temperature_of_sampling():
    model = generate.ByteLSTM(fastrnn, 8)
    nn.init.zeros_(model.out.weight)
    model.out.bias.data.fill_(-math.inf)
    model.out.bias.data[:2] = torch.tensor([0.0, math.log(4)])
    for temperature, share in [(1.0, 4 / 5), (0.5, 16 / 17), (2.0, 2 / 3)]:
        stream = generate.generate(model, b"a", temperature, torch.Generator().manual_seed(0))
        found = sum(itertools.islice(stream, 2000)) / 2000
        # Five standard deviations of the mean of 2000 samples.
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 2000))
        again = generate.generate(model, b"a", temperature, torch.Generator().manual_seed(0))
        assert sum(itertools.islice(again, 2000)) / 2000 == found


def test_compressors_with_and_without_the_training_text():
    found = {name: value for name, (value, _) in generate.compressed(TEXT, TEXT[:500]).items()}
    assert found["gzip alone"] == 8 * len(gzip.compress(TEXT[:500], 9)) / 500
    best = lzma.PRESET_EXTREME | 9
    after = len(lzma.compress(TEXT + TEXT[:500], preset=best))
    after -= len(lzma.compress(TEXT, preset=best))
    assert found["xz after the training part"] == 8 * after / 500
    for name in ("gzip", "xz"):  # repeated text costs next to nothing
        assert found[f"{name} after the training part"] < 0.2 * found[f"{name} alone"]


def run(tmp_path, *arguments):
    text = tmp_path / "text"
    if not text.exists():
        text.write_bytes(TEXT)
    small = ["--hidden", "33", "--window", "17", "--batch", "4", "--length", "5"]
    out = ["--text", str(text), "--out", str(tmp_path / "a.png")]
    generate.main([*small, *out, *arguments])


@pytest.mark.slow
def test_training_learns_and_resumes_identically(tmp_path, capsys):
    whole, parts = tmp_path / "new" / "whole.pt", tmp_path / "parts.pt"
    run(
        tmp_path, "--epochs", "3", "--checkpoint", str(whole), "--both-times", "--prompt", "7 s\x1b"
    )
    printed = capsys.readouterr().out
    lines = [
        f"{len(TEXT)} bytes, {len(TEXT)} characters, of the file",
        "LSTM, fastrnn, after 3 epochs",
        "xz after the training part",
        "7 s\ufffd",
        "A training step: torch",
        "Characters written a second: torch",
    ]
    for line in lines:
        assert line in printed
    run(tmp_path, "--epochs", "2", "--checkpoint", str(parts))
    run(tmp_path, "--epochs", "3", "--checkpoint", str(parts))
    a, b = (torch.load(path, weights_only=True) for path in [whole, parts])
    assert a["train_bits"] == b["train_bits"]
    assert a["test_bits"] == b["test_bits"]
    assert len(a["test_bits"]) == 3
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name])
    # A uniform model takes 8 bits a byte, a unigram model 3.86.
    assert a["test_bits"][2] < 3.5
    assert a["test_bits"][2] < a["test_bits"][0]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "new", "parts.pt", "text"]


def test_training_never_sees_the_test_set(tmp_path):
    weights = []
    for tail in (TEXT, bytes(len(TEXT))):
        count = len(TEXT) * 9 // 10
        (tmp_path / "text").write_bytes(TEXT[:count] + tail[count:])
        (tmp_path / "state.pt").unlink(missing_ok=True)
        run(tmp_path, "--epochs", "1", "--checkpoint", str(tmp_path / "state.pt"))
        weights.append(torch.load(tmp_path / "state.pt", weights_only=True)["model"])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


error_of = functools.partial(one_line_error, run)


def test_argument_errors_are_one_line(tmp_path, capsys):
    for value in ["0", "-1", "nan", "inf", "warm"]:
        found = error_of(capsys, tmp_path, f"--temperature={value}")
        assert f"'{value}' is not a number above 0" in found
    assert "No such file" in error_of(capsys, tmp_path, "--text", str(tmp_path / "none"))
    assert "Is a directory" in error_of(capsys, tmp_path, "--text", str(tmp_path))
    (tmp_path / "empty").touch()
    found = error_of(capsys, tmp_path, "--text", str(tmp_path / "empty"))
    assert "0 bytes to train on are fewer than the 69 of a step" in found
    assert "--prompt: it is empty" in error_of(capsys, tmp_path, "--prompt", "")
    assert "no name for a picture" in error_of(capsys, tmp_path, "--out", "a.txt")
    (tmp_path / "text" / "in a file").parent.touch()
    found = error_of(capsys, tmp_path, "--checkpoint", str(tmp_path / "text" / "no" / "state.pt"))
    assert "--checkpoint: " in found


def test_foreign_checkpoint_is_rejected_and_kept(tmp_path, capsys):
    path = tmp_path / "state.pt"
    path.write_bytes(b"no checkpoint")
    assert f"--checkpoint: {path} is none" in error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert path.read_bytes() == b"no checkpoint"
    path.unlink()
    run(tmp_path, "--epochs", "1", "--checkpoint", str(path))
    (tmp_path / "a.png").unlink()
    capsys.readouterr()
    before = path.read_bytes()
    (tmp_path / "text").write_bytes(TEXT + b"!")
    assert f"{path} has text" in error_of(capsys, tmp_path, "--checkpoint", str(path))
    path.write_bytes(before[:-100])
    assert f"{path} is none" in error_of(capsys, tmp_path, "--checkpoint", str(path))
    assert path.read_bytes() == before[:-100]
