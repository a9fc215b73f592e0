"""Threads and processes: many threads, forks, interrupts, a changing number of threads."""

import concurrent.futures
import faulthandler
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, flat, pair, slow_after
from torch.utils.data import DataLoader, Dataset

import fastrnn

pytestmark = [pytest.mark.cpu("about CPU threads and processes"), pytest.mark.once]

ROOT = Path(__file__).parent.parent


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_module_called_from_sixteen_threads(kind):
    layer, _ = pair(kind, 33, 33, num_layers=2, bidirectional=True)
    inputs = [torch.randn(9, 1 + i % 5, 33) for i in range(16)]

    def results(x):
        for parameter in layer.parameters():
            assert parameter.grad is None  # autograd.grad does not write to .grad
        output = layer(x)
        loss = sum(t.square().sum() for t in flat(output))
        return *flat(output), *torch.autograd.grad(loss, list(layer.parameters()))

    expected = [results(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            for a, b in zip(pool.map(results, inputs), expected, strict=True):
                assert equal(a, b)


class Encoded(Dataset):
    """Items computed by a layer, as in preprocessing in the workers."""

    def __init__(self):
        torch.manual_seed(0)
        self.layer = fastrnn.GRU(33, 64)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(torch.full((5, 33), float(i)))[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_data_loader_workers(method):
    data = Encoded()
    # The parent has used the layer, too.
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, 2, num_workers=2, multiprocessing_context=method, timeout=100)
    assert torch.equal(torch.cat(list(loader)), expected)


def run_script(script, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


# What the parent has run on several threads before it forks.
BEFORE_FORK = {
    "fastrnn": "fastrnn.LSTM(128, 256)(torch.randn(20, 16, 128))",
    "torch": "torch.randn(1000, 1000).exp()",
    "a product": "torch.randn(1000, 1000) @ torch.randn(1000, 1000)",
}
# What the child runs first. Each hangs if OpenMP waits for the threads of the parent.
IN_CHILD = {
    "a layer": "",
    "torch": "torch.randn(1000, 1000).exp()",
    "a product": "torch.randn(1000, 1000) @ torch.randn(1000, 1000)",
    "orthogonal weights": "torch.nn.init.orthogonal_(torch.empty(1000, 1000))",
    "more threads": "torch.set_num_threads(2)",
}
CHILD = """
import os, signal, sys, torch, fastrnn

def train(first=""):
    signal.alarm(60)  # ends the process if it hangs
    exec(first)
    torch.manual_seed(0)
    found = []
    for name in ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]:
        module = getattr(fastrnn, name)(128, 256)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        outputs = module(torch.randn((64, 128) if "Cell" in name else (9, 16, 128)))
        (outputs if name in ("RNNCell", "GRUCell") else outputs[0]).square().sum().backward()
        optimizer.step()
        found.append(sum(p.double().sum().item() for p in module.parameters()))
    return found
"""


@pytest.mark.parametrize(
    ("used_by", "first"),
    [
        *slow_after(1, ((used, "a layer") for used in BEFORE_FORK)),
        *slow_after(1, (("torch", first) for first in list(IN_CHILD)[1:])),
    ],
)
def test_in_fork_of_a_process_with_threads(used_by, first):
    """In the child OpenMP would wait for threads that only the parent has."""
    done = run_script(
        CHILD
        + f"""
torch.set_num_threads(2)
expected = train()
{BEFORE_FORK[used_by]}
read, write = os.pipe()
child = os.fork()
if not child:
    threads = torch.get_num_threads()
    os.write(write, repr((threads, train({IN_CHILD[first]!r}))).encode())
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
threads, found = eval(os.read(read, 1000))
assert threads == 1
assert torch.get_num_threads() == 2
assert found == expected
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", slow_after(1, ["fork", "spawn"]))
def test_in_multiprocessing(method, tmp_path):
    """A forked child has one thread, a spawned one the default number."""
    script = tmp_path / "script.py"
    script.write_text(
        CHILD
        + f"""
def child(queue):
    threads = torch.get_num_threads()
    queue.put((threads, train({IN_CHILD["torch"]!r})))

if __name__ == "__main__":
    import multiprocessing
    expected = train()
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    threads, found = queue.get(timeout=90)
    process.join()
    assert process.exitcode == 0
    assert found == expected
    assert threads == {1 if method == "fork" else 2}, threads
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_fork_of_a_process_with_one_thread_keeps_the_number_of_threads():
    done = run_script(
        CHILD
        + """
assert os.listdir("/proc/self/task") == [str(os.getpid())]
child = os.fork()
if not child:
    train()
    os._exit(torch.get_num_threads())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
""",
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


class Built(Dataset):
    """Items computed by a layer that the worker builds."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        torch.manual_seed(i)
        layer = fastrnn.GRU(33, 64)
        output = layer(torch.full((5, 3, 33), float(i)))[0]
        return torch.autograd.grad(output.square().sum(), layer.weight_hh_l0)[0]


@pytest.mark.parametrize("method", slow_after(1, ["fork", "spawn"]))
def test_layer_built_in_data_loader_workers(method):
    data = Built()
    torch.randn(1000, 1000).exp()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, 2, num_workers=2, multiprocessing_context=method, timeout=100)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_other_python_threads_run_during_a_call():
    layer, x = fastrnn.LSTM(64, 256), torch.randn(200, 32, 64)
    ticks, during, done = [0], [], threading.Event()

    def calls():
        for _ in range(3):
            before = ticks[0]
            layer(x)
            during.append(ticks[0] - before)
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only a call releases the GIL
    try:
        thread = threading.Thread(target=calls)
        thread.start()
        while not done.is_set():
            ticks[0] += 1
            time.sleep(1e-4)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert min(during) > 0


def test_number_of_threads_changed_between_calls():
    layer, _ = pair("lstm", 64, 200)
    x = torch.randn(5, 7, 64)
    expected = layer(x)
    for threads in [1, 8, 3, 2, 1, 5]:
        torch.set_num_threads(threads)
        assert equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_in_torchs_inter_op_threads():
    """torch.jit.fork runs its function in torch's inter-op thread pool."""
    layer, _ = pair("gru", 33, 64)
    x = torch.randn(7, 3, 33)
    expected = layer(x)
    futures = [torch.jit.fork(layer, x) for _ in range(8)]
    for future in futures:
        assert equal(torch.jit.wait(future), expected)


@pytest.mark.parametrize("first", ["pass", "import fastrnn"])
def test_import_in_a_subinterpreter_raises(first):
    """`import torch` hangs or crashes there, so fastrnn must raise before it imports torch."""
    done = run_script(
        f"""
        try:
            import _interpreters
        except ImportError:
            import _xxsubinterpreters as _interpreters
        {first}
        other = _interpreters.create()
        for name in ["fastrnn", "fastrnn._C"]:
            program = f'''if True:
                import sys
                sys.path.insert(0, {str(ROOT)!r})
                try:
                    import {{name}}
                except ImportError as error:
                    print(error, flush=True)
            '''
            assert _interpreters.run_string(other, program) is None
        _interpreters.destroy(other)
        import fastrnn, torch
        fastrnn.GRU(5, 17)(torch.randn(3, 2, 5))
        """
    )
    assert done.returncode == 0, done.stderr
    message = (
        "fastrnn can't be imported in a subinterpreter, as torch can't: import it in the main one"
    )
    assert done.stdout == f"{message}\n" * 2


def test_process_is_usable_after_keyboard_interrupt():
    script = """
        import signal, torch, fastrnn
        # A background job ignores SIGINT, and its children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        layer = fastrnn.LSTM(256, 512)
        x = torch.randn(400, 32, 256)
        with torch.no_grad():
            layer(x[:2])
            print("ready", flush=True)
            try:
                while True:
                    layer(x)
            except KeyboardInterrupt:
                pass
            assert torch.equal(layer(x[:2])[0], layer(x[:2])[0])
        print("usable", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "usable\n")


def test_more_threads_than_cores_finish():
    """Many calls of a layer whose threads wait at a barrier in every step."""
    done = run_script(
        """
        import torch, fastrnn
        torch.set_num_threads(8)
        fastrnn._C.adapt_threads(False)
        layer = fastrnn.LSTM(256, 256)
        x = torch.randn(20, 2, 256)
        with torch.no_grad():
            expected = layer(x)[0]
            for _ in range(30):
                assert torch.equal(layer(x)[0], expected)
        """
    )
    assert done.returncode == 0, done.stderr


def test_soak(pytestconfig):
    """Random layers for --soak seconds: 8 threads do not hang and give 1 thread's exact results."""
    seconds, draw = pytestconfig.getoption("soak"), random.Random(0)
    faulthandler.dump_traceback_later(seconds + 100, exit=True)  # in case of a deadlock
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            T, B, H = (draw.choice(sizes) for sizes in ([1, 9, 50], [1, 2, 17, 64], [17, 64, 200]))
            options = {"num_layers": draw.randint(1, 2), "bidirectional": draw.random() < 0.5}
            layer, _ = pair(draw.choice(sorted(LAYERS)), H, H, **options)
            x, results = torch.randn(T, B, H), []
            for threads in [8, 1]:
                torch.set_num_threads(threads)
                outputs = flat(layer(x))
                loss = sum(t.square().sum() for t in outputs)
                results.append([*outputs, *torch.autograd.grad(loss, list(layer.parameters()))])
            assert equal(*results)
    finally:
        faulthandler.cancel_dump_traceback_later()
