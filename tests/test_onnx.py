"""torch.onnx.export of fastrnn's layers: standard ONNX nodes, dynamic T and B, equal results."""

import copy
import inspect
import io
import itertools
import subprocess
import sys
from collections import Counter

import pytest
import torch
from helpers import (
    CELLS,
    assert_same,
    cell_pair,
    cell_state,
    flat,
    in_double,
    is_lstm,
    pair,
    ragged,
    random_state,
)
from torch import nn
from torch.export import Dim, export
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import fastrnn
from fastrnn.registered import TORCH_CELLS
from fastrnn.when_imported import when_imported

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
reference = pytest.importorskip("onnx.reference")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.cpu("ONNX Runtime runs on the CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name. . will not be used:UserWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning"),
]

NODES = ["LSTM", "GRU", "RNN"]
SIZES = [(4, 3), (1, 1), (9, 1), (1, 6), (7, 17)]  # (T, B); the first is exported
T_AND_B = {0: "T", 1: "B"}


class Parallel(nn.Module):
    """Modules in parallel, each with its own arguments, as every export takes a second."""

    def __init__(self, modules):
        super().__init__()
        self.all = nn.ModuleList(modules)

    def forward(self, *args):
        return [flat(module(*own)) for module, own in zip(self.all, args, strict=True)]


def exported(model, args, **options):
    """The model in ONNX, validated by onnx.checker."""
    proto = torch.onnx.export(model, args, verbose=False, **options).model_proto
    onnx.checker.check_model(proto, full_check=True)
    return proto


def nodes(proto):
    """The number of LSTM, GRU and RNN nodes; every node is of the standard domain."""
    assert {opset.domain for opset in proto.opset_import} == {""}
    assert not proto.functions
    return Counter(n.op_type for n in proto.graph.node if n.op_type in NODES)


def runtime_of(proto):
    """A function that runs the model in ONNX Runtime."""
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(*args):
        arrays = [t.numpy() for t in flat(args)]
        names = [i.name for i in session.get_inputs()]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in found]

    return run


#: (options, whether states are passed), covering every pair of option values.
CASES = [
    ({}, False),
    ({"bidirectional": True, "bias": False, "batch_first": True}, True),
    ({"num_layers": 2, "bias": False}, True),
    ({"num_layers": 2, "bidirectional": True, "batch_first": True}, False),
    ({"num_layers": 3, "batch_first": True, "dropout": 0.5}, True),
    ({"num_layers": 3, "bidirectional": True, "bias": False}, False),
]


def arguments(layer, with_states, T, B):
    shape = (B, T) if layer.batch_first else (T, B)
    x = torch.randn(*shape, layer.input_size)
    return (x, random_state(layer, B)) if with_states else (x,)


def dynamic_dims(layer, with_states):
    """The dimensions of the arguments that are dynamic."""
    of_x = {0: "B", 1: "T"} if layer.batch_first else T_AND_B
    of_states = ({1: "B"},) * 2 if is_lstm(layer) else {1: "B"}
    return (of_x, of_states) if with_states else (of_x,)


@pytest.mark.parametrize(
    ("node", "kinds"),
    [("LSTM", ["lstm"]), ("GRU", ["gru"]), ("RNN", ["rnn_tanh", "rnn_relu"])],
    ids=NODES,
)
def test_options_and_dynamic_sizes(node, kinds):
    sizes = itertools.cycle([(1, 17), (17, 33), (33, 1), (17, 17), (33, 33)])  # of I and H
    layers = [
        (pair(kind, *next(sizes), **options)[0], with_states)
        for kind, (options, with_states) in itertools.product(kinds, CASES)
    ]
    model = Parallel([layer for layer, _ in layers]).eval()
    args = [arguments(*layer, *SIZES[0]) for layer in layers]
    shapes = tuple(dynamic_dims(*layer) for layer in layers)
    proto = exported(model, tuple(args), dynamic_shapes=(shapes,))
    assert nodes(proto) == {node: 12 * len(kinds)}
    output = proto.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in output[:2]] == ["T", "B"]
    run = runtime_of(proto)
    for T, B in SIZES:
        args = [arguments(*layer, T, B) for layer in layers]
        with torch.no_grad():
            assert_close(run(*args), flat(model(*args)))


