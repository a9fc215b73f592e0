"""Cells from Python functions (fastrnn/codegen): what is saved, functions, planted mistakes."""

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from codegen_cells import (
    cells,
    coupled_lstm,
    declared,
    everything,
    generated,
    gru,
    lstm,
    residual,
    rnn_relu,
    rnn_tanh,
    separate_gru,
    three_states,
)

from fastrnn.codegen import CellError, Gates, functions, generate
from fastrnn.codegen.gradcheck import evaluate

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]

ROOT = Path(__file__).parent.parent
FLAGS = ["needs_h", "needs_h_prev", "passes_h"]


@cells
def test_generated_cells(function):
    cell = generated(function)
    cell.check()
    assert cell.name == function.__name__
    assert cell.states == tuple(inspect.signature(function).parameters)[2:]
    assert cell.has_c == (len(cell.states) == 2)
    assert ("V output(" in cell.header) == cell.allows_projection
    assert int(declared(cell.header, "saved")) == cell.saved
    assert max(map(len, cell.header.splitlines())) <= 100
    assert generated(function).header == cell.header


@pytest.mark.parametrize("function", [lstm, gru, rnn_tanh, rnn_relu])
def test_constants_are_those_written_by_hand(function):
    file = "rnn" if function in (rnn_tanh, rnn_relu) else function.__name__
    by_hand = (ROOT / f"csrc/cells/{file}.h").read_text()
    header = generated(function).header
    for constant in ["gates", "has_c", "saved", "grads", "x_grad", *FLAGS]:
        assert declared(header, constant) == declared(by_hand, constant), constant


def test_constants_of_other_cells():
    cell = generated(coupled_lstm)
    assert (cell.saved, cell.grads, cell.allows_projection) == (3, 3, True)
    assert cell.struct == "fastrnn::generated::CoupledLstm"
    assert generated(separate_gru).grads == 6
    assert declared(generated(separate_gru).header, "x_grad") == "{0, 1, 2}"
    assert not generated(residual).allows_projection


@pytest.mark.parametrize(
    ("call", "saved"),
    [
        (F.silu, 1),  # a, from which sigmoid(a) is computed again
        (F.gelu, 2),  # a, and erf, which is slow
        (torch.erf, 1),
        (torch.exp, 0),  # h itself
        (lambda t: 3 * t, 0),
        (lambda t: torch.where(t > 0, t, 0.1 * t), 1),
    ],
)
def test_what_is_saved(call, saved):
    cell = generate(lambda x, r, h: call(x.a + r.a), gates=["a"], name="cell")
    assert cell.saved == saved
    cell.check()


def test_check_under_other_defaults():
    with torch.inference_mode(), torch.device("meta"):
        generated(everything).check()


def test_results_without_a_gradient():
    def threshold(x, r, h):
        return torch.where(x.a > 0, 1.0, 0.0)

    generate(threshold, gates=["a"]).check()


def test_name():
    assert "struct MyCell {" in generate(rnn_tanh, gates=["a"], name="my_cell").header
    for name in ("my cell", "1st", "_x", "größe", "", "class"):
        with pytest.raises(CellError, match="name"):
            generate(rnn_tanh, gates=["a"], name=name)


def test_no_table_grows():
    before = len(functions.PRIMITIVES), len(functions.FUNCTIONS)
    nodes = [len(generated(lstm).step.graph._nodes) for _ in range(3)]
    assert len(set(nodes)) == 1
    assert (len(functions.PRIMITIVES), len(functions.FUNCTIONS)) == before


# --- functions ------------------------------------------------------------------------------------

