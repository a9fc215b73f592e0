"""The results of fastrnn's layers and cells against torch's, for every option."""

import math
import platform

import pytest
import torch
from helpers import (
    CELLS,
    FULL,
    LAYERS,
    LOW,
    affordable,
    assert_pool_no_worse,
    assert_same,
    cell_pair,
    cell_state,
    flat,
    gradients,
    in_double,
    is_lstm,
    leaves,
    mapped,
    pack,
    pair,
    ragged,
    random_state,
    rng_state,
    some_sizes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional

BOTH = [False, True]


def assert_agree(ours, theirs, *args, strides=True, pool=None):
    """Compares both on the same arguments, with and without grad mode."""
    exact = in_double(theirs, *args) if flat(args)[0].dtype in LOW else None
    for record in BOTH:
        with torch.set_grad_enabled(record):
            assert_same(ours(*args), theirs(*args), exact, strides=strides, pool=pool)


# ---- layers: all combinations of options, and of sizes -------------------------------------------


@pytest.mark.parametrize("with_state", BOTH, ids=["zeros", "states"])
@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("batch_first", BOTH, ids=["TBI", "BTI"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_options(kind, bias, bidirectional, layers, batch_first, dtype, with_state, request):
    T, B, I, H = some_sizes(request.node.name)
    if kind == "lstm_proj":
        H += 1  # proj_size must be less than hidden_size
    ours, theirs = pair(
        kind, I, H, bias=bias, bidirectional=bidirectional, num_layers=layers,
        batch_first=batch_first, dtype=dtype,
    )  # fmt: skip
    x = torch.randn(*((B, T, I) if batch_first else (T, B, I)), dtype=dtype)
    assert_agree(ours, theirs, x, random_state(theirs, B) if with_state else None)


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_sizes(kind, dtype):
    for H in [1, 2, 15, 16, 17, 31, 33, 64, 65]:
        for I in [1, 5, 33]:
            ours, theirs = pair(kind, I, H + (kind == "lstm_proj"), dtype=dtype)
            for B in [1, 2, 3, 7, 8, 9, 17]:
                for T in [1, 2, 7] if H < 20 else [3]:
                    args = torch.randn(T, B, I, dtype=dtype), random_state(theirs, B)
                    with torch.no_grad():
                        assert_same(ours(*args), theirs(*args))


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_wide_and_long(kind, dtype):
    """Weights larger than a core's caches, batches of many tiles, many steps of the time loop."""
    for T, B, I, H in affordable(
        [(3, 2, 70, 300), (2, 130, 3, 40), (2, 33, 129, 256), (150, 1, 2, 20)]
    ):
        ours, theirs = pair(kind, I, H, bidirectional=True, dtype=dtype)
        args = torch.randn(T, B, I, dtype=dtype), random_state(theirs, B)
        with torch.no_grad():
            assert_same(ours(*args), theirs(*args))


@pytest.mark.parametrize("with_state", BOTH, ids=["zeros", "states"])
@pytest.mark.parametrize("batch_first", BOTH, ids=["TBI", "BTI"])
@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched(kind, dtype, batch_first, with_state):
    ours, theirs = pair(
        kind, 5, 17, num_layers=2, bidirectional=True, batch_first=batch_first, dtype=dtype
    )
    for T in [1, 6]:
        x = torch.randn(T, 5, dtype=dtype)
        assert_agree(ours, theirs, x, random_state(theirs) if with_state else None)


# ---- strides -------------------------------------------------------------------------------------

#: name -> the same values at other strides
STRIDES = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every_other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "rows_apart": lambda t: t.repeat_interleave(3, 0)[::3],
    "offset": lambda t: torch.cat([t.new_full((1,), 7.0), t.flatten()])[1:].view(t.shape),
    "columns_cut": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", STRIDES)
def test_strides(kind, change):
    at = STRIDES[change]
    for dtype in FULL + LOW:
        ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=dtype)
        x, state = torch.randn(4, 3, 5, dtype=dtype), random_state(theirs, 3)
        moved = at(x)
        assert torch.equal(moved, x)
        assert (moved.stride(), moved.storage_offset()) != (x.stride(), x.storage_offset())
        assert_agree(ours, theirs, moved, mapped(state, at))
        for name, p in list(theirs.named_parameters()):
            other = nn.Parameter(at(p.detach()))
            setattr(theirs, name, other)
            setattr(ours, name, other)
        assert_agree(ours, theirs, x, state)


@pytest.mark.parametrize("kind", LAYERS)
def test_expanded(kind):
    """Strides of 0: one row repeated over the batch, one step over the sequence."""
    ours, theirs = pair(kind, 5, 17, dtype=torch.float64)
    state = mapped(random_state(theirs, 1), lambda t: t.expand(-1, 3, -1))
    x = torch.randn(1, 3, 5, dtype=torch.float64).expand(4, -1, -1)
    assert_agree(ours, theirs, x, state)
    assert_agree(ours, theirs, x[:, :1].expand(-1, 3, -1), state)


# ---- packed sequences ----------------------------------------------------------------------------

LENGTHS = {
    "one": [4],
    "one_step": [1],
    "equal": [3, 3, 3],
    "all_of_one": [1, 1, 1, 1, 1],
    "sorted": [7, 5, 5, 2, 1],
    "unsorted": [2, 7, 1, 5, 5, 1, 6],
    "long_tail": [30, *[1] * 16],
    "stairs": list(range(1, 19)),
}


@pytest.mark.parametrize("with_state", BOTH, ids=["zeros", "states"])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed(kind, lengths, bidirectional, with_state):
    for dtype in FULL + LOW:
        ours, theirs = pair(kind, 5, 17, num_layers=2, bidirectional=bidirectional, dtype=dtype)
        x = ragged(LENGTHS[lengths], 5, dtype)
        state = random_state(theirs, len(LENGTHS[lengths])) if with_state else None
        assert_agree(ours, theirs, x, state)


@pytest.mark.parametrize("batch_first", BOTH, ids=["TBI", "BTI"])
@pytest.mark.parametrize("enforce_sorted", BOTH, ids=["unsorted", "sorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_output_fields(kind, enforce_sorted, batch_first):
    """The fields of the returned PackedSequence, and a round trip through padding."""
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 6, 1, 4]
    ours, theirs = pair(kind, 5, 17, batch_first=batch_first, dtype=torch.float64)
    padded = torch.randn(4, 6, 5, dtype=torch.float64)
    padded = padded if batch_first else padded.transpose(0, 1)
    x = pack_padded_sequence(padded, lengths, batch_first, enforce_sorted)
    (our, our_state), (their, their_state) = ours(x), theirs(x)
    assert type(our) is type(their)
    assert_same([our, our_state], [their, their_state])
    for field in ["batch_sizes", "sorted_indices", "unsorted_indices"]:
        a, b = getattr(our, field), getattr(their, field)
        assert (a is None) == (b is None) == enforce_sorted or field == "batch_sizes"
        assert a is None or torch.equal(a, b)
    unpacked = pad_packed_sequence(our, batch_first)
    assert_same(unpacked[0], pad_packed_sequence(their, batch_first)[0])
    assert unpacked[1].tolist() == lengths


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_equals_single_sequences(kind):
    """Not against torch: a sequence's results do not depend on the rest of the batch."""
    ours, _ = pair(kind, 5, 17, num_layers=2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, 5, dtype=torch.float64) for n in [2, 7, 1, 4]]
    output, state = ours(pack(sequences))
    padded, lengths = pad_packed_sequence(output, batch_first=True)
    for b, x in enumerate(sequences):
        alone, last = ours(x)
        torch.testing.assert_close(padded[b, : lengths[b]], alone)
        for whole, own in zip(flat(state), flat(last), strict=True):
            torch.testing.assert_close(whole[:, b], own)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(
    kind=st.sampled_from(list(LAYERS)),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    input_size=st.integers(1, 20),
    hidden_size=st.integers(2, 40),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    given_state=st.booleans(),
)
def test_any_ragged_batch(
    kind, lengths, input_size, hidden_size, layers, bias, bidirectional, given_state
):
    ours, theirs = pair(
        kind, input_size, hidden_size, num_layers=layers, bias=bias, bidirectional=bidirectional,
        dtype=torch.float64,
    )  # fmt: skip
    x = leaves(ragged(lengths, input_size, torch.float64))
    state = leaves(random_state(theirs, len(lengths))) if given_state else None
    our, their = ours(x, state), theirs(x, state)
    assert_same(our, their)
    inputs = [x.data, *flat(state)]
    torch.testing.assert_close(
        gradients(our, inputs + list(ours.parameters())),
        gradients(their, inputs + list(theirs.parameters())),
    )


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_masks_are_torchs(kind, bidirectional, p, packed):
    for dtype in FULL + LOW:
        ours, theirs = pair(
            kind, 5, 17, num_layers=3, dropout=p, bidirectional=bidirectional, dtype=dtype
        )
        x = ragged([3, 7, 1], 5, dtype) if packed else torch.randn(7, 3, 5, dtype=dtype)
        torch.manual_seed(11)
        exact = in_double(theirs, x)
        for record in BOTH:
            results, afterwards = [], []
            for layer in [ours, theirs]:
                torch.manual_seed(11)
                with torch.set_grad_enabled(record):
                    results.append(layer(x))
                afterwards.append(rng_state())
            assert_same(*results, exact)
            # The generator is left in the same state, too.
            assert torch.equal(*afterwards)
        ours.eval()
        assert not torch.equal(flat(ours(x))[0], flat(results[0])[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dropout_in_eval_mode_or_after_the_last_layer(kind):
    for options in [{"num_layers": 2, "dropout": 0.5}, {"num_layers": 1, "dropout": 0.5}]:
        ours, theirs = pair(kind, 5, 17, **options)
        if options["num_layers"] > 1:
            ours.eval()
            theirs.eval()
        x = torch.randn(4, 3, 5)
        before = rng_state()
        result = ours(x)
        assert torch.equal(before, rng_state())
        assert_same(result, theirs(x))


# ---- empty ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", BOTH, ids=["zeros", "states"])
@pytest.mark.parametrize("batch_first", BOTH, ids=["TBI", "BTI"])
@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch(kind, batch_first, with_state):
    for dtype in FULL + LOW:
        ours, theirs = pair(
            kind, 5, 17, num_layers=2, bidirectional=True, dropout=0.5, batch_first=batch_first,
            dtype=dtype,
        )  # fmt: skip
        x = torch.randn(*((0, 4, 5) if batch_first else (4, 0, 5)), dtype=dtype)
        state = random_state(theirs, 0) if with_state else None
        assert_agree(ours, theirs, x, state)
        x = leaves(x)
        inputs = [x, *ours.parameters()]
        found = gradients(ours(x, state), inputs)
        assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in inputs]
        assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("batch_first", BOTH, ids=["TBI", "BTI"])
@pytest.mark.parametrize("kind", LAYERS)
def test_empty_sequence(kind, batch_first, batch):
    for record in BOTH:
        layers = pair(kind, 5, 17, batch_first=batch_first)
        x = torch.randn(*((batch, 0, 5) if batch_first else (0, batch, 5)))
        errors = []
        for layer in layers:
            with torch.set_grad_enabled(record), pytest.raises(Exception) as caught:
                layer(x)
            errors.append(caught.value)
        ours, theirs = errors
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)


# ---- NaN, infinity, saturation -------------------------------------------------------------------


def assert_same_nonfinite(ours, theirs):
    """NaN, inf and -inf in the same places, and the same finite numbers elsewhere."""
    for our, their in zip(flat(ours), flat(theirs), strict=True):
        if our.dtype in LOW:  # other tests compare the finite numbers, against float64
            assert torch.equal(our.isnan(), their.isnan())
        else:
            torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (kind, where)
        for kind in LAYERS
        for where in ["input", "h0", "c0", "weight_ih", "weight_hh", "bias"]
        if where != "c0" or kind.startswith("lstm")
    ],
)
def test_nan_and_inf(kind, where, value):
    for dtype in [*FULL, *(LOW if math.isnan(value) else [])]:
        for B, H in [(1, 4), (4, 16), (17, 33)]:
            ours, theirs = pair(kind, 5, H, num_layers=2, bidirectional=True, dtype=dtype)
            x, state = torch.randn(4, B, 5, dtype=dtype), random_state(theirs, B)
            if where == "input":
                x[1, B - 1, 2] = value
            elif where in ("h0", "c0"):
                flat(state)[where == "c0"][0, B // 2, -1] = value
            else:
                name = {"bias": "bias_hh_l0"}.get(where, f"{where}_l0")
                for layer in [ours, theirs]:
                    with torch.no_grad():
                        getattr(layer, name).view(-1)[H // 2] = value
            args = x, state
            if dtype in LOW:  # oneDNN's bfloat16 GEMM spreads a NaN to other rows
                theirs, args = theirs.float(), mapped(args, torch.Tensor.float)
            # On Arm oneDNN's LSTM makes numbers of NaN.
            with torch.backends.mkldnn.flags(enabled=platform.machine() != "aarch64"):
                for record in BOTH:
                    with torch.set_grad_enabled(record):
                        assert_same_nonfinite(ours(x, state), theirs(*args))


@pytest.mark.parametrize("size", [1e2, 1e4, 1e20, 1e30])
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "rnn_relu"])  # grows without bound
def test_saturated_gates(kind, dtype, size):
    """Where exp overflows, gates still saturate to 0, 1 or -1."""
    ours, theirs = pair(kind, 1, 33, dtype=dtype)
    for layer in [ours, theirs]:
        with torch.no_grad():  # away from zero: else terms cancel to a small sum with a large error
            layer.weight_ih_l0.add_(layer.weight_ih_l0.sign(), alpha=0.1)
    x = size * torch.tensor([1.0, -1.0, 3.0]).to(dtype)[torch.randint(3, (4, 3, 1))]
    state = random_state(theirs, 3)
    result = ours(x, state)
    assert all(t.isfinite().all() for t in flat(result))
    assert_same(result, theirs(x, state))
    x = leaves(x)
    found = gradients(ours(x, state), [x, *ours.parameters()])
    expected = gradients(theirs(x, state), [x, *theirs.parameters()])
    # s (1 - s) has an error of one eps for a gate s near 1. A weight's gradient sums this over 12
    # rows, each multiplied by an input of up to 3 * size.
    atol = 12 * 3 * size * torch.finfo(dtype).eps
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1.3e-6, atol=atol)


