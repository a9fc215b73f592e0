"""What docs/pytorch.md says of torch's own layers on the CPU: a row that no longer holds is to go."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, stack_module_state, vmap

pytestmark = [
    pytest.mark.once,
    pytest.mark.cpu("torch's layers there"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning"),
]

LAYERS = ["LSTM", "GRU", "RNN"]


@pytest.mark.parametrize("name", LAYERS)
def test_export_freezes_the_number_of_steps(name):
    layer, x = getattr(nn, name)(5, 17), torch.randn(4, 3, 5)
    with pytest.raises(Exception, match="specialized it to be a constant|inferred to be a constant"):
        export(layer, (x,), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},)).run_decompositions()


@pytest.mark.parametrize("over", ["inputs", "weights", "samples"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_no_vmap(name, over):
    layers = [getattr(nn, name)(5, 17) for _ in range(2)]
    x = torch.randn(2, 4, 3, 5)

    def call(parameters, x):
        return functional_call(layers[0], parameters, (x,))[0]

    own = {name: p.detach() for name, p in layers[0].named_parameters()}
    with pytest.raises(RuntimeError, match="Batching rule not implemented|vmap"):
        if over == "inputs":
            vmap(layers[0])(x)
        elif over == "weights":
            vmap(call)(stack_module_state(layers)[0], x)
        else:
            vmap(grad(lambda p, x: call(p, x).sum()), (None, 0))(own, x)
