"""`return_states=True`: the states of all steps, against a loop over the steps."""

import copy
import itertools

import pytest
import torch
from helpers import FULL, LAYERS, LOW, flat, leaves, no_transforms, pair, ragged, random_state
from own_cells import coupled_lstm
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch_features import skip_without_sizes_from_tensors

import fastrnn
from fastrnn.cells import slstm

T, B, I, H = 5, 3, 4, 17
BOTH = [False, True]


def states_of(layer):
    return flat(random_state(layer, B))


def by_steps(layer, x, hx):
    """All states [T, B, D*H] besides h of a layer of one direction and layer."""
    steps, found = [], []
    for step in x.split(1):
        output, hx = layer(step, hx)
        steps.append(output)
        found.append(flat(hx)[1:])
    return torch.cat(steps), [torch.cat(s) for s in zip(*found, strict=True)]


def one_direction(layer, direction):
    """The layer of the second layer's parameters in one direction."""
    name, kw = type(layer), {"proj_size": layer.proj_size} if layer.proj_size else {}
    dtype = next(layer.parameters()).dtype
    one = name(2 * (layer.proj_size or H), H, dtype=dtype, **kw)
    suffix = "_l1_reverse" if direction else "_l1"
    for parameter, value in one.named_parameters():
        value.data = getattr(layer, parameter.replace("_l0", suffix)).data
    return one


@pytest.mark.parametrize("recompute", BOTH, ids=["keep", "recompute"])
@pytest.mark.parametrize("dtype", [*FULL, *LOW], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj"])
def test_values(kind, dtype, recompute):
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True, dtype=dtype)
    layer.recompute = recompute
    x, hx = torch.randn(T, B, I, dtype=dtype), tuple(states_of(layer))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output, last, (c,) = layer(x, hx, return_states=True)
            plain, ends = layer(x, hx)
        assert torch.equal(output, plain)
        assert all(torch.equal(a, b) for a, b in zip(last, ends, strict=True))
        first, _ = pair(kind, I, H, bidirectional=True, dtype=dtype)
        first.load_state_dict({k: v for k, v in layer.state_dict().items() if "_l0" in k})
        with torch.no_grad():
            below, _ = first(x, tuple(state[:2] for state in hx))
            for d in range(2):
                given = below.flip(0) if d else below  # in the order of the direction
                states = tuple(state[2 + d : 3 + d] for state in hx)
                one = one_direction(layer, d)
                # Not by single steps, which round c.
                expected = torch.cat([one(given[: t + 1], states)[1][1] for t in range(T)])
                part = c[..., d * H : (d + 1) * H]
                torch.testing.assert_close(part.flip(0) if d else part, expected)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj"])
@pytest.mark.parametrize("batch_first", BOTH, ids=["steps", "batch"])
@pytest.mark.parametrize("recompute", BOTH, ids=["keep", "recompute"])
def test_gradients_of_all_states(kind, batch_first, recompute):
    layer, _ = pair(kind, I, H, dtype=torch.float64, batch_first=batch_first)
    layer.recompute = recompute
    x, *states = leaves([torch.randn(T, B, I, dtype=torch.float64), *states_of(layer)])
    given = x.transpose(0, 1) if batch_first else x
    output, last, (c,) = layer(given, tuple(states), return_states=True)
    plain = copy.deepcopy(layer)
    plain.batch_first = False
    expected, (all_c,) = by_steps(plain, x, tuple(states))
    weight = torch.linspace(1, 2, all_c.numel(), dtype=c.dtype).view_as(all_c)
    mine = c.transpose(0, 1) if batch_first else c
    # Of c alone, and of all results together.
    for of_output in (0, 1):
        losses = [
            (mine * weight).sum() + of_output * (output.square().sum() + last[1].sum()),
            (all_c * weight).sum() + of_output * (expected.square().sum() + all_c[-1].sum()),
        ]
        grads = [
            torch.autograd.grad(loss, [x, *states, *of.parameters()], retain_graph=True)
            for loss, of in zip(losses, (layer, plain), strict=True)
        ]
        torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_unbatched_and_without_further_states(kind):
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
    packed = ragged([5, 1, 3], I)
    output, last, states = layer(packed, return_states=True)
    plain, ends = layer(packed)
    assert torch.equal(output.data, plain.data)
    assert all(torch.equal(a, b) for a, b in zip(flat(last), flat(ends), strict=True))
    x, lengths = pad_packed_sequence(packed)
    assert len(states) == kind.startswith("lstm")
    for c in states:
        assert isinstance(c, PackedSequence)
        (padded,) = layer(x, lengths=lengths, return_states=True)[2]
        assert torch.equal(pad_packed_sequence(c)[0], padded)
    one, _, some = layer(x[:, 0], return_states=True)
    assert torch.equal(one, layer(x[:, 0])[0])
    assert all(c.shape == (T, 2 * H) for c in some)


