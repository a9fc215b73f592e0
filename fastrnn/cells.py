"""Cells from papers, defined as a user would define them (`fastrnn.cell`).

    layer = fastrnn.cells.light_gru.layer(32, 64)

x = W_ih x_t + b_ih and r = W_hh h_{t-1} + b_hh, by gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.define import cell

__all__ = ["coupled_lstm", "light_gru", "mgu"]


@cell(gates=("f", "g", "o"))
def coupled_lstm(x: Any, r: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """LSTM whose input gate is 1 - f (CIFG; Greff et al. 2017, arXiv:1503.04069)::

    f, o = sigmoid(x_f + r_f), sigmoid(x_o + r_o)
    c_t = f c_{t-1} + (1 - f) tanh(x_g + r_g)
    h_t = o tanh(c_t)
    """
    f, o = torch.sigmoid(x.f + r.f), torch.sigmoid(x.o + r.o)
    c = f * c + (1 - f) * torch.tanh(x.g + r.g)
    return o * torch.tanh(c), c


@cell(gates=("f", "n"))
def mgu(x: Any, r: Any, h: Tensor) -> Tensor:
    """Minimal gated unit (Zhou et al. 2016, arXiv:1603.09420), the forget gate after the product::

    f = sigmoid(x_f + r_f)
    n = tanh(x_n + f r_n)
    h_t = (1 - f) h_{t-1} + f n
    """
    f = torch.sigmoid(x.f + r.f)
    n = torch.tanh(x.n + f * r.n)
    return h + f * (n - h)


@cell(gates=("z", "n"))
def light_gru(x: Any, r: Any, h: Tensor) -> Tensor:
    """Light GRU (Ravanelli et al. 2018, arXiv:1803.10225), without its batch normalisation::

    z = sigmoid(x_z + r_z)
    n = relu(x_n + r_n)
    h_t = z h_{t-1} + (1 - z) n
    """
    z = torch.sigmoid(x.z + r.z)
    return z * h + (1 - z) * torch.relu(x.n + r.n)