#: name -> calls of it
CALLS = {
    "sigmoid": [torch.sigmoid, F.sigmoid, lambda t: t.sigmoid()],
    "tanh": [torch.tanh, F.tanh, lambda t: t.tanh()],
    "relu": [torch.relu, F.relu, lambda t: t.relu()],
    "exp": [torch.exp, lambda t: t.exp()],
    "log": [torch.log, lambda t: t.log()],
    "log1p": [torch.log1p, lambda t: t.log1p()],
    "logsigmoid": [F.logsigmoid],
    "softplus": [F.softplus, lambda t: F.softplus(t, beta=0.5), lambda t: F.softplus(t, 3)],
    "silu": [F.silu],
    "sqrt": [torch.sqrt, lambda t: t.sqrt()],
    "rsqrt": [torch.rsqrt, lambda t: t.rsqrt()],
    "abs": [torch.abs, abs, lambda t: t.abs()],
    "square": [torch.square, lambda t: t.square()],
    "pow": [lambda t: t**2, lambda t: torch.pow(t, 2), lambda t: t.pow(2)],
    "maximum": [lambda t: torch.maximum(t, t.tanh()), lambda t: t.maximum(0 * t)],
    "minimum": [lambda t: torch.minimum(t, t * t), lambda t: torch.minimum(-t, other=t)],
    "clamp": [
        lambda t: torch.clamp(t, -1, 1),
        lambda t: t.clamp(min=0.5),
        lambda t: torch.clamp(t, max=-1),
    ],
    "erf": [torch.erf, lambda t: t.erf()],
    "gelu": [F.gelu, lambda t: F.gelu(t, approximate="tanh")],
    "where": [
        lambda t: torch.where(t > 0, t * t, -t),
        lambda t: torch.where(t >= 1, 2.0, t),
        lambda t: torch.where(t < 0, t, 0.5),
        lambda t: torch.where(0.5 <= t, 1 / t, t - 3),  # noqa: SIM300
        lambda t: torch.where(t > 0, 1.0, 0.0) + t,
    ],
    "add": [lambda t: torch.add(t, 1.5), lambda t: 2 + t, lambda t: t + -3, lambda t: t.add(t)],
    "sub": [lambda t: torch.sub(t, 2), lambda t: 0.3 - t, lambda t: t - -t, lambda t: -(t - 1)],
    "mul": [lambda t: torch.mul(t, t), lambda t: -0.3 * t, lambda t: t * -1 * t, lambda t: 1 * t],
    "div": [lambda t: torch.div(t, 3), lambda t: 2 / t, lambda t: t / -t, lambda t: (-t) / t],
    "neg": [lambda t: -t, torch.neg, lambda t: t.neg()],
}
#: Kinks, ties, zeros of both signs, large values.
POINTS = [*(i / 4 for i in range(-12, 13)), -0.0, 15.0, -15.0, 30.0, -30.0, 700.0, -700.0]


def test_every_function_is_tested():
    assert set(CALLS) == set(functions.FUNCTIONS)


@pytest.mark.parametrize(
    ("name", "call"), [pytest.param(n, call, id=n) for n, calls in CALLS.items() for call in calls]
)
def test_functions(name, call):
    cell = generate(lambda x, r, h: call(x.a), gates=["a"], name="cell")
    step, backward = cell.step, cell.backward
    points = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    expected = call(points)
    (gradient,) = torch.autograd.grad(expected.sum(), points)
    roots = [*step.results, *backward.dx]
    given = {step.input("x"): points.detach(), step.input("dh"): torch.ones_like(points)}
    found = [evaluate(roots, given)[root].expand_as(points) for root in roots]
    # torch's softplus drops 2e-9 at its threshold.
    close = {"rtol": 1e-13, "atol": 2.1e-9 * 2 if name == "softplus" else 1e-13}
    torch.testing.assert_close(found[0], expected.detach(), equal_nan=True, **close)
    finite = gradient.isfinite()
    torch.testing.assert_close(found[1][finite], gradient[finite], **close)
    assert finite.sum() > 10


@pytest.mark.parametrize("call", [torch.relu, torch.tanh, F.softplus, lambda t: t.clamp(-1, 1)])
def test_nan_passes_through(call):
    step = generate(lambda x, r, h: call(x.a), gates=["a"], name="cell").step
    nan = torch.tensor([math.nan], dtype=torch.float64)
    assert evaluate(step.results, {step.input("x"): nan})[step.results[0]].isnan().all()


@pytest.mark.parametrize("call", [torch.maximum, torch.minimum])
def test_nan_of_either_argument(call):
    step = generate(lambda x, r, h: call(x.a, r.a), gates=["a"], name="cell").step
    a = torch.tensor([math.nan, 1, math.nan, math.inf], dtype=torch.float64)
    b = torch.tensor([1, math.nan, math.nan, math.inf], dtype=torch.float64)
    found = evaluate(step.results, {step.input("x"): a, step.input("r"): b})[step.results[0]]
    torch.testing.assert_close(found, call(a, b), equal_nan=True)


