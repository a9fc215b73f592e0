"""`resets=` and `lengths=`: each part of a row between two resets is computed by itself."""

import copy
import itertools

import pytest
import torch
from helpers import FULL, LAYERS, LOW, flat, host_tensor, leaves, no_transforms, pair, random_state
from own_cells import coupled_lstm, mgu
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch_features import skip_without_sizes_from_tensors

import fastrnn
from fastrnn.cells import slstm

pytestmark = pytest.mark.usefixtures("step_by_step")
T, B, I, H = 7, 4, 5, 17
F64 = torch.float64
BOTH = [False, True]
RESETS = torch.zeros(T, B, dtype=torch.bool, device="cpu")
# None, the first step and another, several, every step.
for step, row in [(0, 1), (3, 1), (1, 2), (2, 2), (6, 2), *((t, 3) for t in range(T))]:
    RESETS[step, row] = True
LENGTHS = torch.tensor([3, 7, 1, 6], device="cpu")
CUTS = {
    "resets": {"resets": RESETS},
    "lengths": {"lengths": LENGTHS},
    "both": {"resets": RESETS, "lengths": LENGTHS},
}
cuts = pytest.mark.parametrize("cut", CUTS)


def of_directions(layer, forward, reverse):
    """States [L*D, ...] with those of each direction."""
    return torch.stack([forward, reverse], 1).flatten(0, 1) if layer.bidirectional else forward


def part(layer, state, row, first, last, initial):
    """A state of one row, of a segment that is the first or the last of its row, or neither."""
    D = 2 if layer.bidirectional else 1
    mine = state[:, row : row + 1]
    other = torch.full_like(mine, initial)
    ends = [mine if entered else other for entered in (first, last)]
    return of_directions(layer, ends[0][::D], ends[1][D - 1 :: D])


def by_segments(layer, x, states, resets=None, lengths=None, initial=(0.0, 0.0, 0.0, 0.0)):
    """Output [T, B, *] and last states, one segment after the other, of x [T, B, I]."""
    D = 2 if layer.bidirectional else 1
    output, last = [], []
    for b in range(x.size(1)):
        length = int(lengths[b]) if lengths is not None else len(x)
        at = [t for t in range(1, length) if resets is not None and resets[t, b]]
        bounds = [0, *at, length]
        found, ends = [], []
        for begin, end in itertools.pairwise(bounds):
            enters = begin == 0 and not (resets is not None and resets[0, b])
            given = [
                part(layer, s, b, enters, end == length, value)
                for s, value in zip(states, initial, strict=False)
            ]
            rows, hx = layer(x[begin:end, b : b + 1], given[0] if len(given) == 1 else tuple(given))
            found.append(rows)
            ends.append(flat(hx))
        padding = found[0].new_zeros(len(x) - length, 1, found[0].size(-1))
        output.append(torch.cat([*found, padding]))
        last.append(
            [
                of_directions(layer, forward[::D], reverse[D - 1 :: D])
                for forward, reverse in zip(ends[-1], ends[0], strict=True)
            ]
        )
    return torch.cat(output, 1), [torch.cat(s, 1) for s in zip(*last, strict=True)]


def states_of(layer):
    return flat(random_state(layer, B))


def hx_of(states):
    return states[0] if len(states) == 1 else tuple(states)


def values_and_gradients(call, layer, tensors):
    output, states = call()
    results = [output, *flat(states)]
    torch.manual_seed(1)
    loss = sum((torch.randn(t.shape, dtype=t.dtype) * t).sum() for t in results)
    inputs = [*tensors, *layer.parameters()]
    return results, torch.autograd.grad(loss, inputs)


