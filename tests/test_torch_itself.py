"""docs/pytorch.md's statements on torch's own layers on the CPU: delete a row that fails here."""

import pytest
import torch
from helpers import slow_after
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch_features import needs_cpu_capabilities, needs_torchs_export_today

pytestmark = [
    pytest.mark.once,
    pytest.mark.cpu("about torch's layers on the CPU"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning"),
]

LAYERS = ["LSTM", "GRU", "RNN"]


@needs_torchs_export_today
@pytest.mark.parametrize("name", LAYERS)
def test_export_freezes_the_number_of_steps(name):
    layer, x = getattr(nn, name)(5, 17), torch.randn(4, 3, 5)
    with pytest.raises(Exception, match="to be a constant"):
        export(layer, (x,), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},)).run_decompositions()


@needs_torchs_export_today
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", slow_after(1, ["GRU", "LSTM", "RNN"]))
def test_onnx_freezes_the_number_of_steps(name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = getattr(nn, name)(5, 17), torch.randn(4, 3, 5)

    def export_and_run():
        shapes = ({0: "T", 1: "B"},)
        program = torch.onnx.export(layer.eval(), (x,), dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        session.run(None, {"input": torch.randn(7, 3, 5).numpy()})

    # An LSTM's or GRU's export succeeds, unless torch.export ran before, but the file takes 4 steps
    # only.
    with pytest.raises(Exception, match=r"inferred a static shape of 4|cannot be reshaped"):
        export_and_run()


@pytest.mark.parametrize("over", ["inputs", "weights"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_vmap(name, over):
    layers = [getattr(nn, name)(5, 17) for _ in range(2)]
    x = torch.randn(2, 4, 3, 5)

    def call(parameters, x):
        return functional_call(layers[0], parameters, (x,))[0]

    states, _ = stack_module_state(layers)
    function, args = (layers[0], (x,)) if over == "inputs" else (call, (states, x))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(function)(*args)


def test_no_forward_mode_of_an_lstm_in_float32():
    layer, x = nn.LSTM(5, 17), torch.randn(4, 3, 5)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(lambda x: layer(x)[0], (x,), (x,))


@needs_cpu_capabilities
def test_no_padded_lstm_in_float16_under_autocast():
    if torch.cpu.get_capabilities()["amx_fp16"]:
        pytest.skip("oneDNN may have a kernel for this CPU's products of float16 matrices")
    layer, x = nn.LSTM(5, 17), torch.randn(4, 3, 5)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(RuntimeError, match="could not create a primitive"),
    ):
        layer(x)


class Counted(nn.Module):
    count = 0

    def forward(self, weight):
        self.count += 1
        return weight


@pytest.mark.parametrize("name", LAYERS)
def test_parametrization_is_evaluated_several_times_per_call(name):
    layer, counted = getattr(nn, name)(5, 17), Counted()
    parametrize.register_parametrization(layer, "weight_hh_l0", counted)
    counted.count = 0
    layer(torch.randn(4, 3, 5))
    assert counted.count > 1
