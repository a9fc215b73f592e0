"""Runs tests on a copy of fastrnn built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitizers.py                  all tests except those excluded below
    python tests/sanitizers.py tests -k packed  these pytest arguments instead

The copy is kept in build/sanitized, so a second run only compiles what changed. Layers are also
trained under LeakSanitizer. Finally two bugs are planted, a result whose allocation is too small
and one that is never freed. The sanitizers must find both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitized"
COPIED = ["csrc", "fastrnn", "tests", "setup.py", "pyproject.toml", "LICENSE"]
# bench/memory.py, which a test uses, and what it imports.
COPIED += [f"bench/{name}.py" for name in ("memory", "cases", "cpu", "figures", "timing")]
SANITIZERS = "-fsanitize=address,undefined"
# The last -O flag wins. Any finding aborts the process. vptr needs the type information of torch's
# classes, some of which its libraries do not export. The other four checks, and AddressSanitizer's
# inline instrumentation, take minutes to compile in the kernels, and AddressSanitizer checks the
# kernels' loads and stores anyway.
FLAGS = ["-O1", "-g1", SANITIZERS, "-fno-sanitize-recover=all"]
FLAGS += ["-fno-sanitize=vptr,null,alignment,object-size,pointer-overflow"]
FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# Excluded: tests of code that is not instrumented (Python, compilers, other packages) and of
# kernels for other instruction sets; and tests of memory use, which here is the sanitizer's.
EXCLUDED_FILES = (
    "bench bench_gpu barrier classify_text compile docs examples export generate isa onnx"
)
EXCLUDED_FILES += " others_code packaging reference simple_rnn tag_sequence torch_itself train_ddp"
EXCLUDED_FILES += " translate copies dtensor exact_types jit_trace keep_types network quantization"
EXCLUDED_FILES += " others_models flop_counter recompute_names super_forward symbolic_trace"
EXCLUDED_FILES += " binding building busy main progress codegen codegen_compiled"
EXCLUDED_FILES += " codegen_errors own_cell own_cells own_cells_wide fuzz_own_cells simd_math"
EXCLUDED_FILES += " others_cells"
# The first three differentiate numerically or in Python: the same code is covered by other tests.
DESELECTED = ["test_gradients.py::test_gradcheck", "test_gradients.py::test_gradgradcheck"]
DESELECTED += ["test_registry.py::test_gradcheck", "test_memory.py::test_scratch_memory_that_stays"]
DESELECTED += ["test_memory.py::test_memory_of_a_step_is_used_again"]
# These compile, as the excluded files do.
for name in ("compiled", "cells_of_ones_own", "a_reset_begins_with_initial"):
    DESELECTED.append(f"test_segments.py::test_{name}")
ALL = ["tests", *(f"--ignore=tests/test_{name}.py" for name in EXCLUDED_FILES.split())]
ALL += [f"--deselect=tests/{name}" for name in DESELECTED]
# Runs in a single process, in parallel with the other tests.
BAD_INPUT = ["tests/test_bad_input.py", "--fuzz", "12000"]
CALL = "import torch, fastrnn; fastrnn.LSTM(33, 33)(torch.randn(3, 2, 33)); print('clean')"
# Trains layers in every way and checks for unreachable memory while Python is still running: at
# exit it frees little. What importing and the first round allocate is ignored: it belongs to Python
# and torch.
TRAINING = """
import ctypes
sanitizer = ctypes.CDLL(None)
sanitizer.__lsan_disable()
import torch, fastrnn
from torch.nn.utils.rnn import pack_sequence
torch.set_num_threads(2)
x = torch.randn(7, 5, 17)
packed = pack_sequence([torch.randn(n, 17) for n in (7, 4, 2)])
layers = [fastrnn.LSTM(17, 33, 2, dropout=0.5, bidirectional=True), fastrnn.GRU(17, 33),
          fastrnn.RNN(17, 33), fastrnn.LSTM(17, 33, proj_size=5)]
layers += [type(layer)(17, 33, dtype=torch.bfloat16) for layer in layers[:3]]
optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()])
for round in range(31):
    for layer in layers:
        for input in x, packed:
            input = input.to(next(layer.parameters()).dtype)
            layer(input)[1][0].float().sum().backward()
            with torch.no_grad():
                layer(input)
        try:
            layer(x[..., 1:])
        except (RuntimeError, ValueError):
            pass
    optimizer.step()
    optimizer.zero_grad()
    if round == 0:
        sanitizer.__lsan_enable()
