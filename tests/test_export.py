"""torch.export: one operator in the program, dynamic T and B, saved programs."""

import functools
import io
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, pair, ragged, random_state
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence
from torch_features import needs_strict_export_of_layers

import fastrnn

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("error:The tensor attributes .*_flat_weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]

#: torch.export.load fails if the default device, which the tests set, is not the CPU.
loaded = pytest.mark.cpu("torch.export.load needs the CPU as torch's default device")

# The default since torch 2.8.
export = functools.partial(torch.export.export, strict=False)

SIZES = [(4, 3), (1, 6), (9, 1), (6, 12)]  # T and B
T_AND_B = {0: Dim("T"), 1: Dim("B")}
B_OF_STATES = {1: Dim("B")}


def operators(program):
    return sum(node.target is torch.ops.fastrnn.forward.default for node in program.graph.nodes)


def assert_same(program, layer, args):
    with torch.no_grad():
        for a, b in zip(flat(program(*args)), flat(layer(*args)), strict=True):
            assert torch.equal(a, b)


def dynamic(layer):
    """The dynamic shapes of a layer's arguments input and hx."""
    return T_AND_B, (B_OF_STATES,) * 2 if isinstance(layer, nn.LSTM) else B_OF_STATES


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_any_length_and_batch(kind, options):
    layer, _ = pair(kind, 5, 17, **options)
    args = torch.randn(4, 3, 5), random_state(layer, 3)
    program = export(layer, args, dynamic_shapes=dynamic(layer))
    assert operators(program) == 1
    decomposed = program.run_decompositions()
    assert operators(decomposed) == 1
    for module in [program.module(), decomposed.module()]:
        for T, B in SIZES:
            assert_same(module, layer, (torch.randn(T, B, 5), random_state(layer, B)))


@needs_strict_export_of_layers
def test_strict_mode():
    layer, _ = pair("lstm", 5, 17)
    args = (torch.randn(4, 3, 5),)
    program = torch.export.export(layer, args, dynamic_shapes=(T_AND_B,), strict=True)
    assert operators(program) == 1
    for T, B in SIZES:
        assert_same(program.module(), layer, (torch.randn(T, B, 5),))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_of_any_batch(kind):
    cell, _ = cell_pair(kind, 5, 17)
    batch = {0: Dim("B")}
    shapes = (batch, (batch, batch) if isinstance(cell, nn.LSTMCell) else batch)
    program = export(cell, (torch.randn(3, 5), cell_state(cell, 3)), dynamic_shapes=shapes)
    assert operators(program) == 1
    for _, B in SIZES:
        assert_same(program.module(), cell, (torch.randn(B, 5), cell_state(cell, B)))


class PackedInput(nn.Module):
    """torch.export does not accept a PackedSequence, but it does accept its tensors."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, data, batch_sizes):
        output, last = self.layer(PackedSequence(data, batch_sizes))
        return output.data, last


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_of_any_lengths(kind):
    layer, _ = pair(kind, 5, 17, bidirectional=True)
    model = PackedInput(layer)
    shapes = ({0: Dim("N")}, {0: Dim("T")})
    program = export(model, tuple(ragged([4, 2, 1], 5)[:2]), dynamic_shapes=shapes)
    assert operators(program) == 1
    for lengths in [[4, 2, 1], [3, 3], [9, 7, 6, 1, 1]]:
        assert_same(program.module(), model, tuple(ragged(lengths, 5)[:2]))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fastrnn.GRU(5, 17, num_layers=2, dropout=0.5)
        self.head = nn.Linear(17, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def exported():
    model = Model().eval()
    return model, export(model, (torch.randn(4, 3, 5),), dynamic_shapes=(T_AND_B,))


RUN = """
import sys, torch, fastrnn
torch.set_num_threads(2)
x, expected = torch.load(sys.argv[2])
model = {load}
torch.testing.assert_close(model(x), expected)
"""


def run_in_new_process(load, path, model, folder):
    x = torch.randn(7, 2, 5)
    with torch.no_grad():
        torch.save((x, model(x)), folder / "expected.pt")
    program = [sys.executable, "-c", RUN.format(load=load), path, folder / "expected.pt"]
    found = subprocess.run(program, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@loaded
def test_saved_and_run_in_another_process(tmp_path):
    model, program = exported()
    torch.export.save(program, tmp_path / "model.pt2")
    load = "torch.export.load(sys.argv[1]).module()"
    run_in_new_process(load, tmp_path / "model.pt2", model, tmp_path)


@loaded
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a compiler")
def test_aotinductor_package_in_another_process(tmp_path):
    model, program = exported()
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    load = "torch._inductor.aoti_load_package(sys.argv[1])"
    run_in_new_process(load, path, model, tmp_path)


def test_exported_program_is_differentiable():
    """With the same gradients as the module."""
    layer, _ = pair("gru", 5, 17)
    module = export(layer, (torch.randn(4, 3, 5),), dynamic_shapes=(T_AND_B,)).module()
    x = torch.randn(6, 2, 5)
    found = [
        torch.autograd.grad(call(x)[0].square().sum(), list(call.parameters()))
        for call in [module, layer]
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@loaded
def test_saved_program_contains_no_fastrnn_objects():
    """The archive refers to fastrnn only by the operator's name."""
    _, program = exported()
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert operators(torch.export.load(buffer)) == 1
