"""torch.compile: one graph, one operator in it, the numbers of the eager layer, any T and B."""

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
from torch._dynamo.exc import Unsupported
from torch.nn.utils import parametrizations

import fastrnn

pytestmark = [pytest.mark.once]

BACKENDS = ["eager", "aot_eager"]
# Of T and B. Dynamo takes sizes that are equal at first for equal always, and compiles for 1 apart.
SIZES = [(4, 3), (2, 6), (9, 2), (6, 12)]


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that keeps the graphs it was given."""

    def __init__(self, backend):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)

    def operators(self):
        """How often fastrnn's are called in each graph."""
        return [
            sum(str(node.target).startswith("fastrnn.forward") for node in graph.graph.nodes)
            for graph in self.graphs
        ]


def trained(call, layer, args):
    """Results and all gradients of a call, from leaves of its own."""
    args = leaves(args)
    outputs = flat(call(*args))
    loss = sum((o.double() * torch.linspace(0, 1, o.numel()).view_as(o)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, [*flat(args), *layer.parameters()])
    return [*[o.detach() for o in outputs], *grads]


def assert_same_bits(compiled, layer, args):
    for a, b in zip(trained(compiled, layer, args), trained(layer, layer, args), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(flat(compiled(*args)), flat(layer(*args)), strict=True):
            assert torch.equal(a, b)


OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_in_one_graph(kind, backend):
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
def test_cells_in_one_graph(kind, backend):
    cell, _ = cell_pair(kind, 5, 17)
    counting = Counting(backend)
    compiled = torch.compile(cell, backend=counting, fullgraph=True)
    assert_same_bits(compiled, cell, (torch.randn(3, 5), cell_state(cell, 3)))
    assert_same_bits(compiled, cell, (torch.randn(3, 5),))
    assert set(counting.operators()) == {1}


def input_of(packed, T, B):
    if not packed:
        return torch.randn(T, B, 5)
    return ragged([1 + (T - 1) * (b + 1) // B for b in reversed(range(B))], 5)


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_for_any_length_and_batch(kind, given, packed):
    layer, _ = pair(kind, 5, 17)
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for T, B in SIZES:
        args = (input_of(packed, T, B), *([random_state(layer, B)] if given else []))
        with torch.no_grad():
            for a, b in zip(flat(compiled(*args)), flat(layer(*args)), strict=True):
                assert torch.equal(a, b)
    # Dynamo may begin anew when it finds that the float `dropout` is no input to keep.
    assert counting.operators()[-1] == 1


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("kind", CELLS)
def test_one_graph_of_a_cell_for_any_batch(kind):
    cell, _ = cell_pair(kind, 5, 17)
    counting = Counting("aot_eager")
    compiled = torch.compile(cell, backend=counting, fullgraph=True, dynamic=True)
    for _, B in SIZES:
        args = torch.randn(B, 5), cell_state(cell, B)
        for a, b in zip(trained(compiled, cell, args), trained(cell, cell, args), strict=True):
            assert torch.equal(a, b)
    assert counting.operators() == [1]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_unasked_the_second_size_makes_sizes_dynamic(packed):
    """As for any operator of torch's: the first graph is for its sizes alone."""
    layer, _ = pair("gru", 5, 17, num_layers=2)
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for T, B in SIZES:
        x = input_of(packed, T, B)
        for a, b in zip(trained(compiled, layer, (x,)), trained(layer, layer, (x,)), strict=True):
            assert torch.equal(a, b)
    assert len(counting.graphs) == 2


class Tagger(nn.Module):
    """Layers and cells as they are used: in the middle of a model, with dropout between them."""

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
def test_training_a_model_with_layers_in_it(backend):
    ours = Tagger(fastrnn)
    model = copy.deepcopy(ours)
    counting = Counting(backend)
    compiled = train(model, torch.compile(model, backend=counting, fullgraph=True))
    torch.testing.assert_close(compiled, train(ours, ours))
    assert counting.operators() == [8]  # three layers, and three steps of a cell and one of two


@pytest.mark.slow
@torch._dynamo.config.patch(error_on_recompile=True)
def test_inductor_on_packed_sequences_of_any_length():
    layer, _ = pair("lstm", 5, 17, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T, B in SIZES:
        x = input_of(True, T, B)
        torch.testing.assert_close(trained(compiled, layer, (x,)), trained(layer, layer, (x,)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_state_of_another_size_is_refused(dynamic):
    compiled = torch.compile(fastrnn.GRU(5, 17), backend="eager", fullgraph=True, dynamic=dynamic)
    for x in [torch.randn(4, 3, 5), pack([torch.randn(n, 5) for n in [4, 2, 1]], True)]:
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            compiled(x, torch.zeros(1, 2, 17))


@pytest.mark.parametrize("how", ["a subclass", "accelerated", "parametrized", "recompute"])
def test_layers_of_other_classes(how):
    class Mine(fastrnn.GRU):
        pass

    layer = {
        "a subclass": lambda: Mine(5, 17),
        "accelerated": lambda: fastrnn.accelerate(nn.GRU(5, 17)),
        "parametrized": lambda: parametrizations.weight_norm(fastrnn.GRU(5, 17), "weight_hh_l0"),
        "recompute": lambda: fastrnn.GRU(5, 17, recompute=True),
    }[how]()
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    args = (torch.randn(4, 3, 5),)
    torch.testing.assert_close(trained(compiled, layer, args), trained(layer, layer, args))
    assert counting.operators() == [1]


# ---- Dynamo's rule -------------------------------------------------------------------------------


def call_compiled(layer):
    return torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(4, 3, 5))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_torchs_own_layers_fare_as_before(name):
    call_compiled(getattr(fastrnn, name)(5, 17))
    assert not torch._dynamo.config.allow_rnn
    with pytest.raises(Unsupported, match="RNN, GRU, or LSTM"):
        call_compiled(getattr(nn, name)(5, 17))


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(fastrnn.dynamo, "enabled", False)
    with pytest.raises(Unsupported, match="RNN, GRU, or LSTM"):
        call_compiled(fastrnn.LSTM(5, 17))


def test_one_layer_can_be_left_out():
    model = nn.Sequential(torch.compiler.disable(fastrnn.GRU(5, 17)))
    with pytest.raises(Unsupported, match="disable"):
        call_compiled(model)


# ---- compiled autograd ---------------------------------------------------------------------------


class Compiled:
    """Backward passes compiled by a backend, and how often fastrnn's node is in each graph."""

    def __init__(self, backend):
        self.backend, self.nodes = backend, []

    def __call__(self, graph):
        targets = [str(node.target) for node in graph.graph.nodes]
        self.nodes.append(sum("FastrnnBackward" in target for target in targets))
        return torch.compile(graph, backend=self.backend)

    def gradients(self, loss, wanted):
        """Accumulated in .grad, since that is all that compiled autograd does."""
        for t in wanted:
            t.grad = None
        with torch._dynamo.compiled_autograd._enable(self):
            loss.backward()
        return [None if t.grad is None else t.grad.clone() for t in wanted]


def a_loss(call, args):
    torch.manual_seed(3)  # of dropout
    return sum(o.sin().sum() for o in flat(call(*args)))


# Of one after the other: a graph of rnn_tanh is not to be taken for rnn_relu's.
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
        loss = a_loss(layer, args)
        wanted = [t for t in [*flat(args), *layer.parameters()] if t.requires_grad]
        expected = torch.autograd.grad(loss, wanted, retain_graph=True)
        torch.testing.assert_close(compiled.gradients(loss, wanted), list(expected))
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

        loss = a_loss(two_steps, args)
        wanted = [*flat(args), *cell.parameters()]
        expected = torch.autograd.grad(loss, wanted, retain_graph=True)
        torch.testing.assert_close(compiled.gradients(loss, wanted), list(expected))
    assert set(compiled.nodes) == {2}


def test_compiled_autograd_of_a_gradients_gradient():
    """Of a penalty on gradients, by formulas that its graph calls as they are."""
    compiled = Compiled("aot_eager")
    layer, _ = pair("gru", 5, 7)
    x = torch.randn(4, 3, 5, requires_grad=True)
    (first,) = torch.autograd.grad(a_loss(layer, (x,)), x, create_graph=True)
    loss, wanted = first.square().sum(), [x, *layer.parameters()]
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(compiled.gradients(loss, wanted), list(expected))


def test_compiled_autograd_as_configured():
    """A whole step under torch.compile."""
    layer, _ = pair("lstm", 5, 17)
    x = torch.randn(4, 3, 5)
    a_loss(layer, (x,)).backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x: a_loss(layer, (x,)).backward(), backend="eager")(x)
    torch.testing.assert_close([p.grad for p in layer.parameters()], expected)


# ---- without dynamo ------------------------------------------------------------------------------


def in_a_new_process(program):
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_importing_fastrnn_does_not_import_dynamo():
    """That takes seconds."""
    in_a_new_process("import fastrnn, sys; assert 'torch._dynamo' not in sys.modules")


@pytest.mark.slow
def test_dynamo_may_have_been_imported_before():
    found = in_a_new_process(
        "import torch._dynamo, fastrnn\n"
        "layer = torch.compile(fastrnn.GRU(2, 3), backend='eager', fullgraph=True)\n"
        "print(layer(torch.zeros(4, 1, 2))[0].shape)\n"
    )
    assert found.strip() == "torch.Size([4, 1, 3])"
