"""torch.ao's table of dynamic quantization, by the exact type, with fastrnn's layers in it too.

A layer with a qconfig is quantized as torch's layer on the same parameters.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from fastrnn.modules import FAST, as_torchs
from fastrnn.when_imported import when_imported


def install() -> None:
    """Add to the table, now or when it is imported."""
    when_imported("torch.ao.quantization.quantization_mappings", _add)


def _add(mappings: ModuleType) -> None:
    table = mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
    for theirs, ours in FAST.items():
        if theirs in table:  # there is no quantized RNN
            table[ours] = _from_ours(table[theirs], theirs)


def _from_ours(quantized: Any, theirs: type[nn.Module]) -> Any:
    def from_float(cls: Any, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        return quantized.from_float(as_torchs(mod, theirs), use_precomputed_fake_quant)

    namespace = {
        "__doc__": quantized.__doc__,
        "__module__": __name__,
        "from_float": classmethod(from_float),
    }
    return type(quantized.__name__, (quantized,), namespace)
