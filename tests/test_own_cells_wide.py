"""Cells of one's own with more than torch's have: several states, vectors, other matrices W_hh."""

import copy
import pickle

import pytest
import torch
from helpers import flat, leaves, ragged, slow_after
from own_cells import (
    WIDE,
    by_definition_of_step,
    check_bits,
    check_higher_derivatives,
    check_models,
    compare,
    diagonal_lstm,
    head_gru,
    states_of,
    values_and_gradients,
    weighted,
)
from torch.utils.flop_counter import FlopCounterMode
from torch_features import skip_without_export_of_layers

import fastrnn
from fastrnn import own_modules
from fastrnn.cells import indrnn, peephole_lstm, slstm

pytestmark = [pytest.mark.cpu("own cells have kernels on the CPU"), pytest.mark.once]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
BOTH = [False, True]
cells = pytest.mark.parametrize("definition", WIDE, ids=[cell.name for cell in WIDE])
# Each compiles for seconds, and kernels of another dtype are the same templates.
few_dtypes = pytest.mark.parametrize(
    ("definition", "dtype"),
    [*((definition, F64) for definition in WIDE), (weighted, F32), (diagonal_lstm, F32)],
    ids=lambda value: getattr(value, "name", value),
)


def heads_of(definition, count=3):
    return {"heads": count} if definition.recurrent == "heads" else {}


@pytest.mark.parametrize("packed", BOTH, ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", BOTH, ids=["one", "two"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", BOTH, ids=["nobias", "bias"])
@few_dtypes
def test_layers(definition, dtype, bias, layers, bidirectional, packed):
    for H, recompute, heads in [(1, False, 1), (18, True, 3), (33, False, 3), (34, False, 2)]:
        layer = definition.layer(
            5, H, layers, bias, batch_first=H == 33, bidirectional=bidirectional, dtype=dtype,
            recompute=recompute, **heads_of(definition, heads),
        )  # fmt: skip
        x = ragged([3, 1, 4], 5, dtype) if packed else torch.randn(4, 3, 5, dtype=dtype)
        batch = 4 if H == 33 and not packed else 3
        compare(layer, x, states_of(layer, batch))


@cells
def test_many_rows_and_threads(definition):
    """Several chunks, and units and rows that threads share."""
    for batch, H in [(1, 132), (40, 132)]:
        layer = definition.layer(5, H, dtype=F64, bidirectional=True, **heads_of(definition))
        compare(layer, torch.randn(90, batch, 5, dtype=F64), states_of(layer, batch))


@pytest.mark.parametrize(
    ("definition", "dtype"),
    slow_after(
        1,
        [(weighted, BF16), (diagonal_lstm, torch.float16), (diagonal_lstm, BF16), (head_gru, BF16)],
    ),
    ids=lambda value: getattr(value, "name", value),
)
def test_sixteen_bits(definition, dtype):
    layer = definition.layer(
        5, 18, 2, bidirectional=True, dtype=dtype, **heads_of(definition)
    )  # fmt: skip
    exact = copy.deepcopy(layer).double()
    x, hx = leaves((torch.randn(4, 3, 5, dtype=dtype), states_of(layer, 3)))
    found = values_and_gradients(layer, layer, x, hx)
    wide = [t.detach().double().requires_grad_() for t in flat(hx)]
    expected = values_and_gradients(
        exact, exact, x.detach().double().requires_grad_(),
        tuple(wide) if len(wide) > 1 else wide[0],
    )  # fmt: skip
    # h and c are rounded at each of 4 steps of 2 layers, and gradients are sums of up to 24 such
    # values.
    step = torch.finfo(dtype).eps
    for value, right in zip(found, expected, strict=True):
        assert (value.double() - right).abs().max() <= 8 * step * right.abs().max() + 8 * step


@few_dtypes
def test_steps(definition, dtype):
    for H, bias in [(3, True), (18, False), (33, True)]:
        step = definition.step(5, H, bias=bias, dtype=dtype, **heads_of(definition))
        for batch in [(), (1,), (40,)]:
            x, hx = leaves((torch.randn(*batch, 5, dtype=dtype), states_of(step, *batch)))

            def by_hand(x, hx, step=step):
                return by_definition_of_step(step, x, hx)

            torch.testing.assert_close(
                values_and_gradients(step, step, x, hx), values_and_gradients(by_hand, step, x, hx)
            )
        layer = definition.layer(5, H, bias=bias, dtype=dtype, **heads_of(definition))
        layer.load_state_dict({f"{name}_l0": value for name, value in step.state_dict().items()})
        x = torch.randn(2, 5, dtype=dtype)
        torch.testing.assert_close(flat(step(x)), [s[0] for s in flat(layer(x[None])[1])])


