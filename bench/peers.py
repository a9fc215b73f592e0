"""The same layer in other libraries. Each package is optional, and imported where it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from contestants import STREAMED, Contestant, Problem, name_all
from torch import Tensor

from fastrnn.registered import ONNX_GATES


def weights(given: Problem) -> dict[str, np.ndarray]:
    """w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] of the layer, gates in torch's order."""
    names = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0"}
    names["b_hh"] = "bias_hh_l0"
    state = given.layer.state_dict()
    return {short: state[name].numpy() for short, name in names.items()}


def reorder(weight: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """`weight` [G*H, ...] with its gates in another order."""
    gates = np.split(weight, len(order))
    return np.ascontiguousarray(np.concatenate([gates[gate] for gate in order]))


def tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


# --- ONNX Runtime and OpenVINO -------------------------------------------------------------------


def states_of(cell: str) -> list[str]:
    return ["h", "c"] if cell == "LSTM" else ["h"]


def onnx_model(given: Problem) -> bytes:
    """A model with one node; for streaming the state is among its inputs."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    case = given.case
    cell, order = case.cell, ONNX_GATES[case.cell]
    w = {name: reorder(value, order) for name, value in weights(given).items()}
    initial = {
        "W": w["w_ih"][None],
        "R": w["w_hh"][None],
        "B": np.concatenate([w["b_ih"], w["b_hh"]])[None],
    }
    states = states_of(cell)
    carried = case.mode == "streaming"

    def info(name: str, *sizes: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    node = helper.make_node(
        cell,
        # The empty name stands for the lengths of sequences, which are not given.
        ["x", "W", "R", "B", "", *(f"{s}_0" for s in states if carried)],
        ["y", *(f"{s}_n" for s in states)],
        hidden_size=case.H,
        **({"linear_before_reset": 1} if cell == "GRU" else {}),
    )
    state_sizes = 1, case.B, case.H
    graph = helper.make_graph(
        [node],
        "layer",
        [info("x", case.T, case.B, case.I)]
        + [info(f"{s}_0", *state_sizes) for s in states if carried],
        [info("y", case.T, 1, case.B, case.H)] + [info(f"{s}_n", *state_sizes) for s in states],
        [numpy_helper.from_array(value, name) for name, value in initial.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


def of_runtime(given: Problem, run: Callable[[dict[str, np.ndarray]], list]) -> Contestant:
    """A contestant from a function that runs an ONNX model: inputs by name -> y, h_n and c_n."""
    case = given.case
    x = {"x": given.x.numpy()}
    zeros = {f"{s}_0": np.zeros((1, case.B, case.H), np.float32) for s in states_of(case.cell)}

    def named(outputs: list) -> dict[str, Tensor]:
        y, *last = map(tensor, outputs)
        return name_all([y.squeeze(1), *last])

    if case.mode != "streaming":
        return Contestant(lambda: run(x), lambda: named(run(x)))
    state = zeros

    def step() -> list:
        nonlocal state
        outputs = run({**x, **state})
        state = dict(zip(zeros, outputs[1:], strict=True))
        return outputs

    def results() -> dict[str, Tensor]:
        nonlocal state
        state = zeros
        return named([step() for _ in range(STREAMED)][-1])

    return Contestant(step, results)


def onnx_runtime(given: Problem) -> Contestant:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.case.threads
    # Its threads spin within a run, which makes it faster, but not after it, when they would slow
    # down the next contestant.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        onnx_model(given), options, providers=["CPUExecutionProvider"]
    )
    return of_runtime(given, functools.partial(session.run, None))


def openvino(given: Problem) -> Contestant:
    from openvino import Core

    core = Core()
    compiled = core.compile_model(
        core.read_model(onnx_model(given)),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": given.case.threads,
            "NUM_STREAMS": 1,
            # The default is bfloat16 on CPUs that have it.
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    # A shared output is the request's memory. A state is copied: it is the next input.
    shared = given.case.mode != "streaming"

    def run(inputs: dict[str, np.ndarray]) -> list:
        found = request.infer(inputs, share_inputs=True, share_outputs=shared)
        return list(found.values())

    return of_runtime(given, run)


# --- JAX -----------------------------------------------------------------------------------------


def jax_layer(cell: str, w: dict[str, Any], x: Any) -> tuple[Any, ...]:
    """output, h_n and c_n: one product for all steps of the input, and a scan over the rest."""
    import jax
    import jax.numpy as jnp

    sigmoid = jax.nn.sigmoid
    zeros = jnp.zeros((x.shape[1], w["w_hh"].shape[1]), x.dtype)
    w_hh = w["w_hh"].T
    x_part = x @ w["w_ih"].T + w["b_ih"]

    def lstm(state: Any, x_t: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x_t + (h @ w_hh + w["b_hh"]), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(h: Any, x_t: Any) -> Any:
        x_r, x_z, x_n = jnp.split(x_t, 3, axis=1)
        h_r, h_z, h_n = jnp.split(h @ w_hh + w["b_hh"], 3, axis=1)
        z = sigmoid(x_z + h_z)
        h = (1 - z) * jnp.tanh(x_n + sigmoid(x_r + h_r) * h_n) + z * h
        return h, h

    def rnn(h: Any, x_t: Any) -> Any:
        h = jnp.tanh(x_t + (h @ w_hh + w["b_hh"]))
        return h, h

    step = {"LSTM": lstm, "GRU": gru, "RNN": rnn}[cell]
    last, output = jax.lax.scan(step, (zeros, zeros) if cell == "LSTM" else zeros, x_part)
    return (output, *(last if cell == "LSTM" else (last,)))


def jax_scan(given: Problem) -> Contestant:
    import jax

    w = {name: jax.numpy.asarray(value) for name, value in weights(given).items()}
    x, grad = (jax.numpy.asarray(t.numpy()) for t in (given.x, given.grad))
    layer = functools.partial(jax_layer, given.case.cell)
    if given.case.mode == "inference":
        compiled = jax.jit(layer)
        call = lambda: jax.block_until_ready(compiled(w, x))  # noqa: E731
        return Contestant(call, lambda: layer_results(*map(tensor, call())))

    def loss(w: Any, x: Any) -> Any:
        output = layer(w, x)[0]
        return (output * grad).sum(), output

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def results() -> dict[str, Tensor]:
        (_, output), (grad_w, grad_x) = step(w, x)
        return gradients(output, grad_x, grad_w)

    return Contestant(lambda: jax.block_until_ready(step(w, x)), results)


def layer_results(output: Tensor, *last: Tensor) -> dict[str, Tensor]:
    """The results of a layer from its output and last states [B, H]."""
    return name_all([output, *(t.unsqueeze(0) for t in last)])


def gradients(output: Any, grad_x: Any, grad_w: dict[str, Any]) -> dict[str, Tensor]:
    """The results of a training step under torch's names."""
    found = {"output": tensor(output), "gradient of x": tensor(grad_x)}
    for name, value in grad_w.items():
        long = name.replace("w_", "weight_").replace("b_", "bias_")
        found[f"gradient of {long}_l0"] = tensor(value)
    return found


# --- TensorFlow ----------------------------------------------------------------------------------

# Keras orders the gates of a GRU as z, r, h.
KERAS_ORDER = {"LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2], "RNN": [0]}


def tensorflow(given: Problem) -> Contestant:
    import keras
    import tensorflow as tf

    case = given.case
    tf.config.threading.set_intra_op_parallelism_threads(case.threads)
    tf.config.threading.set_inter_op_parallelism_threads(case.threads)
    order = KERAS_ORDER[case.cell]
    options = {"return_sequences": True, "return_state": True}
    if case.cell == "GRU":
        options["reset_after"] = True
    kind = keras.layers.SimpleRNN if case.cell == "RNN" else getattr(keras.layers, case.cell)
    layer = kind(case.H, **options)
    # Keras has the batch first, and a single bias except in a GRU.
    x = tf.constant(given.x.transpose(0, 1).contiguous().numpy())
    grad = tf.constant(given.grad.transpose(0, 1).contiguous().numpy())
    layer.build(x.shape)
    w = {name: reorder(value, order) for name, value in weights(given).items()}
    biases = w["b_ih"], w["b_hh"]
    layer.set_weights(
        [w["w_ih"].T, w["w_hh"].T, np.stack(biases) if case.cell == "GRU" else sum(biases)]
    )
    variables = [v.value for v in layer.trainable_variables]

    # Keras does not compile these layers by itself; uncompiled their loop takes twice as long.
    @tf.function(jit_compile=True)
    def forward(x: Any) -> Any:
        return layer(x)

    @tf.function(jit_compile=True)
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x)[0]
        return output, tape.gradient(output, [x, *variables], output_gradients=grad)

    def forward_results() -> dict[str, Tensor]:
        output, *last = map(tensor, forward(x))
        return layer_results(output.transpose(0, 1), *last)

    def step_results() -> dict[str, Tensor]:
        output, (grad_x, w_ih, w_hh, bias) = step(x)
        found = {"w_ih": w_ih.numpy().T, "w_hh": w_hh.numpy().T}
        found["b_ih"], found["b_hh"] = bias.numpy() if case.cell == "GRU" else [bias.numpy()] * 2
        inverse = np.argsort(order).tolist()
        found = {name: reorder(value, inverse) for name, value in found.items()}
        output, grad_x = (t.numpy().swapaxes(0, 1) for t in (output, grad_x))
        return gradients(output, grad_x, found)

    if case.mode == "inference":
        return Contestant(lambda: forward(x), forward_results)
    return Contestant(lambda: step(x), step_results)


PEERS: dict[str, Callable[[Problem], Contestant]] = {
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "JAX": jax_scan,
    "TensorFlow": tensorflow,
}