def test_cells_unbatched_input_and_training_mode():
    cells = [cell_pair(kind, 5, 17)[0] for kind in CELLS]
    unbatched = fastrnn.LSTM(5, 17), fastrnn.GRU(5, 17)
    model = Parallel([*cells, *unbatched, fastrnn.RNN(5, 17, dropout=0.5, recompute=True)])

    def inputs(T, B):
        x = torch.randn(T, B, 5)
        of_cells = [(x[0], cell_state(cell, B)) for cell in cells]
        return [*of_cells, (x[:, 0],), (x[:, 0], random_state(unbatched[1])), (x,)]

    of_cells = [({0: "B"}, ({0: "B"},) * 2 if is_lstm(cell) else {0: "B"}) for cell in cells]
    shapes = (*of_cells, ({0: "T"},), ({0: "T"}, None), (T_AND_B,))
    proto = exported(model, tuple(inputs(4, 3)), dynamic_shapes=(shapes,))
    assert nodes(proto) == {"LSTM": 2, "GRU": 2, "RNN": 3}
    run = runtime_of(proto)
    for T, B in SIZES:
        args = inputs(T, B)
        with torch.no_grad():
            assert_close(run(*args), flat(model(*args)))


class Tagger(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}
        self.embedding = nn.Embedding(11, 5)
        self.rnn = nn.LSTM(5, hidden_size, **options)
        self.head = nn.Linear(2 * hidden_size, 3)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


def tagger(hidden_size):
    """A model, its arguments and their dynamic dimensions."""
    model = fastrnn.accelerate(Tagger(hidden_size)).eval()
    return model, (torch.randint(11, (3, 4)),), ({0: "B", 1: "T"},)


def assert_same_tags(proto, model):
    run = runtime_of(proto)
    for T, B in SIZES:
        x = torch.randint(11, (B, T))
        with torch.no_grad():
            assert_close(run(x), [model(x)])


def test_exported_program():
    model, args, _ = tagger(17)
    shapes = ({0: Dim("B"), 1: Dim("T")},)
    proto = exported(export(model, args, dynamic_shapes=shapes), ())
    assert nodes(proto) == {"LSTM": 2}
    assert_same_tags(proto, model)


def test_weights_are_folded_to_constants_on_load(tmp_path):
    """ONNX Runtime reorders the gates once, on load, not in every call."""
    model, args, shapes = tagger(200)  # too large for the exporter's own constant folding
    torch.onnx.export(model, args, tmp_path / "model.onnx", dynamic_shapes=shapes, verbose=False)
    proto = onnx.load(tmp_path / "model.onnx")
    assert nodes(proto) == {"LSTM": 2}
    assert_same_tags(proto, model)
    assert "Split" in {n.op_type for n in proto.graph.node}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    graph = onnx.load(tmp_path / "loaded.onnx").graph
    weights = {name for n in graph.node if n.op_type == "LSTM" for name in n.input[1:4]}
    assert len(weights) == 6
    assert weights <= {i.name for i in graph.initializer}
    assert "Split" not in {n.op_type for n in graph.node}


ONE_PER_NODE = ["lstm", "gru", "rnn_tanh"]


def test_float16():
    """ONNX Runtime has no float16 kernels: it computes in float32 and rounds the results."""
    model = Parallel([pair(kind, 17, 33, dtype=torch.float16)[0] for kind in ONE_PER_NODE])
    args = [(torch.randn(4, 3, 17, dtype=torch.float16),) for _ in ONE_PER_NODE]
    run = runtime_of(exported(model, tuple(args)))
    with torch.no_grad():
        assert_same(run(*args), model(*args), in_double(model, *args), strides=False)


