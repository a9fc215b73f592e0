"""torch's training tools work with fastrnn's layers and cells as with torch's.

GradScaler, deterministic algorithms, anomaly mode, saved-tensor hooks, activation checkpointing and
hooks. test_dtypes.py tests autocast.
"""

import copy
import functools
import itertools

import pytest
import torch
from helpers import (
    LAYERS,
    assert_pool_no_worse,
    avoid_relu_kinks,
    device,
    flat,
    gradients,
    leaves,
    mapped,
    pair,
    ragged,
    random_state,
)
from torch.testing import assert_close
from torch.utils import checkpoint as checkpoints
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import CASES, H, I, mean_squares, module_pair

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once

BOTH = [False, True]

DEEP = {"num_layers": 2, "bidirectional": True, "dropout": 0.4}


def deep(case):
    """module_pair(case), with two bidirectional layers and dropout if the case is a layer."""
    return module_pair(case, **(DEEP if case in LAYERS else {}))


def all_gradients(module, args, call=None):
    """Gradients of all arguments and parameters, with fixed dropout masks."""
    torch.manual_seed(3)
    inputs = [*flat(args), *(p for p in module.parameters() if p.requires_grad)]
    return gradients((call or module)(*args), inputs)


# ---- GradScaler ----------------------------------------------------------------------------------