def compare(layer, cut, **options):
    initial = options.pop("initial", (0.0, 0.0, 0.0, 0.0))
    dtype = next(layer.parameters()).dtype
    x, *states = leaves([torch.randn(T, B, I, dtype=dtype), *options.pop("states")])
    mine = {k: v.T if k == "resets" and layer.batch_first else v for k, v in cut.items()}
    given = x.transpose(0, 1) if layer.batch_first else x

    def ours():
        output, last = layer(given, hx_of(states), **mine)
        return (output.transpose(0, 1) if layer.batch_first else output), last

    plain = copy.deepcopy(layer)
    plain.batch_first = False
    found = values_and_gradients(ours, layer, [x, *states])
    expected = values_and_gradients(
        lambda: by_segments(plain, x, states, **cut, initial=initial), plain, [x, *states]
    )
    torch.testing.assert_close(found, expected)


@cuts
@pytest.mark.parametrize("batch_first", BOTH, ids=["steps", "batch"])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, dtype, layers, bidirectional, batch_first, cut):
    layer, _ = pair(
        kind, I, H, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first,
        dtype=dtype,
    )  # fmt: skip
    compare(layer, CUTS[cut], states=states_of(layer))


@cuts
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_without_states_biases_and_gradients(kind, dtype, cut):
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True, bias=False, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    zeros = [torch.zeros_like(s) for s in states_of(layer)]
    with torch.no_grad():
        output, last = layer(x, **CUTS[cut])
        expected = by_segments(layer, x, zeros, **CUTS[cut])
    torch.testing.assert_close([output, *flat(last)], [expected[0], *expected[1]])


@pytest.mark.cpu("own cells of four states have kernels on the CPU")
@cuts
@pytest.mark.parametrize("recompute", BOTH)
def test_cells_of_ones_own(cut, recompute):
    for definition, options in [(mgu, {}), (coupled_lstm, {}), (slstm, {"heads": 2})]:
        layer = definition.layer(
            I, 18, 2, bidirectional=True, dtype=F64, recompute=recompute, **options
        )  # fmt: skip
        states = [torch.randn(4, B, 18, dtype=F64) for _ in definition.states]
        compare(layer, CUTS[cut], states=states, initial=definition.initial)


