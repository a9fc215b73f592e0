"""fastrnn.cells compared with other projects' implementations, from the extra `others`."""

import pytest
import torch
import torch.nn.functional as F

from fastrnn.cells import slstm

pytestmark = [pytest.mark.once, pytest.mark.cpu("others' code, on the CPU")]


@pytest.mark.parametrize("heads", [1, 4])
def test_slstm_is_xlstms(heads):
    """Values and gradients. Their first step has another m, which h and the gradients do not
    depend on."""
    vanilla = pytest.importorskip("xlstm.blocks.slstm.src.vanilla", reason="needs xlstm")
    pointwise = vanilla.slstm_pointwise_function_registry["slstm"]
    layer = slstm.layer(5, 12, heads=heads, dtype=torch.float64)
    x = torch.randn(9, 3, 5, dtype=torch.float64, requires_grad=True)
    w_ih, w_hh, b_ih, b_hh = layer._flat_weights
    gates = F.linear(x, w_ih, b_ih)
    zeros = torch.zeros(4, 3, 12, dtype=torch.float64)
    theirs, last, _ = vanilla.slstm_forward(gates, zeros, w_hh, b_hh, pointwise)
    output, (h, c, n, m) = layer(x)
    torch.testing.assert_close(output, theirs[0, 1:])
    torch.testing.assert_close(h[0], last[0])
    for ours, other in [(c, last[1]), (n, last[2])]:
        torch.testing.assert_close(ours[0] * m[0].exp(), other * last[3].exp())
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(theirs[0, 1:].square().sum(), inputs),
    )
