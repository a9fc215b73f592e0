"""Cells of one's own for the tests, in a module, so that they can be pickled by name.

And their layers' values and gradients by a loop of the definition.
"""

import torch
from helpers import flat, leaves
from torch import nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import cells, reference


@fastrnn.cell(gates=("i", "f", "g", "o"))
def own_lstm(x, r, h, c):
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@fastrnn.cell(gates=("r", "z", "n"))
def own_gru(x, r, h):
    n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
    return n + torch.sigmoid(x.z + r.z) * (h - n)


@fastrnn.cell(gates=("f", "g", "o"))
def coupled_lstm(x, r, h, c):
    f, o = torch.sigmoid(x.f + r.f), torch.sigmoid(x.o + r.o)
    c = f * c + (1 - f) * torch.tanh(x.g + r.g)
    return o * torch.tanh(c), c


@fastrnn.cell(gates=("f", "n"))
def mgu(x, r, h):
    """Minimal gated unit (Zhou et al. 2016)."""
    f = torch.sigmoid(x.f + r.f)
    n = torch.tanh(x.n + f * r.n)
    return h + f * (n - h)


@fastrnn.cell(gates=("z", "n"))
def light_gru(x, r, h):
    """Light GRU (Ravanelli et al. 2018), without its batch normalisation."""
    z = torch.sigmoid(x.z + r.z)
    return z * h + (1 - z) * torch.relu(x.n + r.n)


@fastrnn.cell(gates=("a", "b"))
def many_functions(x, r, h, c):
    """No cell of any paper: what functions.py has, in one step."""
    a = torch.nn.functional.softplus(x.a + r.a) + torch.exp(-torch.square(x.b))
    c = torch.where(r.b > 0.1, torch.log(a + 1.5), 0.3 * c) + 0.1 * torch.nn.functional.silu(x.b)
    d = torch.clamp(c + h, -0.7, 0.9) / torch.sqrt(1 + c * c)
    return torch.maximum(d, torch.minimum(h, c) * 0.5) + 0.1 * torch.erf(h).abs(), c


CELLS = [own_lstm, own_gru, coupled_lstm, mgu, light_gru, many_functions]


@fastrnn.cell(gates=("i", "g", "o"), initial={"n": 1.0}, init={"w": 0.5, "bias_ih": nn.init.ones_})
def weighted(x, r, h, c, n, *, w, scale):
    """Three states and two vectors."""
    i = torch.sigmoid(x.i + r.i + w * c)
    c = (1 - i) * c + i * torch.tanh(x.g + r.g)
    n = 0.5 * n + torch.exp(-torch.abs(scale * n)) * i
    return torch.sigmoid(x.o + r.o) * c / (1 + n * n) + 0.1 * h, c, n


@fastrnn.cell(gates=("f", "g"), recurrent="diagonal")
def diagonal_lstm(x, r, h, c, *, w_f):
    f = torch.sigmoid(x.f + r.f + w_f * c)
    c = f * c + (1 - f) * torch.tanh(x.g + r.g)
    return torch.tanh(c) + 0.2 * h, c


@fastrnn.cell(gates=("f", "g"), recurrent="heads")
def head_gru(x, r, h, *, w):
    f = torch.sigmoid(x.f + r.f)
    return f * h + (1 - f) * torch.tanh(x.g + w * r.g)


WIDE = [weighted, cells.peephole_lstm, cells.indrnn, diagonal_lstm, head_gru, cells.slstm]


# ---- values and gradients ------------------------------------------------------------------------


def states_of(module, *batch):
    """Random initial states. n is a denominator, a sum of exponentials: positive."""
    dtype = next(module.parameters()).dtype
    rows, width = [], module.hidden_size
    widths = [width]
    if isinstance(module, nn.RNNBase):
        rows = [module.num_layers * (2 if module.bidirectional else 1)]
        widths = [module.proj_size or width]
    widths += [width] * (len(module.definition.states) - 1)
    states = [torch.randn(*rows, *batch, w, dtype=dtype) for w in widths]
    names = module.definition.states
    states = [s.abs() + 0.5 if name == "n" else s for s, name in zip(states, names, strict=True)]
    return tuple(states) if len(states) > 1 else states[0]


