"""What an old torch lacks, and says in other words, as docs/versions.md lists it.

A test of something that torch lacks is skipped there, and runs from the version that brought it.
"""

import functools

import pytest
import torch


def needs(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test before the version of torch that brought `what`."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"torch {version} brought {what}")


needs_compiled_packed = needs("2.8", "PackedSequence to Dynamo")
needs_compiled_parametrization = needs("2.7", "weak references to Dynamo")
needs_strict_export_of_layers = needs("2.13", "calls of a layer's own methods to strict export")
needs_torchs_export_today = needs("2.13", "the errors that test_torch_itself.py knows")
needs_cpu_capabilities = needs("2.13", "torch.cpu.get_capabilities")
needs_compiled_double_backward = needs("2.7", "create_graph to compiled autograd")


@functools.cache
def dynamo_takes_sizes_from_tensors() -> bool:
    """torch's layers make the first states of a packed sequence with such a size. Not in 2.9."""
    zeros = torch.compile(lambda n: torch.zeros(n[0]), backend="eager", fullgraph=True)
    try:
        zeros(torch.tensor([3], device="cpu"))
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True


def skip_without_export_of_layers() -> None:
    if torch.__version__ < "2.8":
        pytest.skip("torch 2.8 brought torch.export without strict mode to its own layers")


@functools.cache
def has_bfloat16_lstm() -> bool:
    """Whether torch.nn.LSTM computes in bfloat16: oneDNN can't on CPUs with AVX2 alone."""
    try:
        with torch.no_grad():
            torch.nn.LSTM(3, 4, dtype=torch.bfloat16, device="cpu")(
                torch.ones(2, 1, 3, dtype=torch.bfloat16, device="cpu")
            )
            with torch.autocast("cpu", torch.bfloat16):
                torch.nn.LSTM(3, 4, device="cpu")(torch.ones(2, 1, 3, device="cpu"))
    except RuntimeError:
        return False
    return True


def skip_without_bfloat16_lstm() -> None:
    if not has_bfloat16_lstm():
        pytest.skip("torch's LSTM has no bfloat16 on this CPU")


def skip_without_sizes_from_tensors() -> None:
    if not dynamo_takes_sizes_from_tensors():
        pytest.skip("Dynamo takes no sizes from tensors")


# The words of Dynamo's errors.
RAISED = "Expected hidden size"
if torch.__version__ < "2.9":
    RAISED += "|Observed exception"
if torch.__version__ < "2.8":
    NO_RNN = "graph breaks on RNN, GRU, LSTMs"
    DISABLED = "DelayGraphBreakVariable"
else:
    NO_RNN = "RNN, GRU, or LSTM|DelayGraphBreakVariable"
    DISABLED = "disable"