@cells
def test_higher_derivatives(definition):
    layer = definition.layer(3, 4, 2, bidirectional=True, dtype=F64, **heads_of(definition, 2))
    check_higher_derivatives(layer, torch.randn(3, 2, 3, dtype=F64), states_of(layer, 2))


@cells
def test_transforms(definition):
    models = [definition.layer(5, 6, dtype=F64, **heads_of(definition)) for _ in range(3)]
    x = torch.randn(3, 4, 2, 5, dtype=F64)
    check_models(models, x)


@pytest.mark.parametrize("packed", slow_after(1, BOTH), ids=["padded", "packed"])
@cells
def test_compiled_and_exported(definition, packed):
    layer = definition.layer(5, 6, 2, bidirectional=True, dtype=F64, **heads_of(definition))
    x = ragged([3, 1, 4], 5, F64) if packed else torch.randn(4, 3, 5, dtype=F64)
    hx = states_of(layer, 3)
    torch._dynamo.reset()  # it compiles a function anew a few times only
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=not packed)
    torch.testing.assert_close(flat(compiled(x, hx)), flat(layer(x, hx)))
    torch.testing.assert_close(flat(compiled(x)), flat(layer(x)))
    step = torch.compile(
        definition.step(5, 6, dtype=F64, **heads_of(definition)), backend="aot_eager",
        fullgraph=True,
    )  # fmt: skip
    assert flat(step(torch.randn(2, 5, dtype=F64)))[0].shape == (2, 6)
    if not packed:
        skip_without_export_of_layers()
        exported = torch.export.export(layer, (x, hx), strict=False).module()
        torch.testing.assert_close(flat(exported(x, hx)), flat(layer(x, hx)))
        exported = torch.export.export(layer, (x,), strict=False).module()
        torch.testing.assert_close(flat(exported(x)), flat(layer(x)))


@cells
def test_copies(definition):
    layer = definition.layer(5, 6, 2, dropout=0.3, dtype=F64, **heads_of(definition)).eval()
    x = torch.randn(3, 2, 5, dtype=F64)
    for other in [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]:
        assert other.definition is definition
        torch.testing.assert_close(flat(other(x)), flat(layer(x)))
    fresh = definition.layer(5, 6, 2, dtype=F64, **heads_of(definition))
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(flat(fresh(x)), flat(layer(x)))


@cells
def test_the_bits_do_not_depend_on_threads_or_batch_mates(definition):
    layer = definition.layer(64, 96, dtype=F64, **heads_of(definition))
    check_bits(layer, torch.randn(9, 20, 64, dtype=F64))


@cells
def test_without_kernels(definition, monkeypatch):
    """The definition runs step by step, and is counted."""
    layer = definition.layer(5, 6, 2, bidirectional=True, dtype=F64, **heads_of(definition))
    x, hx = leaves((torch.randn(4, 3, 5, dtype=F64), states_of(layer, 3)))
    expected = values_and_gradients(layer, layer, x, hx)
    monkeypatch.setattr(type(definition), "why_no_kernels", lambda *args: "without a compiler")
    monkeypatch.setattr(own_modules._C, "layer", lambda *args: None)  # which finds the kernels
    before = fastrnn.fallbacks().get(f"{definition.name} without a compiler", 0)
    torch.testing.assert_close(values_and_gradients(layer, layer, x, hx), expected)
    assert fastrnn.fallbacks()[f"{definition.name} without a compiler"] == before + 1


