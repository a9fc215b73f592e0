"""examples/own_cell.py: the cell, its loop, and a run."""

import pytest
import torch
from helpers import one_line_error, ragged

pytest.importorskip("pycantonese", reason="the corpus comes with the extra 'demo'")
pytest.importorskip("matplotlib", reason="the plot needs the extra 'demo'")
pytest.importorskip("rich", reason="the table needs the extra 'demo'")

from examples import own_cell

pytestmark = [pytest.mark.cpu("the examples run on the CPU"), pytest.mark.once]


def test_the_loop_computes_the_same():
    loop = own_cell.Loop(5, 7, batch_first=True, bidirectional=True)
    x = ragged([3, 1, 4], 5)
    found, right = loop(x)[0], loop.layer(x)[0]
    torch.testing.assert_close(found.data, right.data)
    gradients = [torch.autograd.grad(t.data.sum(), list(loop.parameters())) for t in (found, right)]
    torch.testing.assert_close(*gradients)


def test_a_run(tmp_path, capsys):
    out = tmp_path / "curve.png"
    own_cell.main(["--every", "40", "--epochs", "2", "--hidden", "8", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "update_gate" in printed
    assert "LSTM" in printed
    assert out.stat().st_size > 1000


def test_error_of_too_few_sentences(tmp_path, capsys):
    def run(folder, *arguments):
        own_cell.main(["--out", str(folder / "curve.png"), *arguments])

    error = one_line_error(run, capsys, tmp_path, "--every", "100000")
    assert "--every: 100000 leaves too few sentences" in error
