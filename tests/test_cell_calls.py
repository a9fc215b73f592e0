"""Cells with weights that are computed at each call, under autocast, in autograd and modes."""

import contextlib

import pytest
import torch
from helpers import CELLS, FULL, LOW, avoid_relu_kinks, cell_pair, cell_state, device, flat, mapped
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.overrides import TorchFunctionMode

import fastrnn
from fastrnn import _C, functional

BATCHES = [None, 1, 3]
WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


class Computed(nn.Module):
    """A parametrization that notes each call."""

    def __init__(self, name, log, compute):
        super().__init__()
        self.name, self.log, self.compute = name, log, compute

    def forward(self, weight):
        self.log.append(self.name)
        return self.compute(weight)


def cells(kind, swap="built", **options):
    """Our cell and torch's with equal weights."""
    ours, theirs = cell_pair(kind, 3, 4, **options)
    if swap != "built":
        ours = cell_pair(kind, 3, 4, **options)[1]
        ours.load_state_dict(theirs.state_dict())
        fastrnn.accelerate(ours, keep_types=swap == "types kept")
    return ours, theirs


def computed_by(cell, names=WEIGHTS, compute=lambda weight: weight * 1.5):
    """The names of the weights that the cell computes, in the order of computation."""
    log = []
    for name in names:
        parametrize.register_parametrization(cell, name, Computed(name, log, compute), unsafe=True)
    log.clear()
    return log


def arguments(cell, B):
    x, state = torch.randn(B or 1, 3), cell_state(cell, B or 1)
    if B is not None:
        return x, state
    return x[0], tuple(s[0] for s in state) if isinstance(state, tuple) else state[0]


def assert_same(ours, theirs, **tolerances):
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def result_or_error(call):
    try:
        return call()
    except Exception as error:
        return error


def assert_same_answer(ours, theirs, **tolerances):
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
    else:
        assert_same(ours, theirs, **tolerances)


def by_the_operator(cell, *args):
    """The results of torch's forward code and fastrnn's operator."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_C, "step", lambda *args: None)
        return type(cell).forward.__wrapped__(cell, *args)


@pytest.fixture
def only_fast_path(monkeypatch):
    """Make torch's forward code, which calls fastrnn.functional, raise."""
    monkeypatch.setattr(functional, "_cell", None)


# ---- weights that are computed at each call ------------------------------------------------------


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("swap", ["built", "accelerated", "types kept"])
@pytest.mark.parametrize("kind", CELLS)
def test_each_weight_is_computed_once(kind, swap, B, only_fast_path):
    ours, theirs = cells(kind, swap)
    logs = computed_by(ours), computed_by(theirs)
    x, state = arguments(ours, B)
    for args in [(x, state), (x,)]:
        results = ours(*args), theirs(*args)
        assert_same(*results)
        assert logs[0] == logs[1] == WEIGHTS
        grads = [
            torch.autograd.grad(sum(s.sin().sum() for s in flat(result)), [*cell.parameters()])
            for result, cell in zip(results, (ours, theirs), strict=True)
        ]
        assert_same(*grads)
        for log in logs:
            log.clear()


@pytest.mark.parametrize("names", [["weight_hh"], ["bias_ih", "weight_ih"]])
@pytest.mark.parametrize("kind", CELLS)
def test_some_weights_are_computed(kind, names, only_fast_path):
    ours, theirs = cells(kind)
    logs = [computed_by(cell, names) for cell in (ours, theirs)]
    args = arguments(ours, 3)
    assert_same(ours(*args), theirs(*args))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("keep_types", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_parametrized_cells_are_accelerated(kind, keep_types, only_fast_path):
    theirs = cells(kind)[1]
    log = computed_by(theirs)
    args = arguments(theirs, 3)
    expected = theirs(*args)
    assert_same(fastrnn.accelerate(theirs, keep_types=keep_types)(*args), expected)
    assert log == WEIGHTS * 2


@pytest.mark.parametrize("kind", CELLS)
def test_cached_parametrizations(kind, only_fast_path):
    ours, _ = cells(kind)
    log = computed_by(ours)
    args = arguments(ours, 3)
    with parametrize.cached():
        first, second = ours(*args), ours(*args)
    assert log == WEIGHTS
    assert_same(first, second)


CONTEXTS = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast(device(), torch.bfloat16),
    "function mode": Mode,
    "no grad": torch.no_grad,
}
COMPUTE = {
    "narrower": lambda weight: weight[..., :-1],
    "float64": lambda weight: weight.double(),
    "complex": lambda weight: weight.to(torch.complex64),
    "subclass": lambda weight: weight.as_subclass(Subclass),
    "on meta": lambda weight: weight.to("meta"),
    "not a tensor": lambda weight: 3,
    "none": lambda weight: None,
}