# ---- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", BOTH, ids=["zeros", "states"])
@pytest.mark.parametrize("batched", BOTH, ids=["unbatched", "batched"])
@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, dtype, batched, with_state):
    pool = []
    for H in [1, 16, 17, 33, 64]:
        for I in [1, 5, 33]:
            ours, theirs = cell_pair(kind, I, H, bias=bias, dtype=dtype)
            for B in [0, 1, 3, 8, 17] if batched else [None]:
                batch = () if B is None else (B,)
                x = torch.randn(*batch, I, dtype=dtype)
                assert_agree(
                    ours, theirs, x, cell_state(theirs, *batch) if with_state else None, pool=pool
                )
    assert bool(pool) == (dtype in LOW)
    if pool:
        assert_pool_no_worse(pool)


@pytest.mark.parametrize("change", STRIDES)
@pytest.mark.parametrize("kind", CELLS)
def test_strides_of_cells(kind, change):
    at = STRIDES[change]
    for dtype in FULL + LOW:
        ours, theirs = cell_pair(kind, 5, 17, dtype=dtype)
        x, state = torch.randn(3, 5, dtype=dtype), cell_state(theirs, 3)
        # The strides that torch's elementwise operations give for a strided state are unspecified.
        assert_agree(ours, theirs, at(x), mapped(state, at), strides=False)
        for name, p in list(theirs.named_parameters()):
            other = nn.Parameter(at(p.detach()))
            setattr(theirs, name, other)
            setattr(ours, name, other)
        assert_agree(ours, theirs, x, state)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_nan_and_inf_in_cells(kind, value):
    for dtype in FULL:
        ours, theirs = cell_pair(kind, 5, 17, dtype=dtype)
        for where in range(3 if is_lstm(theirs) else 2):
            x, state = torch.randn(4, 5, dtype=dtype), cell_state(theirs, 4)
            flat([x, state])[where][2, 3] = value
            assert_same_nonfinite(ours(x, state), theirs(x, state))


