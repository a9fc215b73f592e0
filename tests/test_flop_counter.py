"""torch's tools with a registry of operators know fastrnn's operators.

FLOPs are compared with those of fastrnn.reference, run for each sequence alone: FlopCounterMode
counts each matrix product of it.
"""

import itertools
import subprocess
import sys

import pytest
import torch
from helpers import CELLS, LAYERS, cell_pair, cell_state, flat, pair, ragged, random_state
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import reference

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once

BOTH = [False, True]
I, H, T = 5, 7, 4
LENGTHS = [4, 2, 4, 1]


def flops(run):
    """The FLOPs that FlopCounterMode counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def sequences(x):
    """The sequences of a batch, each [T, 1, I]."""
    if not isinstance(x, PackedSequence):
        return [x[:, [b]] for b in range(x.size(1))]
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(x)
    return [padded[:length, [b]] for b, length in enumerate(lengths)]


def flops_of_reference(kind, layer, x, state):
    """FLOPs of forward and of backward in fastrnn.reference, summed over single sequences."""
    forward = backward = 0
    for b, sequence in enumerate(sequences(x)):
        own = [t[:, [b]].detach().requires_grad_(t.requires_grad) for t in flat(state)]
        sequence = sequence.detach().requires_grad_(flat(x)[0].requires_grad)
        found = []

        def run(own=own, sequence=sequence, found=found):
            found.extend(
                reference.run(
                    kind.removesuffix("_proj"), sequence, own[0], own[1] if own[1:] else None,
                    layer._flat_weights, has_biases=layer.bias, num_layers=layer.num_layers,
                    bidirectional=layer.bidirectional,
                )
            )  # fmt: skip

        forward += flops(run)
        found = [t for t in found if t is not None]
        if found[0].requires_grad:
            backward += flops(lambda found=found: sum(t.sum() for t in found).backward())
    return forward, backward


def flops_of(layer, x, state):
    found = []
    forward = flops(lambda: found.extend(flat(layer(x, state))))
    if not found[0].requires_grad:
        return forward, 0
    return forward, flops(lambda: sum(t.sum() for t in found).backward())


def set_requires_grad(layer, x, state, names):
    """Only these require grad: parameters by a part of their names, and `x`, `h0`, `c0`."""
    for name, p in layer.named_parameters():
        p.requires_grad_(any(part in name for part in names))
    flat(x)[0].requires_grad_("x" in names)
    for name, t in zip(["h0", "c0"], flat(state), strict=False):
        t.requires_grad_(name in names)


REQUIRES_GRAD = {
    "nothing": [],
    "all": ["weight", "bias", "x", "h0", "c0"],
    "parameters": ["weight", "bias"],
    "input": ["x"],
    "h0": ["h0"],
    "c0": ["c0"],
    "weight_ih": ["weight_ih"],
    "weight_hh": ["weight_hh"],
    "weight_hr": ["weight_hr"],
    "bias": ["bias"],
    "first layer": ["_l0"],
    "last layer": ["_l1"],
    "reverse": ["_l0_reverse", "_l1_reverse"],
}

# Subsets whose backward visits every layer and direction; recompute=True adds one forward then.
REACHES_ALL = ["all", "parameters", "input", "h0", "weight_ih", "weight_hh"]


@pytest.mark.parametrize("subset", REQUIRES_GRAD)
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_flops(kind, packed, subset):
    # What requires a gradient in a layer of one layer, or of one direction, is a part of this.
    richest = [(2, True, True)]
    shapes = itertools.product([1, 2], BOTH, BOTH) if subset == "all" else richest
    for layers, bidirectional, bias in shapes:
        layer, _ = pair(kind, I, H, num_layers=layers, bidirectional=bidirectional, bias=bias)
        x = ragged(LENGTHS, I) if packed else torch.randn(T, len(LENGTHS), I)
        state = random_state(layer, len(LENGTHS))
        set_requires_grad(layer, x, state, REQUIRES_GRAD[subset])
        forward, backward = flops_of_reference(kind, layer, x, state)
        assert flops_of(layer, x, state) == (forward, backward)
        layer.recompute = True
        again = forward if subset in REACHES_ALL else 0
        if again or not backward:
            assert flops_of(layer, x, state) == (forward, backward + again)


@pytest.mark.parametrize("kind", CELLS)
def test_flops_of_cells(kind):
    for bias in BOTH:
        cell, theirs = cell_pair(kind, I, H, bias=bias)
        x, state = torch.randn(3, I), cell_state(cell, 3)
        assert flops_of(cell, x, state) == flops_of(theirs, x, state)


def test_flops_of_a_layer():
    """The closed form: 2 T B G H (I + H)."""
    layer = fastrnn.GRU(16, 32)
    assert flops(lambda: layer(torch.ones(10, 4, 16))) == 2 * 10 * 4 * 3 * 32 * (16 + 32)


def test_flops_of_stacked_models():
    """vmap over three models counts three times the FLOPs of one."""
    layers = [fastrnn.LSTM(I, H, num_layers=2, proj_size=3, bidirectional=True) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.randn(T, 2, I)

    def loss(p):
        return sum(t.sum() for t in flat(torch.func.functional_call(layers[0], p, (x,))))

    def gradients(p):
        return torch.func.grad(loss)(p)

    one = {name: p.detach() for name, p in layers[0].named_parameters()}
    for function in [loss, gradients]:
        expected = flops(lambda function=function: function(one))
        found = flops(lambda function=function: torch.vmap(function)(parameters))
        assert found == 3 * expected > 0


def test_flops_on_meta():
    with torch.device("meta"):
        layer = fastrnn.LSTM(I, H, num_layers=2)
        x = torch.randn(T, 2, I)
    real = torch.randn(T, 2, I)
    assert flops_of(layer, x, None) == flops_of(layer.to_empty(device=real.device), real, None)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_partitioner_saves_the_operators_results(name):
    """torch.compile's partitioner recomputes cheap operations in backward, not this operator."""
    found = {}

    def compiler(which):
        def compile(graph_module, _):
            found[which] = [str(n.target) for n in graph_module.graph.nodes]
            return make_boxed_func(graph_module.forward)

        return compile

    backend = aot_autograd(
        fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    layer = getattr(fastrnn, name)(I, H, num_layers=2)
    call = torch.compile(lambda x: layer(x)[0].sin().cos(), backend=backend, fullgraph=True)
    call(torch.randn(T, 2, I, requires_grad=True)).sum().backward()
    assert "aten.sin.default" in found["backward"]  # recomputed for the gradient of cos
    assert "fastrnn.forward.default" in found["forward"]
    assert "fastrnn.forward.default" not in found["backward"]


def test_importing_fastrnn_imports_no_registry():
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import fastrnn
        new = [m for m in sys.modules if m not in before and m.startswith("torch.")]
        print([m for m in new if m.split(".")[1] in ("distributed", "utils", "_dynamo")])
        from torch.utils.flop_counter import flop_registry as known
        print([op in known for op in (torch.ops.fastrnn.forward, torch.ops.fastrnn.backward)])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[True, True]"]
