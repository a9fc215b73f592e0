"""Cells from Python functions (fastrnn/codegen)."""

import ctypes
import dataclasses
import inspect
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import build
import toolchain
from fastrnn.codegen import CellError, Gates, functions, generate
from fastrnn.codegen.gradcheck import evaluate

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]

ROOT = Path(__file__).parent.parent
FLAGS = ["needs_h", "needs_h_prev", "passes_h"]


# --- cells ----------------------------------------------------------------------------------------


def lstm(x, r, h, c):
    i, f, o = torch.sigmoid(x.i + r.i), torch.sigmoid(x.f + r.f), torch.sigmoid(x.o + r.o)
    c = f * c + i * torch.tanh(x.g + r.g)
    return o * torch.tanh(c), c


def gru(x, r, h):
    reset, z = (x.r + r.r).sigmoid(), (x[1] + r[1]).sigmoid()
    n = (x.n + reset * r.n).tanh()
    return n + z * (h - n)


def rnn_tanh(x, r, h):
    return (x[0] + r[0]).tanh()


def rnn_relu(x, r, h):
    return F.relu(x.a + r.a)


def coupled_lstm(x, r, h, c):
    f, o = torch.sigmoid(x.f + r.f), torch.sigmoid(x.o + r.o)
    c = f * c + (1 - f) * torch.tanh(x.g + r.g)
    return o * torch.tanh(c), c


def separate_gru(x, r, h):
    """With the gates in an order in which x and r share no gradient."""
    n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
    return h + torch.sigmoid(x.z + r.z) * (n - h)


def residual(x, r, h, c):
    """h can't be computed from c and what backward needs."""
    c = 0.9 * c + torch.tanh(x.g + r.g)
    return c + x.o, c


def everything(x, r, h, c):
    a, b = x.a + r.a, 0.1 * (x.b - r.b)
    s = F.softplus(a, beta=2) + torch.exp(-torch.abs(b)) + torch.log(1.5 + a**2)
    s = s + torch.log1p(torch.square(b)) * torch.sqrt(2 + torch.square(h)) - torch.rsqrt(3 + a * a)
    s = s + torch.erf(a / 3) + F.gelu(b) + F.gelu(a, approximate="tanh") - F.logsigmoid(r.b)
    s = s - F.silu(b) * torch.maximum(a, h) + torch.minimum(b, c) + torch.clamp(a, -0.7, 1.3)
    c = torch.where(a > b, 0.3 * c, torch.tanh(s)) + torch.where(0 <= h, 1.0, -0.25)  # noqa: SIM300
    return torch.sigmoid(s) * c + torch.relu(b), c


def condition(x, r, h):
    """Reads h, but has no derivative by it."""
    return torch.where(h > 0.5, torch.tanh(x.a), x.a * r.a)


def one_sum(x, r, h):
    """All gates have the same gradient."""
    return torch.tanh(x.a + x.b + r.a + r.b)


def one_product_each(x, r, h):
    """A gate of x alone and one of r alone."""
    return torch.sigmoid(x.a) * torch.tanh(r.b) + 0.5 * h


def delay(x, r, h, c):
    """c is the previous h."""
    return torch.tanh(x.a + r.a + c), h


CELLS = {
    lstm: "ifgo",
    gru: "rzn",
    rnn_tanh: "a",
    rnn_relu: "a",
    coupled_lstm: "fgo",
    separate_gru: "nrz",
    residual: "go",
    everything: "ab",
    condition: "a",
    one_sum: "ab",
    one_product_each: "ab",
    delay: "a",
}
cells = pytest.mark.parametrize("function", CELLS, ids=lambda function: function.__name__)


def generated(function):
    return generate(function, gates=tuple(CELLS[function]))


def declared(header, name):
    return re.search(rf"{name}(?:\[gates\])? = (.*?);", header)[1]


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


# --- errors ---------------------------------------------------------------------------------------


def branch(x, r, h):
    y = x.a
    if y > 0:  # here
        return y
    return h


def loop(x, r, h):
    return sum(value for value in h)  # here


def conversion(x, r, h):
    return float(h) * x.a  # here


def unknown_function(x, r, h):
    return torch.cumsum(x.a, 0)  # here


def unknown_method(x, r, h):
    return x.a.sigmoid_()  # here


def unknown_operator(x, r, h):
    return (x.a > 0) & (h > 0)  # here


def equality(x, r, h):
    return torch.where(x.a == 0, h, 0)  # here


def in_place(x, r, h):
    h += x.a  # here
    return h


def relu_in_place(x, r, h):
    return F.relu(x.a, inplace=True)  # here


def mask_as_value(x, r, h):
    return (x.a > 0) * h  # here


def value_as_condition(x, r, h):
    return torch.where(x.a, h, 0)  # here


def constant_tensor(x, r, h):
    return x.a * torch.ones(3)  # here


def infinite_number(x, r, h):
    return x.a * math.inf  # here


def other_power(x, r, h):
    return x.a**3  # here


def method_of_no_tensor(x, r, h):
    return x.a.softplus()  # here


