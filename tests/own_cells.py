"""Cells of one's own for the tests, in a module, so that they can be pickled by name."""

import torch

import fastrnn


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
