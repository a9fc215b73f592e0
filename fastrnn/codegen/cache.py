"""The folder in which compiled cells are kept, and who may have written there.

A file in it is a library that runs in this process. So the folder is the user's own, nobody else
may write to it, and a library is loaded only if it has the bytes that were compiled.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger("fastrnn")


@functools.cache
def folder() -> Path:
    """FASTRNN_CACHE, or fastrnn in XDG_CACHE_HOME or ~/.cache, with mode 0700.

    A temporary folder of this process where that is not writable, or others may write to it.
    """
    given = os.environ.get("FASTRNN_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrnn"
    path = Path(given) if given else usual
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path):
            raise PermissionError(f"others than this user may write to {path}")
        with tempfile.TemporaryFile(dir=path):
            pass
        return path
    except OSError as error:
        _log.warning("compiled cells are kept for this process only: %s", error)
        temporary = tempfile.TemporaryDirectory(prefix="fastrnn-")
        _kept.append(temporary)
        return Path(temporary.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _is_private(path: Path) -> bool:
    """Whether it is this user's, and only this user may write to it."""
    found = path.lstat()
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid == os.geteuid() and not others_write and not path.is_symlink()


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """One process at a time: the others wait, and find what it has compiled."""
    with open(folder() / f"{key}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def library(key: str) -> Path | None:
    """The library of this key; None if it is missing, damaged, or others may write to it."""
    path = folder() / f"{key}.so"
    try:
        valid = (
            _is_private(path)
            and _is_private(path.with_suffix(".sha256"))
            and path.with_suffix(".sha256").read_text() == _digest(path)
        )
    except OSError:
        return None
    return path if valid else None


def keep(key: str, compiled: Path) -> Path:
    """Moves a library into the folder, in one step."""
    path = folder() / f"{key}.so"
    os.chmod(compiled, 0o700)
    digest = compiled.with_suffix(".digest")
    digest.write_text(_digest(compiled))
    os.chmod(digest, 0o600)
    os.replace(digest, path.with_suffix(".sha256"))
    os.replace(compiled, path)
    return path
