"""torch.compile: one graph with one operator, the results of the eager layer, any T and B."""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    cell_pair,
    cell_state,
    flat,
    leaves,
    pack,
    pair,
    ragged,
    random_state,
)
from torch import nn
from torch._dynamo.exc import Unsupported, UserError
from torch.nn.utils import parametrizations
from torch_features import (
    DISABLED,
    NO_RNN,
    RAISED,
    needs_compiled_double_backward,
    needs_compiled_packed,
    needs_compiled_parametrization,
    skip_without_sizes_from_tensors,
)

import fastrnn

pytestmark = [pytest.mark.once]

BACKENDS = ["eager", "aot_eager"]
PADDED_AND_PACKED = [
    pytest.param(False, id="padded"),
    pytest.param(True, id="packed", marks=needs_compiled_packed),
]
# T and B. Dynamo specialises on sizes that are equal in the first call, and on size 1.
SIZES = [(4, 3), (2, 6), (9, 2), (6, 12)]


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that records the graphs it compiles."""

    def __init__(self, backend):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)

    def operators(self):
        """The number of calls of fastrnn's operators in each graph."""
        return [
            sum(str(node.target).startswith("fastrnn.forward") for node in graph.graph.nodes)
            for graph in self.graphs
        ]


def with_gradients(call, layer, args):
    """Results and all gradients of a call with copies of `args`."""
    args = leaves(args)
    outputs = flat(call(*args))
    loss = sum((o.double() * torch.linspace(0, 1, o.numel()).view_as(o)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, [*flat(args), *layer.parameters()])
    return [*[o.detach() for o in outputs], *grads]


def assert_same_bits(compiled, layer, args):
    for a, b in zip(
        with_gradients(compiled, layer, args), with_gradients(layer, layer, args), strict=True
    ):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(flat(compiled(*args)), flat(layer(*args)), strict=True):
            assert torch.equal(a, b)


OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_is_one_operator_in_one_graph(kind, backend):
    for options in OPTIONS:
        torch._dynamo.reset()
        layer, _ = pair(kind, 5, 17, **options)
        counting = Counting(backend)
        compiled = torch.compile(layer, backend=counting, fullgraph=True)
        assert_same_bits(
            compiled, layer, (torch.randn(4, 3, 5), random_state(layer, 3 + bool(options)))
        )
        assert set(counting.operators()) == {1}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CELLS)
def test_cell_is_one_operator_in_one_graph(kind, backend):
    cell, _ = cell_pair(kind, 5, 17)
    counting = Counting(backend)
    compiled = torch.compile(cell, backend=counting, fullgraph=True)
    assert_same_bits(compiled, cell, (torch.randn(3, 5), cell_state(cell, 3)))
    assert_same_bits(compiled, cell, (torch.randn(3, 5),))
    assert set(counting.operators()) == {1}