def test_dtypes_without_onnx_runtime_kernels():
    kinds = itertools.product([torch.float64, torch.bfloat16], ONE_PER_NODE)
    layers = [pair(kind, 5, 17, dtype=dtype)[0] for dtype, kind in kinds]
    model = Parallel(layers)
    args = [(torch.randn(4, 3, 5, dtype=layer.weight_ih_l0.dtype),) for layer in layers]
    proto = exported(model, tuple(args), opset_version=22)
    assert nodes(proto) == {"LSTM": 2, "GRU": 2, "RNN": 2}
    with torch.no_grad():
        expected, exact = model(*args), in_double(model, *args)
    assert_same(run_reference_evaluator(proto, args), expected, exact, strides=False)


def run_reference_evaluator(proto, args):
    """The results of onnx.reference.ReferenceEvaluator, in the model's dtypes."""
    names = [i.name for i in proto.graph.input]
    arrays = [onnx.numpy_helper.to_array(tensor_of(t)) for t in flat(args)]
    found = reference.ReferenceEvaluator(proto).run(None, dict(zip(names, arrays, strict=True)))
    # torch does not accept ml_dtypes.bfloat16, so convert through float64, which is exact.
    return [torch.from_numpy(a.astype("float64")).to(getattr(torch, str(a.dtype))) for a in found]


def tensor_of(t):
    """An ONNX TensorProto with the tensor's bytes."""
    kind = {torch.float64: onnx.TensorProto.DOUBLE, torch.bfloat16: onnx.TensorProto.BFLOAT16}
    data = t.contiguous().view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor("", kind[t.dtype], t.shape, data, raw=True)


# ---- what ONNX's nodes do not support -----------------------------------------------------------


class PackedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fastrnn.GRU(5, 17)

    def forward(self, data, batch_sizes):
        return self.rnn(PackedSequence(data, batch_sizes))[0].data


class CellModel(nn.Module):
    """A network of a cell that the test takes from those that torch has."""

    def forward(self, x, h, w_ih, w_hh):
        return fastrnn.functional.rnn(
            "gru", x, h, None, [w_ih, w_hh], has_biases=False, num_layers=1, bidirectional=False
        )[0]