@pytest.mark.cpu("own cells with initial values have kernels on the CPU")
def test_a_reset_begins_with_initial():
    @fastrnn.cell(gates=("a",), initial={"c": 2.0})
    def accumulating(x, r, h, c):
        c = c + torch.tanh(x.a + r.a)
        return torch.tanh(c), c

    layer = accumulating.layer(I, H, dtype=F64)
    states = [torch.randn(1, B, H, dtype=F64) for _ in "hc"]
    compare(layer, CUTS["both"], states=states, initial=(0.0, 2.0))
    full = [torch.zeros(1, B, H, dtype=F64), torch.full((1, B, H), 2.0, dtype=F64)]
    x = torch.randn(T, B, I, dtype=F64)
    found, expected = layer(x, resets=RESETS)[0], layer(x, tuple(full), resets=RESETS)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_are_those_of_packed_data(kind):
    """In any order, and the same bits."""
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
    x, states = torch.randn(T, B, I), hx_of(states_of(layer))
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    expected, last = layer(packed, states)
    expected, _ = pad_packed_sequence(expected, total_length=T)
    found = layer(x, states, lengths=LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat((expected, last)), strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_input(kind):
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
    x, states = torch.randn(T, B, I), hx_of(states_of(layer))
    expected, last = layer(x, states, resets=RESETS, lengths=LENGTHS)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    resets = pack_padded_sequence(RESETS.to(x.device), LENGTHS, enforce_sorted=False)
    output, found = layer(packed, states, resets=resets)
    torch.testing.assert_close(pad_packed_sequence(output, total_length=T)[0], expected)
    torch.testing.assert_close(found, last)


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_input(kind):
    layer, _ = pair(kind, I, H, batch_first=True)
    x, states = torch.randn(T, B, I), hx_of(states_of(layer))
    expected, last = layer(x.transpose(0, 1), states, resets=RESETS.T)
    one = hx_of([s[:, 2] for s in flat(states)])
    output, found = layer(x[:, 2], one, resets=RESETS[:, 2])
    torch.testing.assert_close(output, expected[2])
    torch.testing.assert_close(flat(found), [s[:, 2] for s in flat(last)])
    cut = layer(x[:, 2], one, lengths=torch.tensor([3]))[0]
    torch.testing.assert_close(cut[:3], layer(x[:3, 2], one)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_no_gradient_crosses_a_reset(kind):
    layer, _ = pair(kind, I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, requires_grad=True)
    output, _ = layer(x, resets=RESETS)
    (grad,) = torch.autograd.grad(output[:3, 1].sum(), x)
    assert grad[:3, 1].all()
    assert not grad[3:].any()
    assert not grad[:, [0, 2, 3]].any()


def test_no_reset_and_full_lengths_change_no_bits():
    layer, _ = pair("lstm", I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    nothing = {"resets": torch.zeros(T, B, dtype=torch.bool), "lengths": torch.full((B,), T)}
    assert all(
        torch.equal(a, b) for a, b in zip(flat(layer(x, **nothing)), flat(layer(x)), strict=True)
    )


def test_a_row_has_the_same_bits_with_any_others():
    layer, _ = pair("gru", I, H)
    x = torch.randn(T, B, I)
    output, h_n = layer(x, resets=RESETS)
    alone, h = layer(x[:, 2:3].contiguous(), resets=RESETS[:, 2:3])
    assert torch.equal(output[:, 2:3], alone)
    assert torch.equal(h_n[:, 2:3], h)


def test_an_empty_batch():
    layer, _ = pair("lstm", I, H)
    output, (h, _) = layer(torch.ones(T, 0, I), lengths=torch.ones(0, dtype=torch.int64))
    assert output.shape == (T, 0, H)
    assert h.shape == (1, 0, H)
    with pytest.raises(ValueError, match=r"resets: expected .*size \[7, 0\]"):
        layer(torch.ones(T, 0, I), resets=RESETS)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        layer(torch.ones(0, B, I), lengths=LENGTHS)


def test_dropout_and_training():
    layer, _ = pair("lstm", I, H, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I)
    torch.manual_seed(3)
    first = layer(x, resets=RESETS)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x, resets=RESETS)[0], first)
    assert not torch.equal(layer(x, resets=RESETS)[0], first)


@pytest.mark.once
@no_transforms
def test_second_derivatives_and_forward_mode():
    layer, _ = pair("gru", 2, 3, dtype=F64)
    x = torch.randn(T, B, 2, dtype=F64, requires_grad=True)
    for cut in CUTS.values():
        function = lambda x, cut=cut: layer(x, **cut)[0]  # noqa: E731
        assert torch.autograd.gradgradcheck(function, x)
        assert torch.autograd.gradcheck(function, x, check_forward_ad=True)


@pytest.mark.once
def test_vmap_over_inputs():
    layer, _ = pair("lstm", I, H)
    x = torch.randn(3, T, B, I)
    found = torch.vmap(lambda x: layer(x, resets=RESETS)[0])(x)
    torch.testing.assert_close(found, torch.stack([layer(each, resets=RESETS)[0] for each in x]))


@pytest.mark.once
@no_transforms
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_vmap_over_resets_and_lengths(kind):
    layer, _ = pair(kind, I, H, bidirectional=True)
    x = torch.randn(3, T, B, I)
    device = x.device
    given = {
        "resets": torch.stack([RESETS, RESETS.flip(1), ~RESETS]).to(device),
        "lengths": torch.stack([LENGTHS, LENGTHS.flip(0), LENGTHS.roll(1)]).to(device),
    }
    for names in (["resets"], ["lengths"], ["resets", "lengths"]):

        def one(x, *cut, names=names):
            return layer(x, **dict(zip(names, cut, strict=True)))[0]

        cut = [given[name] for name in names]
        found = torch.vmap(one)(x, *cut)
        torch.testing.assert_close(found, torch.stack([one(*a) for a in zip(x, *cut, strict=True)]))


@pytest.mark.once
@pytest.mark.cpu("the compiler's sizes")
def test_compiled_once_for_all_sizes():
    skip_without_sizes_from_tensors()
    layer, _ = pair("gru", I, H)
    compiled = torch.compile(
        lambda x, n: layer(x, lengths=n)[0], backend="eager", fullgraph=True, dynamic=True
    )
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for i in range(5):
            x, lengths = torch.randn(5 + i, 3 + i, I), torch.randint(1, 6 + i, (3 + i,))
            torch.testing.assert_close(compiled(x, lengths), layer(x, lengths=lengths)[0])


@pytest.mark.once
@pytest.mark.cpu("torch.jit.trace of tensors on the CPU")
@pytest.mark.parametrize("batch", [1, B])
def test_values_are_not_traced(batch):
    layer = fastrnn.GRU(I, H).requires_grad_(False)
    x, n = torch.randn(T, batch, I), torch.full((batch,), 3)
    resets = torch.zeros(T, batch, dtype=torch.bool)
    for name, first, second in [("lengths", n, n + 2), ("resets", resets, ~resets)]:
        call = lambda x, cut, name=name: layer(x, **{name: cut})[0]  # noqa: E731
        traced = torch.jit.trace(call, (x, first), check_trace=False)
        torch.testing.assert_close(traced(x, second), call(x, second))


@pytest.mark.once
@pytest.mark.parametrize("cut", ["resets", "lengths"])
def test_masks_and_results_can_be_changed_in_place(cut):
    layer, _ = pair("lstm", I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    mine = CUTS[cut][cut].to(x.device, copy=True)
    output, _ = layer(x, **{cut: mine})
    expected = torch.autograd.grad(layer(x, **CUTS[cut])[0].sum(), x)[0]
    mine.fill_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], expected)
    with torch.no_grad():
        layer(x, **CUTS[cut])[0].detach_()