def make_input(packed, T, B):
    if not packed:
        return torch.randn(T, B, 5)
    return ragged([1 + (T - 1) * (b + 1) // B for b in reversed(range(B))], 5)


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("packed", PADDED_AND_PACKED)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_for_any_length_and_batch(kind, with_state, packed):
    if packed and not with_state:
        skip_without_sizes_from_tensors()
    layer, _ = pair(kind, 5, 17)
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for T, B in SIZES:
        args = (make_input(packed, T, B), *([random_state(layer, B)] if with_state else []))
        with torch.no_grad():
            for a, b in zip(flat(compiled(*args)), flat(layer(*args)), strict=True):
                assert torch.equal(a, b)
    # Dynamo may restart when it finds that it cannot keep the float `dropout` as a graph input.
    assert counting.operators()[-1] == 1


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("kind", CELLS)
def test_one_cell_graph_for_any_batch(kind):
    cell, _ = cell_pair(kind, 5, 17)
    counting = Counting("aot_eager")
    compiled = torch.compile(cell, backend=counting, fullgraph=True, dynamic=True)
    for _, B in SIZES:
        args = torch.randn(B, 5), cell_state(cell, B)
        for a, b in zip(
            with_gradients(compiled, cell, args), with_gradients(cell, cell, args), strict=True
        ):
            assert torch.equal(a, b)
    assert counting.operators() == [1]


@pytest.mark.parametrize("packed", PADDED_AND_PACKED)
def test_sizes_become_dynamic_automatically(packed):
    """As for any torch operator: the first graph is static, the second dynamic."""
    if packed:
        skip_without_sizes_from_tensors()
    layer, _ = pair("gru", 5, 17, num_layers=2)
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for T, B in SIZES:
        x = make_input(packed, T, B)
        for a, b in zip(
            with_gradients(compiled, layer, (x,)), with_gradients(layer, layer, (x,)), strict=True
        ):
            assert torch.equal(a, b)
    assert len(counting.graphs) == 2


class Tagger(nn.Module):
    """A model with all layers and cells, and dropout between layers."""

    def __init__(self, library):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = library.LSTM(8, 17, num_layers=2, bidirectional=True, dropout=0.5)
        self.gru = library.GRU(34, 5)
        self.rnn = library.RNN(34, 5)
        self.lstm_cell = library.LSTMCell(10, 5)
        self.gru_cell = library.GRUCell(5, 5)
        self.rnn_cell = library.RNNCell(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        x, _ = self.lstm(self.embedding(tokens).tanh())
        x = torch.cat([self.gru(x)[0], self.rnn(x)[0]], -1)
        h, c = self.lstm_cell(x[0])
        for step in x[1:3].unbind(0):
            h, c = self.lstm_cell(step, (h, c))
        return self.head(self.rnn_cell(self.gru_cell(h, c))).log_softmax(-1)


def train(model, call, steps=3):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(11, (6, 4))
        loss = call(tokens)[:, 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=pytest.mark.slow)])
def test_train_a_model(backend):
    ours = Tagger(fastrnn)
    model = copy.deepcopy(ours)
    counting = Counting(backend)
    compiled = train(model, torch.compile(model, backend=counting, fullgraph=True))
    torch.testing.assert_close(compiled, train(ours, ours))
    # Three layers, three calls of LSTMCell, one each of GRUCell and RNNCell.
    assert counting.operators() == [8]


@pytest.mark.slow
@needs_compiled_packed
@torch._dynamo.config.patch(error_on_recompile=True)
def test_inductor_with_packed_sequences_of_any_length():
    skip_without_sizes_from_tensors()
    layer, _ = pair("lstm", 5, 17, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T, B in SIZES:
        x = make_input(True, T, B)
        torch.testing.assert_close(
            with_gradients(compiled, layer, (x,)), with_gradients(layer, layer, (x,))
        )


@pytest.mark.parametrize("packed", PADDED_AND_PACKED)
@pytest.mark.parametrize("dynamic", [None, True])
def test_state_of_wrong_size_raises(dynamic, packed):
    compiled = torch.compile(fastrnn.GRU(5, 17), backend="eager", fullgraph=True, dynamic=dynamic)
    x = pack([torch.randn(n, 5) for n in [4, 2, 1]], True) if packed else torch.randn(4, 3, 5)
    with pytest.raises(RuntimeError, match=RAISED):
        compiled(x, torch.zeros(1, 2, 17))


@pytest.mark.parametrize(
    "variant",
    [
        *("a subclass", "accelerated", "recompute"),
        pytest.param("parametrized", marks=needs_compiled_parametrization),
    ],
)
def test_subclasses_and_variants(variant):
    class Subclass(fastrnn.GRU):
        pass

    layer = {
        "a subclass": lambda: Subclass(5, 17),
        "accelerated": lambda: fastrnn.accelerate(nn.GRU(5, 17)),
        "parametrized": lambda: parametrizations.weight_norm(fastrnn.GRU(5, 17), "weight_hh_l0"),
        "recompute": lambda: fastrnn.GRU(5, 17, recompute=True),
    }[variant]()
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    args = (torch.randn(4, 3, 5),)
    torch.testing.assert_close(
        with_gradients(compiled, layer, args), with_gradients(layer, layer, args)
    )
    assert counting.operators() == [1]


# ---- Dynamo's allow_rnn --------------------------------------------------------------------------


def call_compiled(layer):
    return torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(4, 3, 5))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_torchs_own_layers_are_still_unsupported(name):
    call_compiled(getattr(fastrnn, name)(5, 17))
    assert not torch._dynamo.config.allow_rnn
    with pytest.raises(Unsupported, match=NO_RNN):
        call_compiled(getattr(nn, name)(5, 17))


def test_support_can_be_disabled(monkeypatch):
    monkeypatch.setattr(fastrnn.dynamo, "enabled", False)
    # torch 2.15 already refuses `type(self)`.
    with pytest.raises((Unsupported, UserError), match=NO_RNN):
        call_compiled(fastrnn.LSTM(5, 17))


def test_single_layer_can_be_excluded():
    model = nn.Sequential(torch.compiler.disable(fastrnn.GRU(5, 17)))
    with pytest.raises(Unsupported, match=DISABLED):
        call_compiled(model)


# ---- compiled autograd ---------------------------------------------------------------------------


class Compiled:
    """A compiler for compiled autograd that counts fastrnn's nodes in each backward graph."""

    def __init__(self, backend):
        self.backend, self.nodes = backend, []

    def __call__(self, graph):
        targets = [str(node.target) for node in graph.graph.nodes]
        # Before torch 2.7, the node's operator itself.
        names = ("FastrnnBackward", "fastrnn.backward")
        self.nodes.append(sum(any(name in target for name in names) for target in targets))
        return torch.compile(graph, backend=self.backend)

    def gradients(self, loss, inputs):
        """The gradients of `inputs`, accumulated in .grad as compiled autograd requires."""
        for t in inputs:
            t.grad = None
        with torch._dynamo.compiled_autograd._enable(self):
            loss.backward()
        return [None if t.grad is None else t.grad.clone() for t in inputs]


def scalar_loss(call, args):
    torch.manual_seed(3)  # for dropout
    return sum(o.sin().sum() for o in flat(call(*args)))


# Compiled one after the other: the cached graph of rnn_tanh must not be reused for rnn_relu.
COMPILED = [
    ("lstm", {"bidirectional": True, "recompute": True}),
    ("lstm_proj", {"dropout": 0.5}),
    ("gru", {}),
    ("rnn_tanh", {}),
    ("rnn_relu", {}),
]


@pytest.mark.parametrize(
    ("packed", "backend"),
    [
        (True, "aot_eager"),
        *(
            pytest.param(packed, backend, marks=pytest.mark.slow)
            for packed, backend in [(False, "aot_eager"), (True, "eager"), (True, "inductor")]
        ),
    ],
)
def test_compiled_autograd(packed, backend):
    compiled = Compiled(backend)
    for kind, options in COMPILED:
        options = dict(options)
        recompute = options.pop("recompute", False)
        layer, _ = pair(kind, 5, 5, num_layers=2, **options)
        layer.recompute = recompute
        layer.weight_hh_l0.requires_grad_(kind != "gru")
        args = leaves((ragged([4, 3, 1], 5) if packed else torch.randn(4, 3, 5),))
        args += (None if kind == "rnn_relu" else leaves(random_state(layer, 3)),)
        loss = scalar_loss(layer, args)
        inputs = [t for t in [*flat(args), *layer.parameters()] if t.requires_grad]
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(compiled.gradients(loss, inputs), list(expected))
    assert compiled.nodes == [1] * len(COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CELLS)
def test_compiled_autograd_of_cells(kind):
    compiled = Compiled("aot_eager")
    cell, _ = cell_pair(kind, 5, 5)
    for batch in [3, 3, 7]:
        args = leaves((torch.randn(batch, 5), cell_state(cell, batch)))

        def two_steps(x, hx):
            return cell(x, cell(x, hx))

        loss = scalar_loss(two_steps, args)
        inputs = [*flat(args), *cell.parameters()]
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(compiled.gradients(loss, inputs), list(expected))
    assert set(compiled.nodes) == {2}


@needs_compiled_double_backward
def test_compiled_autograd_of_double_backward():
    """For a gradient penalty. The graph calls fastrnn's double backward formulas eagerly."""
    compiled = Compiled("aot_eager")
    layer, _ = pair("gru", 5, 7)
    x = torch.randn(4, 3, 5, requires_grad=True)
    (first,) = torch.autograd.grad(scalar_loss(layer, (x,)), x, create_graph=True)
    loss, inputs = first.square().sum(), [x, *layer.parameters()]
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(compiled.gradients(loss, inputs), list(expected))


def test_compiled_autograd_by_configuration():
    """A whole training step under torch.compile."""
    layer, _ = pair("lstm", 5, 17)
    x = torch.randn(4, 3, 5)
    scalar_loss(layer, (x,)).backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x: scalar_loss(layer, (x,)).backward(), backend="eager")(x)
    torch.testing.assert_close([p.grad for p in layer.parameters()], expected)


# ---- importing Dynamo ----------------------------------------------------------------------------


def run_in_new_process(program):
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_import_does_not_import_dynamo():
    """Importing Dynamo takes seconds."""
    run_in_new_process("import fastrnn, sys; assert 'torch._dynamo' not in sys.modules")


@pytest.mark.slow
def test_dynamo_imported_before_fastrnn():
    found = run_in_new_process(
        "import torch._dynamo, fastrnn\n"
        "layer = torch.compile(fastrnn.GRU(2, 3), backend='eager', fullgraph=True)\n"
        "print(layer(torch.zeros(4, 1, 2))[0].shape)\n"
    )
    assert found.strip() == "torch.Size([4, 1, 3])"