print("leaks" if sanitizer.__lsan_do_recoverable_leak_check() else "clean")
"""
# The planted bugs. Each is enabled by an environment variable, so that one build serves both.
ALLOCATION = "r.h_n = at::empty(size({states, p.batch, p.recurrent}), options);"
SHORTER = 'p.recurrent - (std::getenv("TOO_SMALL") ? 1 : 0)}'
PLANTED = ALLOCATION.replace("p.recurrent}", SHORTER)
PLANTED += ' if (std::getenv("NEVER_FREED")) new Tensor(r.h_n);'


def write_if_new(path: Path, text: str) -> None:
    """Keeps the modification time of unchanged files, so that they are not recompiled."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{path.name} must contain exactly one '{old}'")
    path.write_text(text.replace(old, new))


def copy_sources() -> None:
    for name in COPIED:
        source = ROOT / name
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for file in files:
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                text = file.read_text()
                write_if_new(COPY / file.relative_to(ROOT), text)


def build() -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    env = {**os.environ, "FASTRNN_CUDA": "0", "CXXFLAGS": " ".join(FLAGS), "LDFLAGS": SANITIZERS}
    env.pop("FASTRNN_ISAS", None)  # one instruction set takes minutes to compile
    result = subprocess.run(command, cwd=COPY, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stdout[-4000:] + result.stderr[-4000:])


def environment(**more: str) -> dict[str, str]:
    """Preloads the sanitizers' libraries, since Python itself is not instrumented."""
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        # Python frees little at exit. A failed allocation must reach fastrnn's error handling. A
        # test expects the signal of a segmentation fault.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **more,
    }


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=COPY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def train(**variables: str) -> subprocess.CompletedProcess[str]:
    """Runs TRAINING under LeakSanitizer.

    It only tracks memory from malloc and only searches that for pointers, so Python's objects must
    be allocated with malloc too. It does not search thread-local variables: since the kernels are
    a library of their own it crashes there in every run.
    """
    options = {"ASAN_OPTIONS": "detect_leaks=1:leak_check_at_exit=0", "PYTHONMALLOC": "malloc"}
    options["LSAN_OPTIONS"] = "use_tls=0"
    for _ in range(5):
        done = python(TRAINING, **options, **variables)
        # LeakSanitizer's own thread crashes once in hundreds of runs (google/sanitizers 1353).
        if "Tracer caught signal" not in done.stderr:
            break
        print("LeakSanitizer itself crashed")
    return done


def expect_clean(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode or "clean" not in done.stdout:
        raise SystemExit(done.stdout + done.stderr)


def started(tests: list[str], **options: Any) -> subprocess.Popen[str]:
    pytest = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "-m", "not slow"]
    return subprocess.Popen([*pytest, *tests], cwd=COPY, env=environment(), text=True, **options)


def expect_passed(*runs: subprocess.Popen[str]) -> None:
    for run in runs:
        output, _ = run.communicate()
        print(output or "", end="", flush=True)
    if any(run.returncode for run in runs):
        raise SystemExit(1)


def main(arguments: list[str]) -> None:
    copy_sources()
    build()
    expect_clean(python(CALL))
    expect_clean(train())
    if arguments:
        expect_passed(started(arguments))
    else:
        bad_input = started([*BAD_INPUT, "-n", "0"], stdout=subprocess.PIPE)
        expect_passed(started([*ALL, "--ignore=tests/test_bad_input.py"]), bad_input)

    replaced(COPY / "csrc/torch/network.cpp", ALLOCATION, PLANTED)
    build()
    planted = python(CALL, TOO_SMALL="1")
    # A vector store that crosses into another allocation is reported as an unknown crash.
    if planted.returncode == 0 or "ERROR: AddressSanitizer" not in planted.stderr:
        raise SystemExit("the sanitizers did not find a write past the end:\n" + planted.stderr)
    print("the planted write past the end was found")
    leaking = train(NEVER_FREED="1")
    if "leaks" not in leaking.stdout or "fastrnn::results_of" not in leaking.stderr:
        raise SystemExit("LeakSanitizer did not find the leak:\n" + leaking.stderr)
    print("the planted leak was found")


if __name__ == "__main__":
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise SystemExit("there is no C++ compiler")
    main(sys.argv[1:])
