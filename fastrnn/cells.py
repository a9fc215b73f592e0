"""Cells from papers, defined as a user would define them (`fastrnn.cell`).

    layer = fastrnn.cells.light_gru.layer(32, 64)

x = W_ih x_t + b_ih and r = W_hh h_{t-1} + b_hh, by gate; w: a vector of one value a unit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.define import cell

__all__ = ["coupled_lstm", "indrnn", "light_gru", "mgu", "peephole_lstm", "slstm"]


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


@cell(gates=("i", "f", "g", "o"))
def peephole_lstm(
    x: Any, r: Any, h: Tensor, c: Tensor, *, w_i: Tensor, w_f: Tensor, w_o: Tensor
) -> tuple[Tensor, Tensor]:
    """LSTM with peepholes (Gers and Schmidhuber 2000; Greff et al. 2017, arXiv:1503.04069)::

    i, f = sigmoid(x_i + r_i + w_i c_{t-1}), sigmoid(x_f + r_f + w_f c_{t-1})
    c_t = f c_{t-1} + i tanh(x_g + r_g)
    o = sigmoid(x_o + r_o + w_o c_t)
    h_t = o tanh(c_t)
    """
    i = torch.sigmoid(x.i + r.i + w_i * c)
    f = torch.sigmoid(x.f + r.f + w_f * c)
    c = f * c + i * torch.tanh(x.g + r.g)
    return torch.sigmoid(x.o + r.o + w_o * c) * torch.tanh(c), c


@cell(gates=("n",), recurrent="diagonal")
def indrnn(x: Any, r: Any, h: Tensor) -> Tensor:
    """Independently recurrent network (Li et al. 2018, arXiv:1803.04831): W_hh is a vector::

    h_t = relu(x_n + r_n)
    """
    return torch.relu(x.n + r.n)


@cell(gates=("i", "f", "z", "o"), recurrent="heads")
def slstm(
    x: Any, r: Any, h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sLSTM (Beck et al. 2024, arXiv:2405.04517, equations 8 to 17), W_hh by head::

    log f = logsigmoid(x_f + r_f)    log i = x_i + r_i
    m_t = max(log f + m_{t-1}, log i)
    f', i' = exp(log f + m_{t-1} - m_t), exp(log i - m_t)
    c_t = f' c_{t-1} + i' tanh(x_z + r_z)
    n_t = f' n_{t-1} + i'
    h_t = sigmoid(x_o + r_o) c_t / n_t
    """
    log_f, log_i = F.logsigmoid(x.f + r.f) + m, x.i + r.i
    m = torch.maximum(log_f, log_i)
    f, i = torch.exp(log_f - m), torch.exp(log_i - m)
    c = f * c + i * torch.tanh(x.z + r.z)
    n = f * n + i
    return torch.sigmoid(x.o + r.o) * c / n, c, n, m
