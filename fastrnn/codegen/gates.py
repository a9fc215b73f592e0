"""The first two arguments of a step: one value for each gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Gates(Generic[T]):
    """Values by gate: as attributes (x.f), by index (x[0]), or unpacked (f, g, o = x)."""

    def __init__(self, names: Sequence[str], values: Sequence[T]) -> None:
        self._names, self._values = tuple(names), tuple(values)

    def __getattr__(self, name: str) -> T:
        if not name.startswith("_") and name in self._names:
            return self._values[self._names.index(name)]
        raise AttributeError(f"no gate {name!r}, only {', '.join(self._names)}")

    def __getitem__(self, index: int) -> T:
        return self._values[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