class WithOption(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer, self.name = fastrnn.LSTM(5, 17), name

    def forward(self, x, value):
        return self.layer(x, **{self.name: self.name == "return_states" or value})[0]


UNROLLED = (
    "; a model that calls fastrnn.reference.run instead is exported step by step, for a fixed T"
)
X = torch.randn(4, 3, 5)
REFUSED = {
    "proj_size": (
        lambda: fastrnn.LSTM(5, 17, proj_size=3), (X,),
        "fastrnn: ONNX's LSTM has no projection, expected proj_size=0, got 3" + UNROLLED,
    ),
    "dropout": (
        lambda: fastrnn.GRU(5, 17, num_layers=2, dropout=0.5), (X,),
        "fastrnn: ONNX's GRU has no dropout, got dropout=0.5 in training mode; call model.eval() "
        "before the export",
    ),
    "packed": (
        PackedModel, tuple(ragged([4, 2, 1], 5)[:2]),
        "fastrnn: ONNX's GRU takes no PackedSequence, expected a padded tensor; else "
        "fastrnn.restore(model), which torch.onnx.export(dynamo=False) takes",
    ),
    "cell": (
        CellModel, (X, torch.randn(1, 3, 17), torch.randn(51, 5), torch.randn(51, 17)),
        "fastrnn: ONNX has no node for the cell 'gru', expected one of: lstm, rnn_tanh, rnn_relu"
        + UNROLLED,
    ),
    "resets": (
        lambda: WithOption("resets"), (X, torch.rand(4, 3) < 0.3),
        "fastrnn: ONNX's LSTM has no resets, expected resets=None" + UNROLLED,
    ),
    "lengths": (
        lambda: WithOption("lengths"), (X, torch.tensor([2, 4, 3])),
        "fastrnn: ONNX's LSTM, GRU and RNN have no resets and lengths, expected a call without"
        + UNROLLED,
    ),
    "return_states": (
        lambda: WithOption("return_states"), (X, torch.ones(1)),
        "fastrnn: ONNX's LSTM has no option return_states, got return_states=True" + UNROLLED,
    ),
    "bfloat16": (
        lambda: fastrnn.RNN(5, 17, dtype=torch.bfloat16), (X.bfloat16(),),
        "fastrnn: ONNX's RNN takes bfloat16 from opset 22 on, got opset 20; give torch.onnx.export "
        "opset_version=22",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_features_raise(case, monkeypatch):
    if case == "cell":
        cells = {name: cell for name, cell in TORCH_CELLS.items() if name != "gru"}
        monkeypatch.setattr("fastrnn.onnx.TORCH_CELLS", cells)
    build, args, text = REFUSED[case]
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        torch.onnx.export(build(), args, verbose=False)
    # The error is in the exporter's summary, and it is the root cause of the exporter's own errors.
    assert f"## Exception summary\n\n<class 'NotImplementedError'>: {text}\n" in str(error.value)
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert type(cause) is NotImplementedError
    assert str(cause) == text


class Unrolled(nn.Module):
    """The workaround that these errors name: fastrnn.reference.run, unrolled by the exporter."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, h, c):
        return fastrnn.reference.run(
            "lstm", x, h, c, list(self.layer.parameters()),
            has_biases=True, num_layers=1, bidirectional=False,
        )  # fmt: skip


def test_unrolled_projection():
    layer = fastrnn.LSTM(5, 17, proj_size=3)
    model = Unrolled(layer)
    shapes = ({1: "B"}, {1: "B"}, {1: "B"})
    proto = exported(model, (X[:2], *random_state(layer, 3)), dynamic_shapes=shapes)
    for B in [1, 6]:
        x, states = torch.randn(2, B, 5), random_state(layer, B)
        with torch.no_grad():
            assert_close(runtime_of(proto)(x, *states), flat(layer(x, states)))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fastrnn.LSTM(5, 17, bidirectional=True)

    def forward(self, x, lengths):
        output, last = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0], last


def export_torchscript(model, args):
    buffer = io.BytesIO()
    torch.onnx.export(
        model, args, buffer, dynamo=False, input_names=["x", "lengths"],
        dynamic_axes={"x": {0: "T", 1: "B"}, "lengths": {0: "B"}},
    )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())


def test_torchscript_exporter_takes_restored_layers():
    model = Padded().eval()
    args = torch.randn(4, 3, 5), torch.tensor([4, 1, 2])
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="fastrnn::forward"):
        export_torchscript(model, args)
    proto = export_torchscript(fastrnn.restore(copy.deepcopy(model)), args)
    assert nodes(proto) == {"LSTM": 1}
    x, lengths = torch.randn(6, 2, 5), torch.tensor([3, 6])
    with torch.no_grad():
        assert_close(runtime_of(proto)(x, lengths), flat(model(x, lengths)))


# ---- when the translation is registered ---------------------------------------------------------

LATER = """
import sys, fastrnn
assert not {"onnx", "onnxscript", "torch.onnx", "fastrnn.onnx"} & set(sys.modules)
from onnxscript.function_libs.torch_lib.registration import default_registry
assert "fastrnn::forward" in default_registry
"""


def test_import_does_not_import_onnx():
    found = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_when_imported(tmp_path, monkeypatch):
    for name in ["a_module_of_a_test", "another_module_of_a_test"]:
        (tmp_path / f"{name}.py").write_text("value = 17\n")
    monkeypatch.syspath_prepend(tmp_path)
    found, finders = [], list(sys.meta_path)
    when_imported("a_module_of_a_test", lambda module: found.append(module.value))
    assert found == []
    import a_module_of_a_test
    import another_module_of_a_test  # found by the same loader, pytest's

    assert found == [17]
    when_imported("a_module_of_a_test", lambda module: found.append(module.value + 1))
    assert found == [17, 18]
    assert sys.meta_path == finders
    assert type(a_module_of_a_test.__loader__) is type(another_module_of_a_test.__loader__)
    assert a_module_of_a_test.__spec__.loader is a_module_of_a_test.__loader__
    assert inspect.getsource(a_module_of_a_test) == "value = 17\n"
