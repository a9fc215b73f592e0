"""Others' models and tools, unchanged, on fastrnn's layers: what they give with torch's.

Of stanza, TorchRL, PyTorch Geometric, captum and PEFT, from the extra `others`: where one is not
installed its tests are left out.
"""

import copy

import pytest
import torch
from helpers import flat
from test_others_code import Tagger, build_both, data
from torch import nn
from torch.testing import assert_close

import fastrnn

pytestmark = [pytest.mark.once, pytest.mark.cpu("others' code, on the CPU")]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def assert_alike(build, call, *, steps=3):
    """The same outputs, and the same parameters after some steps, of ours and of torch's."""
    ours, theirs = build_both(build)
    modules = [m for m in ours.modules() if isinstance(m, RECURRENT)]
    assert modules
    assert all(type(m).__module__ == "fastrnn.modules" for m in modules), modules
    recurrent = [p for m in modules for p in m.parameters()]
    before, results = copy.deepcopy(recurrent), []
    for model in ours, theirs:
        torch.manual_seed(1)  # of dropout
        optimizer, outputs = torch.optim.SGD(model.parameters(), 0.1), []
        for _ in range(steps):
            optimizer.zero_grad()
            outputs.append(flat(call(model)))
            sum(t.square().mean() for t in outputs[-1]).backward()
            optimizer.step()
        results.append(outputs)
    assert_close(*results)
    assert not any(torch.equal(a, b) for a, b in zip(recurrent, before, strict=True))
    assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rec_dropout", [0, 0.3])
@pytest.mark.parametrize("name", ["packed", "highway"])
def test_stanza(name, rec_dropout, bidirectional):
    """Its layers of taggers and parsers; with `rec_dropout` they are made of cells."""
    packed_lstm = pytest.importorskip("stanza.models.common.packed_lstm")
    hlstm = pytest.importorskip("stanza.models.common.hlstm")
    kind = packed_lstm.PackedLSTM if name == "packed" else hlstm.HighwayLSTM
    options = {"num_layers": 2, "batch_first": True, "bidirectional": bidirectional, "pad": True}
    x, lengths = torch.randn(3, 7, 5), [7, 4, 2]
    assert_alike(
        lambda: kind(5, 17, dropout=0.2, rec_dropout=rec_dropout, **options),
        lambda model: model(x, lengths),
    )


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchrl(kind, resets):
    """In recurrent mode, where `is_init` says that an episode starts: it splits there and pads."""
    modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    started = torch.zeros(4, 9, 1, dtype=torch.bool)
    if resets:
        started[0, 3] = started[1, 0] = started[2, 5] = started[2, 6] = True
    batch = {"x": torch.randn(4, 9, 5), "is_init": started}
    batch |= {state: torch.randn(4, 9, 2, 17) for state in states}
    names = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}

    def call(model):
        found = model(tensordict.TensorDict(batch, [4, 9]))
        return [found["y"], *(found["next", state] for state in states)]

    assert_alike(
        lambda: getattr(modules, f"{kind}Module")(
            input_size=5, hidden_size=17, num_layers=2, default_recurrent_mode=True, **names
        ),
        call,
    )


@pytest.mark.parametrize("name", ["LSTMAggregation", "GRUAggregation", "JumpingKnowledge"])
def test_torch_geometric(name):
    """Nodes are aggregated as sequences, of a graph or of a network's layers."""
    geometric = pytest.importorskip("torch_geometric.nn")
    nodes = torch.randn(10, 6)
    graph = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 4])
    if name == "JumpingKnowledge":
        assert_alike(
            lambda: geometric.JumpingKnowledge("lstm", channels=6, num_layers=3),
            lambda model: model([nodes, nodes.sin(), nodes.cos()]),
        )
    else:
        assert_alike(
            lambda: getattr(geometric, name)(6, 17), lambda model: model(nodes, graph, dim_size=5)
        )


class Classifier(nn.Module):
    """A Tagger of an LSTM."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 17, num_layers=2, batch_first=True)
        self.head = nn.Linear(17, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


ATTRIBUTIONS = [
    "IntegratedGradients", "DeepLift", "Saliency", "InputXGradient", "Occlusion",
    "LayerConductance", "LayerActivation", "NeuronGradient",
]  # fmt: skip


@pytest.mark.parametrize("method", ATTRIBUTIONS)
@pytest.mark.parametrize("build", [Classifier, Tagger])
@pytest.mark.filterwarnings("ignore:Setting (forward, backward|backward) hooks:UserWarning")
@pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients:UserWarning")
def test_captum(build, method):
    """It runs interpolated inputs and hooks modules."""
    attr = pytest.importorskip("captum.attr")
    x, y = (t[:6] for t in data())

    def attributed(model):
        kind = getattr(attr, method)
        if method == "Occlusion":
            return kind(model).attribute(x, sliding_window_shapes=(3, 5), target=y)
        if method == "NeuronGradient":
            return kind(model, model.head).attribute(x, neuron_selector=1)
        if method == "LayerActivation":
            # Of an LSTM's results it can't make a list: they hold a tuple.
            return kind(model, model.rnn if build is Tagger else model.head).attribute(x)
        if method == "LayerConductance":
            return kind(model, model.head).attribute(x, n_steps=5, target=y)
        return kind(model).attribute(x, target=y)

    found, expected = (flat(attributed(model)) for model in build_both(build))
    assert all(t.any() for t in found)
    assert_close(found, expected)


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["weight_ih_l0", "weight_hh_l1"]])
@pytest.mark.parametrize("build", [Classifier, Tagger])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_peft(build, names):
    """LoRA on a layer's weights: adapters train, and nothing else; merged they compute the same."""
    peft = pytest.importorskip("peft")
    x, y = data()

    def adapted(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=3, target_modules=[], target_parameters=[f"rnn.{name}" for name in names],
            init_lora_weights=False,
        )  # fmt: skip
        return peft.get_peft_model(model, config)

    models = [adapted(model) for model in build_both(build)]
    layer = next(m for m in models[0].modules() if isinstance(m, RECURRENT))
    assert isinstance(layer, fastrnn.LSTM | fastrnn.GRU)
    frozen = {n: p.clone() for n, p in models[0].named_parameters() if not p.requires_grad}
    results = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad.any() for p in trained)
        with torch.no_grad():
            outputs = model(x)
        results.append([torch.stack(losses).detach(), *trained, outputs])
    assert_close(*results)
    for name, value in models[0].named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name])
    with torch.no_grad():
        assert_close(models[0].merge_and_unload()(x), results[0][-1])