def dense(module, weights):
    """Weights with block-diagonal matrices W_hh [G*H, H] in the place of blocks by head."""

    def of_blocks(weight):
        by_gate = weight.unflatten(1, (len(module.definition.gates), -1)).unbind(1)
        return torch.cat([torch.block_diag(*blocks) for blocks in by_gate])

    if module.definition.recurrent != "heads":
        return weights
    return [of_blocks(weight) if weight.dim() == 3 else weight for weight in weights]


def by_definition(layer, x, hx):
    """The results of a layer by a loop of its definition, in the layout of the arguments."""
    packed = isinstance(x, PackedSequence)
    data, sizes, order, back = x if packed else (x, None, None, None)
    if layer.batch_first and not packed:
        data = data.transpose(0, 1)
    h0, *c0 = (s if order is None else s[:, order] for s in flat(hx))
    output, h_n, c_n = reference.run(
        layer.definition.key, data, h0, torch.cat(c0, -1) if c0 else None,
        dense(layer, layer._flat_weights), sizes, has_biases=layer.bias,
        num_layers=layer.num_layers, bidirectional=layer.bidirectional,
    )  # fmt: skip
    last = [h_n, *(c_n.chunk(len(c0), -1) if c0 else [])]
    last = [s if back is None else s[:, back] for s in last]
    if packed:
        output = PackedSequence(output, sizes, order, back)
    elif layer.batch_first:
        output = output.transpose(0, 1)
    return output, tuple(last) if len(last) > 1 else last[0]


def by_definition_of_step(step, x, hx):
    """The new states of a step by its definition."""
    h, *c = (s.view(1, -1, step.hidden_size) for s in flat(hx))
    _, h_n, c_n = reference.run(
        step.definition.key, x.view(1, -1, x.size(-1)), h, torch.cat(c, -1) if c else None,
        dense(step, step.weights), has_biases=step.bias, num_layers=1, bidirectional=False,
    )  # fmt: skip
    last = [h_n, *(c_n.chunk(len(c), -1) if c else [])]
    return [s.reshape(*x.shape[:-1], -1) for s in last]


def values_and_gradients(call, module, x, hx):
    results = flat(call(x, hx))
    inputs = [*flat(x), *flat(hx), *module.parameters()]
    loss = sum(((i + 1) * t.sin()).sum() for i, t in enumerate(results))
    return [*results, *torch.autograd.grad(loss, inputs)]


def compare(layer, x, hx):
    """Values and gradients with those of the loop."""
    x, hx = leaves((x, hx))
    torch.testing.assert_close(
        values_and_gradients(layer, layer, x, hx),
        values_and_gradients(lambda *args: by_definition(layer, *args), layer, x, hx),
    )


def check_higher_derivatives(layer, x, hx):
    """Forward mode, and gradients of gradients, numerically and by the loop."""
    x, hx = leaves((x, hx))

    def call(x, *states):
        return flat(layer(x, states if len(states) > 1 else states[0]))

    assert torch.autograd.gradcheck(call, (x, *flat(hx)), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *flat(hx)), fast_mode=True)
    _, tangent = jvp(lambda x: layer(x, hx)[0], (x,), (torch.ones_like(x),))
    _, right = jvp(lambda x: by_definition(layer, x, hx)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, right)


def check_models(models, x):
    """vmap over several models' parameters: x [models, T, B, I]."""
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,))[0])(
        parameters, buffers, x
    )
    torch.testing.assert_close(
        found, torch.stack([m(t)[0] for m, t in zip(models, x, strict=True)])
    )


def check_bits(layer, x):
    """The bits do not depend on the number of threads or on other rows of the batch."""
    x.requires_grad_()

    def results(x):
        y, _ = layer(x)
        return [y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])]

    found = results(x)
    torch.set_num_threads(1)
    assert all(map(torch.equal, results(x), found))
    assert torch.equal(layer(x[:, 3:5])[0], found[0][:, 3:5])