def train_scaled(module, args, low):
    """Trains four steps and returns the scales; the third has infinite gradients and is skipped."""
    scaler = torch.amp.GradScaler(device(), init_scale=1024.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scales = []
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast(device(), dtype=low):
            loss = sum(t.float().square().mean() for t in flat(module(*args)))
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        before = [p.clone() for p in module.parameters()]
        scaler.step(optimizer)
        changed = [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]
        assert any(changed) == (step != 2)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_grad_scaler(case, low):
    """Parameters as close to float64's as torch's are, and the same steps skipped."""
    pool = []
    for seed in range(3):
        torch.manual_seed(seed)
        ours, theirs, args = module_pair(case, dtype=torch.float32)
        if device() == "cuda":
            avoid_relu_kinks(case.removesuffix("_cell"), ours, theirs)
        if case in LAYERS:  # packed: torch's padded LSTM has no kernel for float16 on the CPU
            args = (ragged([4, 2, 1], I), args[1])
        exact = module_pair(case)[0]
        exact.load_state_dict(theirs.state_dict())
        optimizer = torch.optim.SGD(exact.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            mean_squares(exact(*mapped(args, torch.Tensor.double))).backward()
            optimizer.step()
        scales = [train_scaled(module, args, low) for module in [ours, theirs]]
        assert scales == [[1024, 1024, 512, 512]] * 2
        pool += zip(*([*m.parameters()] for m in [ours, theirs, exact]), strict=True)
    assert_pool_no_worse(pool)


@pytest.mark.cpu("on the CPU torch's padded LSTM has no kernel for float16")
def test_grad_scaler_of_a_padded_lstm_in_float16():
    """Under autocast the gradients equal those of the layer converted to float16."""
    layer, _ = pair("lstm", I, H, num_layers=2)
    half = copy.deepcopy(layer).half()
    args = torch.randn(4, 3, I), random_state(layer, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = flat(layer(*args))
    for results in [outputs, flat(half(*mapped(args, torch.Tensor.half)))]:
        scaler.scale(sum(t.float().square().mean() for t in results)).backward()
    found = [p.grad for p in layer.parameters()]
    assert all(g.isfinite().all() and g.any() for g in found)
    assert_close(found, [p.grad.float() for p in half.parameters()])


# ---- deterministic algorithms --------------------------------------------------------------------


@pytest.fixture
def deterministic(monkeypatch):
    """In this mode torch.empty is filled with NaN, which shows reads of uninitialized memory."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("case", "packed"), [*((case, False) for case in CASES), *((kind, True) for kind in LAYERS)]
)
def test_deterministic_algorithms(case, packed, deterministic):
    assert torch.empty(3).isnan().all()
    ours, theirs, args = deep(case)
    if packed:
        args = (ragged([4, 2, 1], I, torch.float64), args[1])
    args = leaves(args)
    first, again, expected = (all_gradients(m, args) for m in [ours, ours, theirs])
    assert_close(first, expected)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if case in LAYERS:
        ours.recompute = True
        assert_close(all_gradients(ours, args), expected)


# ---- anomaly mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_anomaly_mode(case):
    """Without NaN the gradients are torch's; with one the error names the operator."""
    ours, theirs, args = deep(case)
    args = leaves(args)
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"):
        context = torch.autograd.detect_anomaly()
    with context:
        assert_close(all_gradients(ours, args), all_gradients(theirs, args))
        output = flat(ours(*args))[0]
        output.register_hook(lambda grad: grad * float("inf"))
        with (
            pytest.warns(UserWarning, match=r"Error detected in FastrnnBackward\.(?s:.*)ours\("),
            pytest.raises(RuntimeError, match="'FastrnnBackward' returned nan values"),
        ):
            output.sum().backward()


# ---- saved-tensor hooks --------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", BOTH, ids=["keeping", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_saved_tensors_on_the_cpu_and_on_disk(case, recompute, tmp_path):
    ours, theirs, args = deep(case)
    ours.recompute = recompute and case in LAYERS
    args = leaves(args)
    expected = all_gradients(theirs, args)
    with torch.autograd.graph.save_on_cpu():
        assert_close(all_gradients(ours, args), all_gradients(theirs, args))

    numbers = itertools.count()

    def write(tensor):
        path = tmp_path / f"{next(numbers)}.pt"
        torch.save(tensor, path)
        return path

    with torch.autograd.graph.saved_tensors_hooks(write, torch.load):
        assert_close(all_gradients(ours, args), expected)
    # At least the gates (or the outputs), and every parameter.
    assert next(numbers) > len(list(ours.parameters()))


@pytest.mark.parametrize("recompute", BOTH, ids=["keeping", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_backward_uses_only_unpacked_tensors(case, recompute):
    """If unpacking returns zeros, all gradients that are products of saved tensors are zero."""
    ours, _, args = module_pair(case)
    ours.recompute = recompute and case in LAYERS
    args = leaves(args)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: torch.zeros_like(t) if t.is_floating_point() else t
    )
    named = {"input": args[0], **dict(ours.named_parameters())}
    results = flat(ours(*args))
    products = [n for n in named if not n.startswith("bias")]
    before = gradients(results[:1], [named[n] for n in products])
    assert all(g.any() for g in before)
    with hooks:
        results = flat(ours(*args))
    after = gradients(results[:1], [named[n] for n in products])
    assert not any(g.any() for g in after)


# ---- activation checkpointing --------------------------------------------------------------------


def checkpointed(module, x, *states, **options):
    """The module called in a checkpoint, which finds only tensors that are arguments themselves."""

    def call(x, *states):
        return tuple(flat(module(x, states if len(states) > 1 else states[0])))

    return checkpoints.checkpoint(call, x, *states, **options)


@pytest.mark.parametrize("reentrant", BOTH, ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("case", CASES)
def test_checkpoint(case, reentrant):
    """A second forward pass with the same dropout masks gives the same gradients."""
    ours, theirs, args = deep(case)
    found, calls = [], []
    for module in [ours, theirs]:
        module.register_forward_pre_hook(lambda *_: calls.append(None))
        for plain in BOTH:
            module.zero_grad()
            x, state = leaves(args)
            torch.manual_seed(3)
            if plain:
                results = flat(module(x, state))
            else:
                results = checkpointed(module, x, *flat(state), use_reentrant=reentrant)
            mean_squares(results).backward()  # a reentrant checkpoint supports only backward()
            found.append([t.grad for t in [x, *flat(state), *module.parameters()]])
            assert len(calls) == (1 if plain else 2)
            calls.clear()
    checkpointed_ours, plain_ours, checkpointed_theirs, plain_theirs = found
    assert_close(checkpointed_ours, checkpointed_theirs)
    assert_close(checkpointed_ours, plain_ours)
    assert_close(plain_ours, plain_theirs)


class Calls(TorchDispatchMode):
    """Counts the operator calls that reach this mode, the innermost."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.fastrnn.forward.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_selective_checkpoint(case):
    """A policy that saves the operator's results avoids the second forward pass."""
    ours, theirs, args = deep(case)
    args = leaves(args)
    expected = all_gradients(theirs, args)
    for saved, count in [([torch.ops.fastrnn.forward.default], 1), ([], 2)]:
        context = functools.partial(checkpoints.create_selective_checkpoint_contexts, saved)

        def call(x, state, context=context):
            return checkpointed(ours, x, *flat(state), use_reentrant=False, context_fn=context)

        with Calls() as calls:
            found = all_gradients(ours, args, call)
        assert_close(found, expected)
        assert calls.count == count


# ---- hooks ---------------------------------------------------------------------------------------


def train_with_hooks(module, args):
    """The arguments of every hook, in order, and the parameters after three steps."""
    seen = []

    def record(name, *nested):
        seen.append((name, [t.detach().clone() for t in flat(nested) if t is not None]))

    def before(module, args, kwargs):
        record("before", args)
        return (args[0] * 2, *args[1:]), kwargs

    def after(module, args, output):
        record("after", args, output)
        return mapped(output, torch.neg)

    def of_outputs(module, grads):
        record("of outputs", grads)
        return [None if g is None else g / 2 for g in grads]

    def of_inputs(module, grads, grads_of_outputs):
        record("of inputs", grads, grads_of_outputs)
        return [None if g is None else g / 2 for g in grads]

    def step_in_hook(parameter):
        record("accumulated", parameter.grad)
        with torch.no_grad():
            parameter -= 0.5 * parameter.grad
        parameter.grad = None

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
    module.register_full_backward_pre_hook(of_outputs)
    module.register_full_backward_hook(of_inputs)
    name = next(n for n, _ in module.named_parameters() if n.startswith("weight_hh"))
    getattr(module, name).register_hook(lambda grad: record("weight", grad) or grad / 2)
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(step_in_hook)
    for _ in range(3):
        x, state = leaves(args)
        for i, t in enumerate(flat([x, state])):
            t.register_hook(lambda grad, i=i: record(f"input {i}", grad))
        outputs = flat(module(x, state))
        for i, o in enumerate(outputs):
            o.retain_grad()
            o.register_hook(lambda grad, i=i: record(f"output {i}", grad) or grad * (i + 2))
        torch.autograd.graph.register_multi_grad_hook(
            flat([x, state]), lambda grads: record("all inputs", grads)
        )
        mean_squares(outputs).backward()
        seen.append(("kept", [o.grad for o in outputs] + [t.grad for t in flat([x, state])]))
    return seen, list(module.parameters())


def by_name(seen):
    """The records grouped by name, as the order of independent branches is unspecified."""
    return {name: [ts for n, ts in seen if n == name] for name, _ in seen}


@pytest.mark.parametrize("case", CASES)
def test_hooks_see_and_change_the_same_values_as_with_torch(case):
    ours, theirs, args = module_pair(case)
    (seen, parameters), (expected, torchs) = (train_with_hooks(m, args) for m in [ours, theirs])
    assert len([n for n, _ in seen if n == "accumulated"]) == 3 * len(torchs)
    found, expected = by_name(seen), by_name(expected)
    assert found.keys() == expected.keys()
    assert {"before", "after", "of outputs", "of inputs", "weight", "input 1", "output 0"} <= set(
        found
    )
    # The order of the parameters is unspecified, too.
    for lists in [found, expected]:
        lists["accumulated"] = sorted((t.norm() for (t,) in lists["accumulated"]), key=float)
    assert_close(found, expected)
    assert_close(parameters, torchs)


@pytest.mark.parametrize("case", CASES)
def test_hooks_of_the_node(case):
    """A prehook may change the node's incoming gradients, a posthook the outgoing ones."""
    ours, theirs, args = module_pair(case)
    args = leaves(args)
    results = flat(ours(*args))
    graph = results[0].grad_fn
    while graph.name() != "FastrnnBackward":
        (graph,) = (node for node, _ in graph.next_functions)
    graph.register_prehook(lambda grads: tuple(g if g is None else g * 3 for g in grads))
    graph.register_hook(lambda inner, outer: tuple(g if g is None else g / 4 for g in inner))
    found = gradients(results[:1], [*flat(args), *ours.parameters()])
    expected = gradients(flat(theirs(*args))[:1], [*flat(args), *theirs.parameters()])
    assert_close([4 * g for g in found], [3 * g for g in expected])