@pytest.mark.parametrize("cut", ["resets", "lengths", "both"])
def test_resets_and_lengths(cut):
    """The states of each row are those of its parts."""
    layer, _ = pair("lstm", I, H)
    x = torch.randn(T, B, I)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 1] = True
    lengths = torch.tensor([T, 4, 2], device="cpu")
    given = {"resets": resets, "lengths": lengths}
    given = given if cut == "both" else {cut: given[cut]}
    _, _, (c,) = layer(x, return_states=True, **given)
    ends = lengths if "lengths" in given else [T] * B
    for b, end in enumerate(int(n) for n in ends):
        bounds = [0, 2, end] if b == 1 and "resets" in given else [0, end]
        for first, last in itertools.pairwise(bounds):
            (part,) = layer(x[first:last, b : b + 1], return_states=True)[2]
            torch.testing.assert_close(c[first:last, b : b + 1], part)
        assert not c[end:, b].any()


@pytest.mark.cpu("cells of several states have kernels on the CPU")
@pytest.mark.parametrize("compiled", BOTH, ids=["definition", "kernels"])
@pytest.mark.parametrize(("cell", "heads"), [(coupled_lstm, 1), (slstm, 1), (slstm, 2)])
def test_cells_of_ones_own(cell, heads, compiled):
    cell = getattr(cell, "cell", cell)
    if compiled:
        cell.build([torch.float64])
    options = {"heads": heads} if heads > 1 else {}
    layer = cell.layer(I, 16, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    output, last, states = layer(x, return_states=True)
    torch.testing.assert_close((output, last), layer(x))
    assert len(states) == len(last) - 1
    for state, end in zip(states, last[1:], strict=True):
        torch.testing.assert_close(state[-1, :, :16], end[0])
        torch.testing.assert_close(state[0, :, 16:], end[1])


def test_results_can_be_changed_in_place():
    """As those of torch's layers: the saved values are the layer's own."""
    layer, _ = pair("lstm", I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    grads = []
    for change in BOTH:
        output, _, (c,) = layer(x, return_states=True)
        loss = output.sum() + c.sum()
        if change:
            with torch.no_grad():
                output.zero_(), c.zero_()
        grads.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*grads)
    output, _, (c,) = layer(x, return_states=True)
    torch.relu_(output)
    c.mul_(2)
    expected, _, (plain,) = layer(x, return_states=True)
    torch.testing.assert_close((output, c), (expected.relu(), 2 * plain))


@pytest.mark.once
@no_transforms
def test_higher_derivatives_and_vmap():
    layer, _ = pair("lstm", 2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        output, _, (c,) = layer(x, return_states=True)
        return output, c

    assert torch.autograd.gradgradcheck(function, x)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    xs = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    found = torch.vmap(function)(xs)
    expected = [torch.stack(each) for each in zip(*map(function, xs), strict=True)]
    torch.testing.assert_close(list(found), expected)


@pytest.mark.once
def test_compiled_with_batch_first():
    layer = fastrnn.LSTM(I, H, batch_first=True)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(B, T, I)
    found, expected = (call(x, return_states=True) for call in (compiled, layer))
    torch.testing.assert_close(found, expected)


@pytest.mark.once
@pytest.mark.parametrize("resets", BOTH)
def test_compiled_exported_and_traced(resets):
    skip_without_sizes_from_tensors()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.LSTM(I, H)

        def forward(self, x, cut):
            output, _, (c,) = self.layer(x, resets=cut if resets else None, return_states=True)
            return output, c

    model, x = Model(), torch.randn(T, B, I)
    cut = torch.rand(T, B) < 0.3
    expected = model(x, cut)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x, cut), expected)
    for strict in BOTH:
        program = torch.export.export(model, (x, cut), strict=strict)
        torch.testing.assert_close(program.module()(x, cut), expected)
    graph = fx.symbolic_trace(model)
    assert "layer" in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x, cut), expected)


@pytest.mark.once
def test_autocast_checkpoint_and_accelerated_layers():
    layer = fastrnn.accelerate(nn.LSTM(I, H), keep_types=True)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        output, _, (c,) = layer(x, return_states=True)
    assert (output.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16)
    call = lambda x: layer(x, return_states=True)[2][0].sum()  # noqa: E731
    saved = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (saved, call(x))]
    torch.testing.assert_close(*grads)


@pytest.mark.once
def test_errors():
    x = torch.randn(B, I)
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_states'"):
        fastrnn.LSTMCell(I, H)(x, return_states=True)
    layer = fastrnn.LSTM(I, H)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        layer(torch.randn(T, B, I + 1), return_states=True)
    with pytest.raises(
        NotImplementedError, match=r"return_states: .*no kernels of torch\.complex64"
    ):
        layer.to(torch.complex64)(torch.randn(T, B, I, dtype=torch.complex64), return_states=True)