def other_threshold(x, r, h):
    return F.softplus(x.a, threshold=5)  # here


def wrong_argument(x, r, h):
    return x.a.clamp(minimum=5)  # here


def torch_raises(x, r, h):
    return torch.clamp(x.a, minimum=5)  # here


def unknown_gate(x, r, h):
    return x.a + r.b  # here


def unknown_index(x, r, h):
    return x.a + r[1]  # here


def all_gates(x, r, h):
    return x + r  # here


def function_of_all_gates(x, r, h):
    return torch.tanh(x)  # here


def math_module(x, r, h):
    return math.exp(x.a)  # here


def name_error(x, r, h):
    return x.a + undefined  # noqa: F821  # here


def helper(t):
    return t.cumprod(0)  # here


def error_in_helper(x, r, h):
    return helper(x.a)


def unused_gate(x, r, h):  # here
    return h.tanh()


def two_results(x, r, h):  # here
    return x.a, h


def one_result(x, r, h, c):  # here
    return x.a


def no_result(x, r, h):  # here
    x.a.tanh()


def no_state(x, r):  # here
    return x.a


def a_default(x, r, h, c=None):  # here
    return x.a


@pytest.mark.parametrize(
    ("function", "found", "remedy"),
    [
        (branch, "Python needs a value's number here (if", "use torch.where(condition, a, b)"),
        (loop, "a loop", "use torch.where"),
        (conversion, "float()", "use torch.where"),
        (unknown_function, "torch's cumsum can't be compiled", "allowed are + - * /"),
        (unknown_method, "a tensor's .sigmoid_ can't", "allowed are"),
        (unknown_operator, "& can't be compiled", "comparisons (< <= > >=)"),
        (equality, "== can't be compiled", "allowed are"),
        (in_place, "an operation in place", "write c = c + ..."),
        (relu_in_place, "inplace", "relu takes (input)"),
        (mask_as_value, "a comparison is used as a value", "condition of torch.where"),
        (value_as_condition, "is no comparison", "torch.where(x.f > 0"),
        (constant_tensor, "a tensor in an expression", "Python's numbers"),
        (infinite_number, "the number inf", "finite"),
        (other_power, "a power other than ** 2", "as a product"),
        (method_of_no_tensor, "called as a method", "torch.nn.functional.softplus(...)"),
        (other_threshold, "another threshold", "threshold=20"),
        (wrong_argument, "'minimum'", "clamp takes (input"),
        (torch_raises, "TypeError: clamp() received", "allowed are"),
        (unknown_gate, "r has no gate 'b'", "its gates are a: take one, as r.a or r[0]"),
        (unknown_index, "r has no gate 1", "its gates are a"),
        (all_gates, "x is used as one value", "take one, as x.a or x[0]"),
        (function_of_all_gates, "x is used as one value", "take one, as x.a"),
        (math_module, "Python needs a value's number", "torch.where"),
        (name_error, "NameError: name 'undefined'", "allowed are"),
        (error_in_helper, "torch's cumprod|a tensor's .cumprod", "allowed are"),
        (unused_gate, "the gate 'a' is not used", "use x.a or r.a, or take it out of gates"),
        (two_results, "it returns 2 values", "return the new h"),
        (one_result, "expected 2", "return the new h and c"),
        (no_result, "it returns NoneType None", "return the new h"),
        (no_state, "its parameters are (x, r)", "define it as (x, r, h) or (x, r, h, c)"),
        (a_default, "its parameters are (x, r, h, c=None)", "without defaults"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_errors(function, found, remedy):
    with pytest.raises(CellError) as error:
        generate(function, gates=["a"])
    message = str(error.value)
    lines, first = inspect.getsourcelines(helper if function is error_in_helper else function)
    line = first + next(i for i, text in enumerate(lines) if "# here" in text)
    assert message.startswith(f"cell '{function.__name__}', {__file__}, line {line}: ")
    assert any(text in message for text in found.split("|"))
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "gates", ["fgo", [], ["a", "a"], ["1"], ["_a"], list("abcde"), [1]], ids=str
)
def test_wrong_gates(gates):
    with pytest.raises(CellError, match="pass 1 to 4 different names"):
        generate(rnn_tanh, gates=gates)


def test_no_function():
    with pytest.raises(CellError, match="define the step with def"):
        generate(torch.tanh, gates=["a"])


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


def test_check_finds_a_step_that_differs_between_calls():
    calls = []

    def changing(x, r, h):
        calls.append(1)
        return len(calls) * x.a

    cell = generate(changing, gates=["a"])
    with pytest.raises(CellError, match="computes the same in each call"):
        cell.check()


# --- compiled -------------------------------------------------------------------------------------

SOURCE = """
#include "cells/dependence.h"
#include "cpu/dual.h"
using namespace fastrnn;
using namespace FASTRNN_ISA;

template <class V, class Cell>
void step(V* x, V* r, V h_prev, V c_prev, V dh, V dc, V* out) {
    V saved[Cell::saved + 1], dgates[Cell::grads], h{}, c{}, dh_prev{}, dc_prev{};
    Cell::forward(x, r, h_prev, c_prev, h, c, saved);
    Cell::backward(saved, Cell::needs_h_prev ? h_prev : V{}, c_prev, Cell::needs_h ? h : V{}, c,
                   dh, dc, dgates, dh_prev, dc_prev);
    if constexpr (allows_projection<Cell>) h = Cell::output(saved, c);
    *out++ = h, *out++ = c;
    for (int g = 0; g < Cell::gates; ++g) *out++ = dgates[Cell::x_grad[g]];
    for (int g = 0; g < Cell::gates; ++g) *out++ = dgates[Cell::grads - Cell::gates + g];
    *out++ = dh_prev, *out++ = dc_prev;
}

// values, tangents: [2 G + 4, n], and of the results.
template <class T, class Cell>
void run(const T* values, const T* tangents, T* results, T* result_tangents, int n) {
    static_assert(Declared<Cell>::ok);
    constexpr int G = Cell::gates, in = 2 * G + 4;
    for (int unit = 0; unit < n; unit += lanes<T>) {
        Dual<T> v[in], found[in];
        for (int i = 0; i < in; ++i)
            v[i] = {load<T>(values + i * n + unit, lanes<T>),
                    load<T>(tangents + i * n + unit, lanes<T>)};
        step<Dual<T>, Cell>(v, v + G, v[2 * G], v[2 * G + 1], v[2 * G + 2], v[2 * G + 3], found);
        for (int i = 0; i < in; ++i)
            store<T>(result_tangents + i * n + unit, found[i].tangent, lanes<T>);
        Vec<T> w[in], results_of[in];
        for (int i = 0; i < in; ++i) w[i] = v[i].value;
        step<Vec<T>, Cell>(w, w + G, w[2 * G], w[2 * G + 1], w[2 * G + 2], w[2 * G + 3],
                           results_of);
        for (int i = 0; i < in; ++i) store<T>(results + i * n + unit, results_of[i], lanes<T>);
    }
}

#define CELL(T, name, Cell)                                                                      \\
    extern "C" void name##_##T(const T* v, const T* t, T* results, T* result_tangents, int n) { \\
        run<T, Cell>(v, t, results, result_tangents, n);                                        \\
    }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    lines = []
    # These names are also ones of the headers.
    others = [generate(gru, gates=tuple("rzn"), name=name) for name in ("math", "f", "v")]
    for cell in [*map(generated, CELLS), *others]:
        (folder / f"cell_{cell.name}.h").write_text(cell.header)
        lines.insert(0, f'#include "cell_{cell.name}.h"')
        lines += [f"CELL({T}, {cell.name}, ::{cell.struct})" for T in ("float", "double")]
    (folder / "cells.cpp").write_text("\n".join([SOURCE, *lines]))
    flags = [*build.CXX_FLAGS, *toolchain.CPU_MACROS, "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += ["-fvisibility=default", f"-I{ROOT / 'csrc'}", "-DFASTRNN_ISA=generic", "-shared"]
    # Of headers that are not generated.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-parameter"]
    command = [*toolchain.cxx(), *flags, "cells.cpp", "-o", "cells.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "cells.so"))


def by_autograd(function, values):
    """The results of the compiled step, [2 G + 4, n], in its order."""
    G = len(CELLS[function])
    has_c = len(inspect.signature(function).parameters) == 4

    def new_states(leaves):
        gates = [Gates(CELLS[function], leaves[i : i + G].unbind()) for i in (0, G)]
        new = function(*gates, *leaves[2 * G : 2 * G + 1 + has_c])
        return torch.stack(new) if has_c else torch.stack([new, torch.zeros_like(new)])

    states, backward = torch.func.vjp(new_states, values[: 2 * G + 2])
    (gradients,) = backward(values[2 * G + 2 :])
    return torch.cat([states, gradients])


@pytest.mark.parametrize(("kind", "dtype"), [("float", torch.float32), ("double", torch.float64)])
@cells
def test_compiled(library, function, kind, dtype):
    G, n = len(CELLS[function]), 64
    generator = torch.Generator().manual_seed(0)
    values, tangents = torch.randn(2, 2 * G + 4, n, generator=generator, dtype=dtype)
    values[:, -1] = 0
    results, result_tangents = torch.empty_like(values), torch.empty_like(values)
    run = getattr(library, f"{function.__name__}_{kind}")
    arrays = [values, tangents, results, result_tangents]
    run(*(ctypes.c_void_p(t.data_ptr()) for t in arrays), ctypes.c_int(n))
    expected, expected_tangents = torch.func.jvp(
        lambda v: by_autograd(function, v), (values.double(),), (tangents.double(),)
    )
    close = {"rtol": 1e-12, "atol": 1e-12} if kind == "double" else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(results, expected.to(dtype), **close)
    # At the kinks of the last unit a second derivative is not defined.
    tangents_of = [t[:, :-1].to(dtype) for t in (result_tangents, expected_tangents)]
    torch.testing.assert_close(*tangents_of, **close)