@pytest.mark.once
def test_a_subclass_may_override_the_checks():
    class Refuses(fastrnn.LSTM):
        def check_forward_args(self, *args):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Refuses(I, H)(torch.randn(T, B, I), resets=RESETS)


@pytest.mark.once
@cuts
def test_compiled(cut):
    skip_without_sizes_from_tensors()
    layer, _ = pair("lstm", I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    compiled = torch.compile(lambda x, **cut: layer(x, **cut)[0], backend="aot_eager")
    found, expected = compiled(x, **CUTS[cut]), layer(x, **CUTS[cut])[0]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), x) for y in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.once
def test_traced():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(I, H)

        def forward(self, x, resets):
            return self.layer(x, resets=resets)[0]

    model = Model()
    x = torch.randn(T, B, I)
    graph = fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes if "layer" in str(node.target)] == ["call_module"]
    torch.testing.assert_close(graph(x, RESETS), model(x, RESETS))


@pytest.mark.once
def test_autocast_and_accelerated_layers():
    layer = fastrnn.accelerate(nn.LSTM(I, H), keep_types=True)
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    with torch.autocast(x.device.type, torch.bfloat16):
        found, expected = layer(x, lengths=LENGTHS)[0], layer(packed)[0]
    assert torch.equal(found, pad_packed_sequence(expected, total_length=T)[0])
    ours = fastrnn.LSTM(I, H)
    ours.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, resets=RESETS), ours(x, resets=RESETS))