@pytest.mark.parametrize("B", [None, 3])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", CELLS)
def test_weights_that_the_kernels_refuse(kind, compute, context, B):
    """They too are computed once, and give torch's results or its error."""
    ours, theirs = cells(kind)
    x, state = arguments(ours, B)
    answers, logs = [], []
    for cell in (ours, theirs):
        logs.append(computed_by(cell, ["weight_hh", "bias_hh"], COMPUTE[compute]))
        with CONTEXTS[context]():
            answers.append(result_or_error(lambda cell=cell: cell(x, state)))
    low = {"rtol": 0.02, "atol": 0.02} if context == "autocast" else {}
    assert_same_answer(*answers, **low)
    assert logs[0] == logs[1] == ["weight_hh", "bias_hh"]


@pytest.mark.parametrize("kind", CELLS)
def test_arguments_that_are_refused_before_or_after_the_weights(kind):
    ours, theirs = cells(kind)
    x, state = arguments(ours, 3)
    logs = [computed_by(cell) for cell in (ours, theirs)]
    for args in [(x[:, :2], state), (x[None], state), (x[:2], state), (x[0], state), (x, 3)]:
        answers = [
            result_or_error(lambda cell=cell, args=args: cell(*args)) for cell in (ours, theirs)
        ]
        assert_same_answer(*answers)
        assert isinstance(answers[0], Exception)
        assert logs[0] == logs[1]


@pytest.mark.parametrize("kind", CELLS)
def test_errors_of_weights(kind):
    """The user's error, and torch's where an attribute is missing."""

    def refuse(weight):
        raise KeyError("the user's")

    cell, _ = cells(kind)
    args = arguments(cell, 3)
    computed_by(cell, ["weight_hh"], refuse)
    with pytest.raises(KeyError, match="the user's"):
        cell(*args)
    answers = []
    for cell in cells(kind):
        del cell.weight_hh
        answers.append(result_or_error(lambda cell=cell: cell(*args)))
    assert isinstance(answers[0], AttributeError)
    assert_same_answer(*answers)


