"""Runs a step of the Makefile, and shows in one line what it does, how far it is and how long.

    python csrc/progress.py LOG TEXT COMMAND...

The command's output goes to the file LOG. If it fails, its last lines are printed. On a terminal
the line has a bar while pip downloads and while ninja compiles. It runs before the environment
exists, so it uses nothing but Python's library.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

EVERY = 0.2  # seconds between two drawings of the line
BAR = 20  # columns
SHOWN = 40  # lines of the output, if the command fails
# "12.3/196.6 MB" of pip, "[12/45]" of ninja.
FAR = re.compile(r"([\d.]+)/([\d.]+) [kMG]?B|\[(\d+)/(\d+)\]")
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def far(line: str) -> str:
    """How far the command is: a bar, if its last line tells; else nothing."""
    found = FAR.search(line)
    if not found:
        return ""
    done, total = (float(number) for number in found.groups() if number)
    full = int(BAR * min(1, done / total)) if total else 0
    return f"  {'━' * full}{' ' * (BAR - full)}  {found.group().strip('[]')}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min {seconds % 60:.0f} s"


def follow(process: subprocess.Popen[bytes], output: int, log: BinaryIO, text: str) -> str:
    """Copies the output to the log until the process ends, and draws the line. Returns it."""
    began = drawn = time.monotonic()
    terminal = sys.stdout.isatty()
    print(text, end="", flush=True)
    seen = ""
    while True:
        ended = process.poll() is not None
        data = b""
        if select.select([output], [], [], 0 if ended else EVERY)[0]:
            with contextlib.suppress(OSError):  # Linux's end of a pseudo-terminal
                data = os.read(output, 65536)
            log.write(data)
            seen = (seen + CODES.sub("", data.decode(errors="replace")))[-20000:]
        if ended and not data:
            break
        if terminal and time.monotonic() - drawn > EVERY:
            drawn = time.monotonic()
            last = re.split(r"[\r\n]+", seen.rstrip())[-1]
            line = f"{text}  {duration(drawn - began)}{far(last)}"
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    start = f"\r\x1b[K{text}" if terminal else ""
    print(f"{start}  {duration(time.monotonic() - began)}")
    return seen


def main(path: Path, text: str, *command: str) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
    except OSError as error:
        print(f"make: can't write to {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    # pip draws its bar only on a terminal.
    output, inner = pty.openpty() if sys.stdout.isatty() else os.pipe()
    with log:
        log.write(f"--- {text}: {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=inner, stderr=inner,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        os.close(inner)
        try:
            seen = follow(process, output, log, text)
        except KeyboardInterrupt:  # the command has it too
            process.wait()
            return 130
    if process.returncode:
        lines = [line.split("\r")[-1] for line in seen.replace("\r\n", "\n").splitlines()]
        print(*lines[-SHOWN:], f"make: failed; all output is in {path}", sep="\n", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
