"""What fastrnn/codegen refuses: each error has the line, what was found and what to do."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from codegen_cells import rnn_tanh

from fastrnn.codegen import CellError, generate

pytestmark = [pytest.mark.once, pytest.mark.cpu("needs no device")]


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


def five_states(x, r, h, a, b, c, d):  # here
    return x.a


def unused_vector(x, r, h, *, w):  # here
    return x.a


def vector_of_torch(x, r, h, *, weight_ih):  # here
    return x.a * weight_ih


def a_vectors_default(x, r, h, *, w=1):  # here
    return x.a * w


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
        (five_states, "its parameters are (x, r, h, a, b, c, d)", "up to 4 states"),
        (unused_vector, "the vector 'w' is not used", "use it, or take it out"),
        (vector_of_torch, "the vector 'weight_ih' has a name of torch's", "rename it"),
        (a_vectors_default, "its parameters are (x, r, h, *, w=1)", "without defaults"),
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
