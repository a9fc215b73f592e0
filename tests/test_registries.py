"""Torch's tools that have a registry of operators: they know ours.

The numbers of operations are those of the reference in plain PyTorch, each sequence by itself,
whose products FlopCounterMode counts one by one.
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

# What is tested here comes before any kernel.
pytestmark = pytest.mark.once

BOTH = [False, True]
I, H, T = 5, 7, 4
LENGTHS = [4, 2, 4, 1]


def operations(run):
    """What FlopCounterMode counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def sequences(x):
    """Those of a batch, [T, 1, I] each."""
    if not isinstance(x, PackedSequence):
        return [x[:, [b]] for b in range(x.size(1))]
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(x)
    return [padded[:length, [b]] for b, length in enumerate(lengths)]


def by_definition(kind, layer, x, state):
    """Those of forward and of backward, by the reference, of each sequence alone."""
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

        forward += operations(run)
        found = [t for t in found if t is not None]
        if found[0].requires_grad:
            backward += operations(lambda found=found: sum(t.sum() for t in found).backward())
    return forward, backward


def counted(layer, x, state):
    found = []
    forward = operations(lambda: found.extend(flat(layer(x, state))))
    if not found[0].requires_grad:
        return forward, 0
    return forward, operations(lambda: sum(t.sum() for t in found).backward())


def want(layer, x, state, wanted):
    """Has gradients of these alone: parameters by a part of their names, `x`, `h0` and `c0`."""
    for name, p in layer.named_parameters():
        p.requires_grad_(any(part in name for part in wanted))
    flat(x)[0].requires_grad_("x" in wanted)
    for name, t in zip(["h0", "c0"], flat(state), strict=False):
        t.requires_grad_(name in wanted)


WANTED = {
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

# Those for which every direction has a backward pass, and its forward again with recompute=True.
REACHES_ALL = ["all", "parameters", "input", "h0", "weight_ih", "weight_hh"]


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_operations(kind, packed, wanted):
    for layers, bidirectional, bias in itertools.product([1, 2], BOTH, BOTH):
        layer, _ = pair(kind, I, H, num_layers=layers, bidirectional=bidirectional, bias=bias)
        x = ragged(LENGTHS, I) if packed else torch.randn(T, len(LENGTHS), I)
        state = random_state(layer, len(LENGTHS))
        want(layer, x, state, WANTED[wanted])
        forward, backward = by_definition(kind, layer, x, state)
        assert counted(layer, x, state) == (forward, backward)
        layer.recompute = True
        again = forward if wanted in REACHES_ALL else 0
        if again or not backward:
            assert counted(layer, x, state) == (forward, backward + again)


@pytest.mark.parametrize("kind", CELLS)
def test_operations_of_cells(kind):
    for bias in BOTH:
        cell, theirs = cell_pair(kind, I, H, bias=bias)
        x, state = torch.randn(3, I), cell_state(cell, 3)
        assert counted(cell, x, state) == counted(theirs, x, state)


def test_operations_of_a_layer():
    """The number that the definition gives by hand: 2 T B G H (I + H)."""
    layer = fastrnn.GRU(16, 32)
    assert operations(lambda: layer(torch.ones(10, 4, 16))) == 2 * 10 * 4 * 3 * 32 * (16 + 32)


def test_operations_of_models():
    """As many times those of one."""
    layers = [fastrnn.LSTM(I, H, num_layers=2, proj_size=3, bidirectional=True) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.randn(T, 2, I)

    def loss(p):
        return sum(t.sum() for t in flat(torch.func.functional_call(layers[0], p, (x,))))

    def gradients(p):
        return torch.func.grad(loss)(p)

    one = {name: p.detach() for name, p in layers[0].named_parameters()}
    for function in [loss, gradients]:
        expected = operations(lambda function=function: function(one))
        found = operations(lambda function=function: torch.vmap(function)(parameters))
        assert found == 3 * expected > 0


def test_operations_of_tensors_without_values():
    with torch.device("meta"):
        layer = fastrnn.LSTM(I, H, num_layers=2)
        x = torch.randn(T, 2, I)
    assert counted(layer, x, None) == counted(
        layer.to_empty(device="cpu"), torch.randn(T, 2, I), None
    )


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_partitioner_keeps_what_forward_computed(name):
    """That of torch.compile recomputes what is cheap in backward, and the operator is not."""
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
    assert "aten.sin.default" in found["backward"]  # recomputed, for the cosine of it
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
