"""The error of a step that can't be compiled."""

from __future__ import annotations


class CellError(ValueError):
    """A cell's Python function that can't be compiled: where, what was found, and what to do."""