BAD = {
    "resets of another size": ({"resets": RESETS[1:]}, r"resets: expected .*size \[7, 4\]"),
    "transposed": ({"resets": RESETS.T}, r"resets: expected a bool tensor of size \[7, 4\]"),
    "resets of numbers": ({"resets": RESETS.long()}, "resets: expected a tensor of torch.bool"),
    "a list": ({"resets": RESETS.tolist()}, "resets: expected a tensor of torch.bool, got list"),
    "packed resets": (
        {"resets": pack_padded_sequence(RESETS, LENGTHS, enforce_sorted=False)},
        "resets: expected a tensor of torch.bool, got PackedSequence",
    ),
    "length 0": ({"lengths": host_tensor([1, 0, 1, 1])}, r"expected 1 to 7.*lengths\[1\] = 0"),
    "length above T": ({"lengths": host_tensor([1, 1, 1, 8])}, r"lengths\[3\] = 8"),
    "negative": ({"lengths": host_tensor([1, 1, -(2**62), 1])}, "expected 1 to 7"),
    "lengths of another batch": ({"lengths": LENGTHS[:3]}, r"int64 tensor of size \[4\]"),
    "lengths of two dimensions": ({"lengths": LENGTHS[None]}, r"int64 tensor of size \[4\]"),
    "lengths of int32": ({"lengths": LENGTHS.int()}, "lengths: expected a tensor of torch.int64"),
    "a tuple of lengths": ({"lengths": (1, 2, 3, 4)}, "lengths: expected a tensor of torch.int64"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    cut, message = BAD[name]
    layer, _ = pair("gru", I, H)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(T, B, I), **cut)


@pytest.mark.once
def test_bad_input_of_packed_data():
    layer, _ = pair("gru", I, H)
    x = pack_padded_sequence(torch.randn(T, B, I), LENGTHS, enforce_sorted=False)
    with pytest.raises(ValueError, match="lengths: a PackedSequence has them"):
        layer(x, lengths=LENGTHS)
    others = pack_padded_sequence(RESETS, LENGTHS.flip(0) // 2 + 1, enforce_sorted=False)
    wide = PackedSequence(torch.ones(len(x.data), 2, dtype=torch.bool), x.batch_sizes)
    lengths = LENGTHS.flip(0)
    reordered = pack_padded_sequence(RESETS, lengths, enforce_sorted=False)
    assert torch.equal(reordered.batch_sizes, x.batch_sizes)
    for resets in [RESETS, others, wide, reordered]:
        with pytest.raises(ValueError, match="resets: expected"):
            layer(x, resets=resets)


@pytest.mark.once
def test_bad_input_of_states_and_cells():
    layer, _ = pair("lstm", I, H)
    x = torch.randn(T, B, I)
    h, c = states_of(layer)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        layer(x, (h, c[:, 1:]), resets=RESETS)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        layer(x, (h[..., 1:], c), resets=RESETS)
    for hx in [(h, c, c), h, "hc", (h, None)]:
        with pytest.raises((RuntimeError, TypeError)):
            layer(x, hx, resets=RESETS)
    with pytest.raises(ValueError, match="lengths: expected"):
        layer(x[:, 0], lengths=LENGTHS)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 4D"):
        layer(x[None], resets=RESETS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'resets'"):
        fastrnn.GRUCell(I, H)(x[0], resets=RESETS[0])


@pytest.mark.cpu("an operator of the CPU")
@pytest.mark.once
def test_the_operator_checks_its_arguments():
    call = torch.ops.fastrnn.segments
    for arguments, message in [
        ((None, None, T, B, False), "expected resets or lengths"),
        ((RESETS, None, 0, B, False), "at least one step"),
        ((RESETS, None, 2**62, 2**62, False), "at least one step"),
        ((RESETS, None, 2**40, 1, False), "steps of"),
        ((None, LENGTHS, 2**40, 2**10, False), "lengths: expected"),
        ((RESETS.int(), None, T, B, False), "resets: expected a bool"),
        ((None, LENGTHS.double(), T, B, False), "lengths: expected"),
        ((None, LENGTHS + 5, T, B, False), "lengths: expected 1 to 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    order, inverse, sizes, *_ = call(RESETS, LENGTHS, T, B, False)
    assert sizes.sum() == LENGTHS.sum() == len(order)
    assert torch.equal(inverse[order], torch.arange(len(order)))
    torch.library.opcheck(call, (RESETS, LENGTHS, T, B, False))