REPLACED = {
    "weight_norm": lambda cell: parametrizations.weight_norm(cell, "weight_hh"),
    "spectral_norm": lambda cell: parametrizations.spectral_norm(cell.eval(), "weight_hh"),
    "the old weight_norm": lambda cell: weight_norm(cell, "weight_hh"),
    "pruning": lambda cell: prune.l1_unstructured(cell, "weight_hh", amount=3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("replace", REPLACED)
@pytest.mark.parametrize("kind", CELLS)
def test_replaced_parameters(kind, replace, only_fast_path):
    ours, theirs = cells(kind)
    args = arguments(ours, 3)
    results = []
    for cell in (ours, theirs):
        torch.manual_seed(1)
        REPLACED[replace](cell)
        loss = sum(s.sin().sum() for s in flat(cell(*args)))
        results.append([loss.detach(), *torch.autograd.grad(loss, [*cell.parameters()])])
    assert_same(*results)


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("kind", CELLS)
def test_autocast_gives_the_operators_bits(kind, B, low, inside):
    """With a backward pass inside the block of autocast, or after it."""
    cell, _ = cells(kind)
    x, state = arguments(cell, B)
    found = []
    for call in [type(cell).forward, by_the_operator]:
        given = [t.clone().requires_grad_() for t in (x, *flat(state))]
        hx = tuple(given[1:]) if isinstance(state, tuple) else given[1]
        with torch.autocast(device(), low):
            with pytest.MonkeyPatch.context() as patched:
                if call is not by_the_operator:
                    patched.setattr(functional, "_cell", None)
                results = flat(call(cell, given[0], hx))
            loss = sum(t.float().sin().sum() for t in results)
            if inside:
                grads = torch.autograd.grad(loss, [*given, *cell.parameters()])
        if not inside:
            grads = torch.autograd.grad(loss, [*given, *cell.parameters()])
        found.append([*results, *grads])
    for a, b in zip(*found, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_autocast_gives_torchs_dtypes(kind, bias):
    ours, theirs = cells(kind, bias=bias)
    for dtype in [*FULL, *LOW]:
        args = mapped(arguments(ours, 3), lambda t, dtype=dtype: t.to(dtype))
        for given in [args, args[:1]]:
            with torch.autocast(device(), torch.bfloat16):
                answers = [
                    result_or_error(lambda cell=cell, given=given: cell(*given))
                    for cell in (ours, theirs)
                ]
            assert_same_answer(*answers, rtol=0.02, atol=0.02)
            if not isinstance(answers[1], Exception):
                assert [t.dtype for t in flat(answers[0])] == [t.dtype for t in flat(answers[1])]


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("kind", CELLS)
def test_an_input_of_two_steps(kind, B):
    """Its gradients are summed in place."""
    cell, _ = cell_pair(kind, 3, 4, dtype=torch.float64)
    avoid_relu_kinks(kind, cell)
    x, state = arguments(cell, B)
    given = [t.double().requires_grad_() for t in (x, *flat(state))]

    def two_steps(x, *state):
        hx = state if len(state) == 2 else state[0]
        return cell(x, cell(x, hx))

    assert torch.autograd.gradcheck(two_steps, given)
    assert torch.autograd.gradgradcheck(two_steps, given)


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_one_node(kind):
    """Between leaves and results there are no views, whose backward takes as long as a step's."""
    cell, _ = cells(kind)
    given = [t.requires_grad_() for t in flat(arguments(cell, 3))]
    hx = tuple(given[1:]) if len(given) == 3 else given[1]
    node = flat(cell(given[0], hx))[0].grad_fn
    assert node.name() == "FastrnnBackward"
    leaves = [n.variable for n, _ in node.next_functions if n is not None]
    assert all(a is b for a, b in zip(leaves, [*given, *cell.parameters()], strict=True))


# ---- function modes ------------------------------------------------------------------------------


class Named(TorchFunctionMode):
    """Passes calls on, and answers those of a cell's function by `answer` if it is given."""

    def __init__(self, name, log, answer=None):
        super().__init__()
        self.name, self.log, self.answer = name, log, answer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        self.log.append((self.name, name, len(args), kwargs or {}))
        if self.answer and name.endswith("_cell"):
            return self.answer()
        return function(*args, **(kwargs or {}))


def refuse():
    raise KeyError("the user's")


@pytest.mark.parametrize("answer", [None, refuse, lambda: NotImplemented, lambda: 7])
@pytest.mark.parametrize("kind", CELLS)
def test_nested_function_modes(kind, answer):
    """The inner mode is called first, and an answer or an error of the outer one is the result."""
    found = []
    for cell in cells(kind):
        args, log = arguments(cell, 3), []
        with Named("outer", log, answer), Named("inner", log):
            found.append((result_or_error(lambda cell=cell, args=args: cell(*args)), log))
    (ours, our_log), (theirs, their_log) = found
    assert our_log == their_log
    assert type(ours) is type(theirs)
    if isinstance(theirs, KeyError):
        assert str(ours) == str(theirs)
