"""Cells for the tests of fastrnn/codegen: torch's, and some for what they have in common."""

import re

import pytest
import torch
import torch.nn.functional as F

from fastrnn.codegen import generate


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


def three_states(x, r, h, c, n, *, w, v):
    """Not among CELLS, whose functions in C++ take no arrays."""
    i = torch.sigmoid(x.i + r.i + w * c)
    c = (1 - i) * c + v * i * torch.tanh(x.g + r.g)
    n = 0.5 * n + i * v
    return c / (1 + n * n), c, n


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
