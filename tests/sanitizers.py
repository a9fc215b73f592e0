"""Runs tests on a copy of fastrnn built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitizers.py                  all tests but those named here
    python tests/sanitizers.py tests -k packed  what pytest is to run instead

The copy is kept in build/sanitized: a second run compiles what changed. Then layers are trained
under LeakSanitizer. At last errors are planted, a result that is allocated too small and one that
is never freed, which the sanitizers must find.
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
COPIED = ["csrc", "fastrnn", "tests", "bench/memory.py", "setup.py", "pyproject.toml", "LICENSE"]
SANITIZERS = "-fsanitize=address,undefined"
# The last of two -O counts. Whatever is found ends the process. vptr would ask for the type
# information of torch's classes, some of which torch's libraries keep to themselves; the next four,
# and checks of addresses in line, take minutes to compile in the kernels, whose reads and writes
# AddressSanitizer sees anyway.
FLAGS = ["-O1", "-g1", SANITIZERS, "-fno-sanitize-recover=all"]
FLAGS += ["-fno-sanitize=vptr,null,alignment,object-size,pointer-overflow"]
FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# Left out: what tests code that is not built so, of Python, compilers and others, or kernels for
# other instruction sets; and how much memory a process takes, which here is the sanitizer's.
ELSEWHERE = "bench bench_gpu barrier classify_text compile docs examples export generate isa onnx"
ELSEWHERE += " others_code packaging reference setup simple_rnn tag_sequence torch_itself train_ddp"
ELSEWHERE += " translate"
# The first three differentiate numerically or in Python: nothing that other tests do not come to.
NOT_HERE = ["test_gradients.py::test_gradcheck", "test_gradients.py::test_gradgradcheck"]
NOT_HERE += ["test_registry.py::test_gradcheck", "test_memory.py::test_scratch_memory_that_stays"]
NOT_HERE += ["test_memory.py::test_memory_of_a_step_is_used_again"]
ALL = ["tests", *(f"--ignore=tests/test_{name}.py" for name in ELSEWHERE.split())]
ALL += [f"--deselect=tests/{name}" for name in NOT_HERE]
# One process's work, beside the others.
BAD_INPUT = ["tests/test_bad_input.py", "--fuzz", "12000"]
CALL = "import torch, fastrnn; fastrnn.LSTM(33, 33)(torch.randn(3, 2, 33)); print('went well')"
# Training by every way in, and what of it is no longer reachable then: when Python ends it frees
# little. What importing and a first round leave, Python's and torch's, is not looked at.
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
        for given in x, packed:
            given = given.to(next(layer.parameters()).dtype)
            layer(given)[1][0].float().sum().backward()
            with torch.no_grad():
                layer(given)
        try:
            layer(x[..., 1:])
        except (RuntimeError, ValueError):
            pass
    optimizer.step()
    optimizer.zero_grad()
    if round == 0:
        sanitizer.__lsan_enable()
print("leaks" if sanitizer.__lsan_do_recoverable_leak_check() else "went well")
"""
# What is planted, each where the variable of this name is set: one build for both.
ALLOCATION = "r.h_n = at::empty(size({states, p.batch, p.recurrent}), options);"
SHORTER = 'p.recurrent - (std::getenv("TOO_SMALL") ? 1 : 0)}'
PLANTED = ALLOCATION.replace("p.recurrent}", SHORTER)
PLANTED += ' if (std::getenv("NEVER_FREED")) new Tensor(r.h_n);'


def write_if_new(path: Path, text: str) -> None:
    """So that what did not change is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{path.name} has no longer exactly one '{old}'")
    path.write_text(text.replace(old, new))


def unused_kernels() -> str:
    """For setup.py: kernels of instruction sets that no test here runs under cost no time."""
    program = "import fastrnn; print(fastrnn.build_info()['isa'])"
    command = [sys.executable, "-c", program]
    used = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept = {used.strip(), "avx512" if used.strip() in ("avx512_bf16", "amx") else ""}
    return f"""for isa, flags in {{**ISA_FLAGS, **BFLOAT16_FLAGS}}.items():
    if isa not in {sorted(kept)!r}:
        flags += ["-O0", "-fno-sanitize=all"]


"""


def copy_sources() -> None:
    for name in COPIED:
        source = ROOT / name
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for file in files:
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                text = file.read_text()
                if name == "setup.py":
                    text = text.replace("X86 = ", f"CXX_FLAGS += {FLAGS!r}\nX86 = ", 1)
                    text = text.replace(
                        "def cuda_toolkit", f"{unused_kernels()}def cuda_toolkit", 1
                    )
                write_if_new(COPY / file.relative_to(ROOT), text)


def build() -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    env = {**os.environ, "FASTRNN_CUDA": "0", "LDFLAGS": SANITIZERS}
    result = subprocess.run(command, cwd=COPY, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stdout[-4000:] + result.stderr[-4000:])


def environment(**more: str) -> dict[str, str]:
    """Python itself is not built so: the libraries must be there before it starts."""
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
        # Python frees little when it ends. A refused allocation is an error of ours to handle. A
        # test looks for the signal of a segmentation fault.
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
    """TRAINING under LeakSanitizer, which knows of memory by malloc and looks for pointers there:
    Python's objects are to lie nowhere else."""
    options = {"ASAN_OPTIONS": "detect_leaks=1:leak_check_at_exit=0", "PYTHONMALLOC": "malloc"}
    for _ in range(5):
        done = python(TRAINING, **options, **variables)
        # LeakSanitizer's own thread crashes once in hundreds of runs, which says nothing of what it
        # looks at (google/sanitizers 1353).
        if "Tracer caught signal" not in done.stderr:
            break
        print("LeakSanitizer itself crashed")
    return done


def expect_well(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode or "went well" not in done.stdout:
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
    expect_well(python(CALL))
    expect_well(train())
    if arguments:
        expect_passed(started(arguments))
    else:
        beside = started([*BAD_INPUT, "-n", "0"], stdout=subprocess.PIPE)
        expect_passed(started([*ALL, "--ignore=tests/test_bad_input.py"]), beside)

    replaced(COPY / "csrc/network.cpp", ALLOCATION, PLANTED)
    build()
    planted = python(CALL, TOO_SMALL="1")
    # A vector that ends in another's memory is reported as an unknown crash.
    if planted.returncode == 0 or "ERROR: AddressSanitizer" not in planted.stderr:
        raise SystemExit("the sanitizers did not find a write past the end:\n" + planted.stderr)
    print("the planted write past the end was found")
    leaking = train(NEVER_FREED="1")
    if "leaks" not in leaking.stdout or "fastrnn::results_of" not in leaking.stderr:
        raise SystemExit("LeakSanitizer did not find what is never freed:\n" + leaking.stderr)
    print("the planted leak was found")


if __name__ == "__main__":
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise SystemExit("there is no C++ compiler")
    main(sys.argv[1:])
