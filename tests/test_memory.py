"""What is kept for backward: no more than torch's layers keep. No leaks. Memory that runs out."""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, pair

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from memory import saved_bytes

import fastrnn


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "dropout": 0.2}, {"bidirectional": True}]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_saved_bytes(kind, options, dtype):
    ours, theirs = pair(kind, 32, 64, dtype=dtype, **options)
    x = torch.randn(20, 16, 32, dtype=dtype)
    kept = saved_bytes(ours, x)
    assert kept >= 20 * 16 * 64 * dtype.itemsize  # at least the output: the count counts
    assert kept <= saved_bytes(theirs, x)


@pytest.mark.once
def test_nothing_is_kept_without_grad():
    ours, _ = pair("lstm", 32, 64)
    with torch.no_grad():
        assert saved_bytes(ours, torch.randn(20, 16, 32)) == 0


@pytest.mark.once
@pytest.mark.cpu("malloc's memory")
def test_what_is_kept_is_one_piece():
    """Each part lives on without the others, and knows of its own memory alone."""
    layer = fastrnn.LSTM(5, 17, 2)
    x, h, c = torch.randn(4, 3, 5), torch.randn(2, 3, 17), torch.randn(2, 3, 17)

    def kept():
        arguments = ("lstm", x, h, c, layer._flat_weights, None, True, 2, False, 0.0, True, True)
        with torch.no_grad():
            return list(torch.ops.fastrnn.forward(*arguments)[3:6])

    parts = kept()
    for part, after in itertools.pairwise(parts):
        assert after.data_ptr() == part.data_ptr() + (part.nbytes + 63) // 64 * 64
        assert part.untyped_storage().nbytes() == part.nbytes
    expected = [part.clone() for part in parts]
    for i in range(3):
        part = kept()[i]  # the other two are gone
        others = [torch.full_like(part, torch.nan) for part in expected for _ in range(9)]
        assert torch.equal(part, expected[i])
        del others


def run_script(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.cpu("the process's memory")
def test_ten_thousand_steps_take_no_memory():
    done = run_script(
        """
        import resource, torch, fastrnn
        torch.set_num_threads(2)
        layers = [fastrnn.LSTM(5, 17, 2, dropout=0.5), fastrnn.GRU(5, 17), fastrnn.RNN(5, 17)]
        x = torch.randn(3, 2, 5)

        def pages():
            return int(open("/proc/self/statm").read().split()[1])

        def train(steps):
            for step in range(steps):
                layer = layers[step % 3]
                layer.zero_grad()
                layer(x)[0].sum().backward()

        train(1000)
        before = pages()
        train(10_000)
        grown = (pages() - before) * resource.getpagesize()
        assert grown < 1 << 20, grown  # a hundred bytes a step
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.once
@pytest.mark.cpu("the process's memory")
@pytest.mark.parametrize("what", ["output", "scratch"])
def test_memory_that_is_not_there(what):
    """A RuntimeError, and the next call works."""
    done = run_script(
        f"""
        import resource, torch, fastrnn
        torch.set_num_threads(1)
        small, x = fastrnn.LSTM(5, 17), torch.randn(3, 2, 5)
        expected = small(x)[0]
        if "{what}" == "output":
            layer, large = fastrnn.LSTM(1, 500), torch.zeros(100_000, 10, 1)  # 2 GB
        else:
            layer, large = fastrnn.LSTM(2000, 2000), torch.zeros(2, 1, 2000)  # 128 MB, packed
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20), resource.RLIM_INFINITY))
        with torch.no_grad():
            for _ in range(3):
                try:
                    layer(large)
                except RuntimeError as error:
                    assert "allocate" in str(error), error
                else:
                    raise AssertionError("there was memory")
                assert torch.equal(small(x)[0], expected)
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.once
@pytest.mark.cpu("the process's memory")
def test_scratch_memory_that_stays():
    """At most 64 MB a thread: a layer that needs more gives all of it back."""
    done = run_script(
        """
        import resource, torch, fastrnn
        torch.set_num_threads(2)
        x = torch.zeros(300, 1, 2000)

        def megabytes():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * resource.getpagesize() / 2**20

        with torch.no_grad():
            fastrnn.LSTM(5, 17)(x[..., :5])
            layer = fastrnn.LSTM(2000, 2000)  # 128 MB, packed
            before = megabytes()
            layer(x)
            assert megabytes() - before < 16, "that is kept"
            fastrnn.LSTM(2000, 700)(x)  # 30 MB
            assert 16 < megabytes() - before < 64, "that is not"
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.once
@pytest.mark.cpu("the process's memory")
def test_memory_of_a_step_is_used_again():
    """Of 32 to 256 MB, one piece, once backward is done with it; what is larger is given back."""
    done = run_script(
        """
        import resource, torch, fastrnn
        torch.set_num_threads(2)
        layer = fastrnn.LSTM(16, 256)

        def megabytes():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * resource.getpagesize() / 2**20

        def kept(steps):
            x, state = torch.ones(steps, 1, 16), torch.zeros(1, 1, 256)
            arguments = ("lstm", x, state, state, layer._flat_weights, None, True, 1)
            with torch.no_grad():
                return torch.ops.fastrnn.forward(*arguments, False, 0.0, True, True)[3]

        kept(10)
        before = megabytes()
        first = kept(7000)  # 43 MB
        at, values = first.data_ptr(), first.clone()
        second = kept(7000)  # while the first is in use
        assert second.data_ptr() != at and torch.equal(second, values)
        del first
        third = kept(6000)  # less than there is
        assert third.data_ptr() == at and torch.equal(third, values[:, :6000])
        del second, third, values
        assert 32 < megabytes() - before < 64 + 16, "one piece is kept"
        large = kept(44000)  # 270 MB
        assert megabytes() - before > 260
        del large
        assert 32 < megabytes() - before < 64 + 16, "that is not"
        """
    )
    assert done.returncode == 0, done.stderr