@pytest.mark.parametrize("definition", [weighted, head_gru], ids=["weighted", "head_gru"])
def test_autocast(definition):
    """In bfloat16, whose 8 bits are rounded at three steps."""
    layer = definition.layer(5, 6, **heads_of(definition))
    x = torch.randn(3, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, states = layer(x)
    expected, _ = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    assert len(flat(states)) == len(definition.states)


def test_projection():
    layer = peephole_lstm.layer(5, 33, 2, proj_size=7, bidirectional=True, dtype=F64)
    compare(layer, torch.randn(4, 3, 5, dtype=F64), states_of(layer, 3))
    compare(layer, ragged([3, 1, 4], 5, F64), states_of(layer, 3))
    for definition in [weighted, indrnn, diagonal_lstm, head_gru, slstm]:
        with pytest.raises(ValueError, match="does not support projections"):
            definition.layer(5, 6, proj_size=3)


def test_initial_values():
    layer, step = weighted.layer(5, 7, 2), weighted.step(5, 7)
    for module in [layer, step]:
        for name, parameter in module.named_parameters():
            if name.startswith(("w_l", "bias_ih")) or name == "w":
                assert (parameter == (1 if name.startswith("bias") else 0.5)).all()
    assert layer.w_l1.shape == step.scale.shape == (7,)
    x = torch.randn(3, 2, 5)
    zeros = torch.zeros(2, 2, 7)
    torch.testing.assert_close(flat(layer(x)), flat(layer(x, (zeros, zeros, zeros + 1))))
    torch.testing.assert_close(
        flat(step(x[0])), flat(step(x[0], (zeros[0], zeros[0], zeros[0] + 1)))
    )
    assert not torch.equal(layer(x)[0], layer(x, (zeros, zeros, zeros))[0])


def test_explain_and_flops(capsys):
    x = torch.ones(3, 2, 5, dtype=F64)
    for definition, text in [
        (weighted, "weighted-"),
        (slstm, "each of 3 heads of the first layer"),
    ]:
        fastrnn.explain(definition.layer(5, 6, 2, dtype=F64, **heads_of(definition)), x)
        assert text in capsys.readouterr().out
    with FlopCounterMode(display=False) as counter:
        indrnn.layer(5, 6, dtype=F64)(x)
    assert counter.get_total_flops() == 2 * 3 * 2 * 5 * 6  # W_ih alone
    with FlopCounterMode(display=False) as counter:
        slstm.layer(5, 6, heads=3, dtype=F64)(x)
    assert counter.get_total_flops() == 2 * 3 * 2 * 4 * (5 * 6 + 6 * 2)


def keyword(**options):
    def define():
        @fastrnn.cell(gates=("a",), **options)
        def named(x, r, h, *, w):
            return torch.tanh(x.a + r.a + w * h)

        return named

    return define


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (keyword(recurrent="sparse"), r"cell 'named': recurrent 'sparse', expected one of: dense"),
        (keyword(initial={"c": 1.0}), r"cell 'named': initial of 'c', expected one of: h"),
        (keyword(init={"v": 1.0}), r"init of 'v', expected one of: weight_ih, .*weight_hr, w$"),
        (lambda: slstm.layer(5, 7, heads=2), "heads that divide hidden_size 7, got 2"),
        (lambda: slstm.step(5, 6, heads=0), "heads that divide hidden_size 6, got 0"),
        (lambda: indrnn.layer(5, 6, heads=2), r'indrnn has no heads: .*recurrent="heads"'),
    ],
)  # fmt: skip
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_states_that_do_not_fit():
    layer = weighted.layer(5, 7)
    x, h = torch.ones(3, 2, 5), torch.zeros(1, 2, 7)
    with pytest.raises(RuntimeError, match="weighted expects a tuple of 3 tensors as hx: h, c, n"):
        layer(x, (h, h))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[2\] size \(1, 2, 7\)"):
        layer(x, (h, h, torch.zeros(1, 2, 8)))


def wrong(tensors, i, size):
    return [torch.ones(size, dtype=t.dtype) if j == i else t for j, t in enumerate(tensors)]


def test_operators_check_their_arguments():
    """Called straight, with tensors of other sizes than the cell's."""
    x, h = torch.ones(3, 2, 5, dtype=F64), torch.zeros(1, 2, 7, dtype=F64)

    def run(definition, c0, weights):
        definition.build([F64])
        return fastrnn.functional.rnn(
            definition.key, x, h, c0, weights, has_biases=True, num_layers=1, bidirectional=False
        )

    weights = weighted.layer(5, 7, dtype=F64)._flat_weights
    c0 = torch.zeros(1, 2, 14, dtype=F64)
    assert run(weighted, c0, weights)[2].shape == (1, 2, 14)
    for i, size in [(4, (8,)), (5, (7, 1)), (5, ()), (1, (21,)), (2, (20,))]:
        with pytest.raises(RuntimeError, match=r"Expected .* size"):
            run(weighted, c0, wrong(weights, i, size))
    for count in [4, 5, 7]:
        with pytest.raises(RuntimeError, match="incorrect number of RNN parameters"):
            run(weighted, c0, (*weights, weights[-1])[:count])
    for width in [7, 13, 21]:
        with pytest.raises(RuntimeError):
            run(weighted, torch.zeros(1, 2, width, dtype=F64), weights)
    with pytest.raises(RuntimeError, match="two hidden states"):
        run(weighted, None, weights)
    diagonal = indrnn.layer(5, 7, dtype=F64)._flat_weights
    for size in [(7, 7), (8,), (1,)]:
        with pytest.raises(RuntimeError, match="Expected weight_hh size"):
            run(indrnn, None, wrong(diagonal, 1, size))
