"""The option `negate_output` of run.py, through every way in which a network is called.

Values and derivatives are compared with those of reference.py.
"""

import functools

import pytest
import torch
from helpers import flat, leaves, mapped

import fastrnn
from fastrnn import _C, ops, reference
from fastrnn.functional import rnn
from fastrnn.network import Network, forward_arguments

T, B, I, H = 4, 3, 5, 7
OPTIONS = {"has_biases": True, "num_layers": 2, "bidirectional": True}
CASES = [(cell, packed) for cell in fastrnn.CELLS for packed in (False, True)]
of_each = pytest.mark.parametrize(("cell", "packed"), CASES)
of_each_cell = pytest.mark.parametrize("cell", fastrnn.CELLS)


def arguments(cell, packed=False):
    """cell, input, h0, c0, weights and batch_sizes, in float64."""
    info = fastrnn.CELLS[cell]
    G = info["gates"]
    weights = [
        torch.rand(shape, dtype=torch.float64) - 0.5
        for inputs in (I, I, 2 * H, 2 * H)
        for shape in [(G * H, inputs), (G * H, H), (G * H,), (G * H,)]
    ]
    sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    x = torch.randn((9, I) if packed else (T, B, I), dtype=torch.float64)
    h0 = torch.randn(4, B, H, dtype=torch.float64)
    c0 = torch.randn(4, B, H, dtype=torch.float64) if info["states"] == 2 else None
    return cell, *leaves((x, h0, c0, weights)), sizes


def results(run, args, **options):
    return [t for t in run(*args, **OPTIONS, **options) if t is not None]


def loss(found):
    """A sum with a different factor for each value, so that a wrong sign or order changes it."""
    return sum((t * torch.linspace(0.5, 1, t.numel()).view(t.shape)).sum() for t in found)


def gradients(found, args, **options):
    return torch.autograd.grad(loss(found), flat(args[1:5]), **options)


negated = functools.partial(rnn, negate_output=True)
expected = functools.partial(reference.run, negate_output=True)


@of_each
def test_off_is_the_default_and_changes_nothing(cell, packed):
    args = arguments(cell, packed)
    found = results(rnn, args)
    torch.testing.assert_close(found, results(reference.run, args))
    explicit = results(rnn, args, negate_output=False)
    torch.testing.assert_close(found, explicit, rtol=0, atol=0)
    output, *states = results(negated, args)
    torch.testing.assert_close([-output, *states], found, rtol=0, atol=0)


@of_each
@pytest.mark.parametrize("recompute", [False, True])
def test_operator_and_autograd(cell, packed, recompute):
    args = arguments(cell, packed)
    found, theirs = results(negated, args, recompute=recompute), results(expected, args)
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(gradients(found, args), gradients(theirs, args))
    with torch.no_grad():
        torch.testing.assert_close(results(negated, args), theirs)


@of_each
def test_fast_path(cell, packed):
    args = arguments(cell, packed)
    _, x, h0, c0, weights, sizes = args
    network = Network(cell, **OPTIONS, dropout=0.0, negate_output=True)
    hx = h0 if c0 is None else (h0, c0)
    found = _C.network(network, x, hx, weights, sizes, None)
    assert found is not None
    theirs = results(expected, args)
    torch.testing.assert_close(list(found), theirs)
    torch.testing.assert_close(gradients(found, args), gradients(theirs, args))


@of_each_cell
def test_double_backward(cell):
    args = arguments(cell)
    second = []
    for run in (negated, expected):
        first = gradients(results(run, args), args, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second.append(torch.autograd.grad(penalty, flat(args[1:5])))
    torch.testing.assert_close(*second)


@of_each_cell
def test_forward_mode(cell):
    cell, x, *others = arguments(cell)
    values = [
        torch.func.jvp(
            lambda x, run=run: tuple(results(run, (cell, x, *others))), (x,), (torch.ones_like(x),)
        )
        for run in (negated, expected)
    ]
    torch.testing.assert_close(*values)


@of_each_cell
@pytest.mark.parametrize("of_models", [False, True], ids=["batch", "models"])
def test_vmap(cell, of_models):
    each = [arguments(cell) for _ in range(2)]
    _, _, h0, c0, weights, _ = each[0]
    stacked = torch.stack([args[1] for args in each])
    w_hh = torch.stack([args[4][1] for args in each])

    def function(run):
        def value(x, weight):
            params = [*weights[:1], weight, *weights[2:]]
            return loss(results(run, (cell, x, h0, c0, params, None)))

        return torch.func.grad(value, argnums=(0, 1) if of_models else 0)

    dims, weight = (0, 0 if of_models else None), w_hh if of_models else weights[1]
    found = torch.func.vmap(function(negated), dims)(stacked, weight)
    theirs = [
        function(expected)(x, weight[i] if of_models else weight) for i, x in enumerate(stacked)
    ]
    for i, one in enumerate(theirs):
        torch.testing.assert_close([t[i] for t in flat(found)], flat(one))


@of_each_cell
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(cell, backend):
    torch._dynamo.reset()  # it compiles a function anew for few cells only
    args = arguments(cell)
    compiled = torch.compile(results, fullgraph=True, backend=backend)
    found, theirs = compiled(negated, args), results(expected, args)
    torch.testing.assert_close(found, theirs)
    torch.testing.assert_close(gradients(found, args), gradients(theirs, args))


def test_compiled_autograd():
    """Its graphs are those of the option's value."""
    args = arguments("lstm")
    leaf = args[1]
    for run, plain in ((rnn, reference.run), (negated, expected), (rnn, reference.run)):

        @torch.compile(backend="aot_eager")
        def backward(found):
            loss(found).backward()

        theirs, *_ = torch.autograd.grad(loss(results(plain, args)), leaf)
        leaf.grad = None
        with torch._dynamo.config.patch(compiled_autograd=True):
            backward(results(run, args))
        torch.testing.assert_close(leaf.grad, theirs)


@of_each
def test_fake_kernels(cell, packed):
    network = Network(cell, **OPTIONS, dropout=0.0, negate_output=True)
    _, x, h0, c0, weights, sizes = arguments(cell, packed)
    call = tuple(forward_arguments(network, x, h0, c0, weights, sizes))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward, call, test_utils=utilities)


def test_layers_are_those_of_torch():
    """A layer does not have the option: it is off."""
    ours, theirs = fastrnn.LSTM(I, H), torch.nn.LSTM(I, H)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I)
    torch.testing.assert_close(ours(x), theirs(x))


def test_onnx_refuses_it():
    class Model(torch.nn.Module):
        def forward(self, x, h0, c0, weights):
            return negated("lstm", x, h0, c0, weights, None, **OPTIONS)

    tensors = mapped(arguments("lstm")[1:5], torch.Tensor.detach)
    with pytest.raises(torch.onnx.OnnxExporterError, match="has no option negate_output"):
        torch.onnx.export(Model(), tensors, verbose=False)