def test_gates_of_tensors():
    x = Gates(("f", "g"), (torch.zeros(2), torch.ones(2)))
    assert x.g is x[1]
    assert len(x) == 2
    assert list(x) == [x.f, x.g]
    with pytest.raises(AttributeError, match="no gate 'h', only f, g"):
        _ = x.h


# --- planted mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "derivative"),
    [
        ("-", lambda n, g: (g, g)),
        ("/", lambda n, g: (g / n.args[1], None)),
        ("tanh", lambda n, g: (g * (1 + n * n),)),
        ("sigmoid", lambda n, g: (g * n,)),
        ("erf", lambda n, g: (g * (-(n.args[0] * n.args[0])).call("exp"),)),
        ("abs", lambda n, g: (g,)),
        ("relu", lambda n, g: (n.graph.where(n.compare("<", 0), 0, g),)),
        ("where", lambda n, g: (None, g, g)),
        ("softplus", lambda n, g: (g * n,)),
    ],
)
def test_check_finds_wrong_derivatives(monkeypatch, op, derivative):
    wrong = dataclasses.replace(functions.PRIMITIVES[op], derivative=derivative)
    monkeypatch.setitem(functions.PRIMITIVES, op, wrong)
    cell = generated(everything)
    with pytest.raises(CellError, match=r"'everything'.* the gradient of .* differs"):
        cell.check()


def test_check_finds_wrong_values(monkeypatch):
    wrong = dataclasses.replace(functions.PRIMITIVES["tanh"], evaluate=torch.sin)
    monkeypatch.setitem(functions.PRIMITIVES, "tanh", wrong)
    with pytest.raises(CellError, match="the new h differs"):
        generated(gru).check()


def with_backward(cell, **changes):
    return dataclasses.replace(cell, backward=dataclasses.replace(cell.backward, **changes))


def test_check_finds_what_backward_lacks():
    cell = generated(lstm)
    for i in range(cell.saved):
        fewer = cell.backward.saved[:i] + cell.backward.saved[i + 1 :]
        with pytest.raises(CellError, match=r"reads [xr]\[\d\], which is not saved"):
            with_backward(cell, saved=fewer).check()
    with pytest.raises(CellError, match="reads h_prev, which"):
        with_backward(generated(gru), needs_h_prev=False).check()
    with pytest.raises(CellError, match=r"reads [xr]\[0\], which"):
        with_backward(generated(rnn_tanh), needs_h=False).check()


def test_check_finds_a_wrong_order():
    cell = generated(gru)
    with pytest.raises(CellError, match=r"the gradient of x\.r differs"):
        with_backward(cell, x_grad=(0, 1, 2)).check()


def test_check_finds_wrong_gradients_of_states_and_vectors():
    cell = generate(three_states, gates=["i", "g"])
    assert (cell.states, cell.vectors) == (("h", "c", "n"), ("w", "v"))
    cell.check()
    backward = cell.backward
    with pytest.raises(CellError, match="the gradient of w differs"):
        with_backward(cell, d_vectors=backward.d_vectors[::-1]).check()
    h, c, n = backward.d_states
    with pytest.raises(CellError, match="the gradient of c differs"):
        with_backward(cell, d_states=(h, n, c)).check()
    with pytest.raises(CellError, match="the gradient of v differs"):
        with_backward(cell, d_vectors=(backward.d_vectors[0], -backward.d_vectors[1])).check()
    for i in range(cell.saved):
        fewer = backward.saved[:i] + backward.saved[i + 1 :]
        with pytest.raises(CellError, match="which is not saved"):
            with_backward(cell, saved=fewer).check()


def test_check_finds_a_step_that_differs_between_calls():
    calls = []

    def changing(x, r, h):
        calls.append(1)
        return len(calls) * x.a

    cell = generate(changing, gates=["a"])
    with pytest.raises(CellError, match="computes the same in each call"):
        cell.check()
