"""torch.compile takes fastrnn's layers into its graphs.

Dynamo breaks the graph at every subclass of torch.nn.RNN, LSTM and GRU unless
torch._dynamo.config.allow_rnn is set, since it would unroll torch's layers. fastrnn's are one
operator, so this module sets that option while Dynamo wraps one of them. Nothing changes for
torch's layers.

Set `fastrnn.dynamo.enabled = False` to break the graph at fastrnn's layers too, or call
torch.compiler.disable(layer) for one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fastrnn.when_imported import when_imported

enabled = True
"""Whether Dynamo takes fastrnn's layers into its graphs."""


def install() -> None:
    """Patch Dynamo, now or when it is imported. torch imports it at the first use."""
    when_imported("torch._dynamo.variables.builder", _patch)


def _patch(builder: ModuleType) -> None:
    wrap_module: Callable[..., Any] = builder.VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def wrap_our_module(self: Any, value: Any) -> Any:
        from fastrnn.marked import is_ours

        if not enabled or not is_ours(value):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_our_module
