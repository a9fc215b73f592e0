"""torch.compile takes fastrnn's layers into its graphs.

Dynamo refuses every subclass of torch.nn.RNN, LSTM and GRU unless torch._dynamo.config.allow_rnn is
set, since it would unroll torch's. Ours are one operator, so that it is set for ours alone, while
Dynamo looks at one of them: torch's own layers fare as before. `enabled = False` leaves ours to the
rule as well; torch.compiler.disable(layer) leaves out one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fastrnn.when_imported import when_imported

enabled = True
"""Whether Dynamo takes fastrnn's layers."""


def install() -> None:
    """Tell Dynamo, now or when it is imported: torch itself does that at its first use."""
    when_imported("torch._dynamo.variables.builder", _teach)


def _teach(builder: ModuleType) -> None:
    wrap_module: Callable[..., Any] = builder.VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def wrap_our_module(self: Any, value: Any) -> Any:
        from fastrnn.marked import is_ours

        if not enabled or not is_ours(value):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_our_module