@pytest.mark.parametrize("kind", CELLS)
def test_cell_equals_one_step_of_its_layer(kind):
    """Not against torch: a cell and a layer agree with each other."""
    cell, _ = cell_pair(kind, 5, 17, dtype=torch.float64)
    layer, _ = pair(kind, 5, 17, dtype=torch.float64)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    x, state = torch.randn(6, 3, 5, dtype=torch.float64), None
    for t in range(6):
        state = cell(x[t], state)
    _, last = layer(x)
    torch.testing.assert_close(flat(state), [t[0] for t in flat(last)])


# ---- fastrnn.functional --------------------------------------------------------------------------


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_functions(kind, bias, packed):
    """torch._VF's functions take the same arguments in the same order."""
    name = kind.removesuffix("_proj")
    _, layer = pair(
        kind, 5, 17, num_layers=2, bidirectional=True, bias=bias, dropout=0.5, dtype=torch.float64
    )
    tail = [layer._flat_weights, bias, 2, 0.5, True, True]
    state = random_state(layer, 4)
    if packed:
        x = ragged([4, 3, 3, 1], 5, torch.float64)
        args = [x.data, x.batch_sizes, state, *tail]
    else:
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        args = [x, state, *tail, True]
    torch.manual_seed(3)
    ours = getattr(functional, name)(*args)
    torch.manual_seed(3)
    theirs = getattr(torch._VF, name)(*args)
    assert type(ours) is type(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cell_functions(kind, bias):
    _, cell = cell_pair(kind, 5, 17, bias=bias, dtype=torch.float64)
    x, state = torch.randn(3, 5, dtype=torch.float64), cell_state(cell, 3)
    args = [x, state, *cell.parameters()]
    ours = getattr(functional, f"{kind}_cell")(*args)
    theirs = getattr(torch._VF, f"{kind}_cell")(*args)
    assert type(ours) is type(theirs)
    assert_same(ours, theirs)


def test_classes_are_fastrnns():
    """Guards the tests above against comparing torch with itself."""
    for name in ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]:
        assert getattr(fastrnn, name) is not getattr(nn, name)
        assert issubclass(getattr(fastrnn, name), getattr(nn, name))
