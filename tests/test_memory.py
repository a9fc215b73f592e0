"""Memory saved for backward, no more than torch's layers save; leaks; out of memory."""

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
    saved = saved_bytes(ours, x)
    assert saved >= 20 * 16 * 64 * dtype.itemsize  # at least the output, so the count works
    assert saved <= saved_bytes(theirs, x)


@pytest.mark.once
def test_nothing_is_saved_without_grad():
    ours, _ = pair("lstm", 32, 64)
    with torch.no_grad():
        assert saved_bytes(ours, torch.randn(20, 16, 32)) == 0


@pytest.mark.once
@pytest.mark.cpu("about the CPU allocator")
def test_saved_tensors_share_one_allocation():
    """Each saved tensor outlives the others, and its storage is its own part of the memory."""
    layer = fastrnn.LSTM(5, 17, 2)
    x, h, c = torch.randn(4, 3, 5), torch.randn(2, 3, 17), torch.randn(2, 3, 17)

    def saved_tensors():
        arguments = (
            "lstm",
            x,
            h,
            c,
            layer._flat_weights,
            None,
            True,
            2,
            False,
            0.0,
            False,
            True,
            True,
        )
        with torch.no_grad():
            return list(torch.ops.fastrnn.forward(*arguments)[3:6])

    parts = saved_tensors()
    for part, after in itertools.pairwise(parts):
        assert after.data_ptr() == part.data_ptr() + (part.nbytes + 63) // 64 * 64
        assert part.untyped_storage().nbytes() == part.nbytes
    expected = [part.clone() for part in parts]
    for i in range(3):
        part = saved_tensors()[i]  # the other two are freed
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
@pytest.mark.cpu("about the process's memory")
def test_ten_thousand_steps_do_not_leak():
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
        assert grown < 1 << 20, grown  # 100 bytes a step
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.once
@pytest.mark.cpu("about the process's memory")
@pytest.mark.parametrize("what", ["output", "workspace"])
def test_out_of_memory(what):
    """Raises RuntimeError, and the next call works."""
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
                    raise AssertionError("the allocation succeeded")
                assert torch.equal(small(x)[0], expected)
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.once
@pytest.mark.cpu("about the process's memory")
def test_scratch_memory_that_stays():
    """A thread keeps at most 64 MB of workspace; a larger one is freed after the call."""
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
            assert megabytes() - before < 16, "128 MB must be freed"
            fastrnn.LSTM(2000, 700)(x)  # 30 MB
            assert 16 < megabytes() - before < 64, "30 MB must be kept"
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.cpu("about the process's memory")
def test_memory_of_a_step_is_used_again():
    """One freed block of 32 to 256 MB of saved tensors is cached for reuse; larger ones are not."""
    done = run_script(
        """
        import resource, torch, fastrnn
        torch.set_num_threads(2)
        layer = fastrnn.LSTM(16, 256)

        def megabytes():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * resource.getpagesize() / 2**20

        def saved_tensors(steps):
            x, state = torch.ones(steps, 1, 16), torch.zeros(1, 1, 256)
            arguments = ("lstm", x, state, state, layer._flat_weights, None, True, 1)
            with torch.no_grad():
                return torch.ops.fastrnn.forward(*arguments, False, 0.0, False, True, True)[3]

        saved_tensors(10)
        before = megabytes()
        first = saved_tensors(7000)  # 43 MB
        at, values = first.data_ptr(), first.clone()
        second = saved_tensors(7000)  # while the first is in use
        assert second.data_ptr() != at and torch.equal(second, values)
        del first
        third = saved_tensors(6000)  # fits the cached block
        assert third.data_ptr() == at and torch.equal(third, values[:, :6000])
        del second, third, values
        assert 32 < megabytes() - before < 64 + 16, "one block is cached"
        large = saved_tensors(44000)  # 270 MB
        assert megabytes() - before > 260
        del large
        assert 32 < megabytes() - before < 64 + 16, "the large block must be freed"
        """
    )
    assert done.returncode == 0, done.stderr
