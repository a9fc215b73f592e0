"""fastrnn's layers in torch.ao's table of dynamic quantization, which lists exact types.

A layer with a qconfig is quantized as torch's layer with the same parameters.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from fastrnn.copies import with_class
from fastrnn.modules import FAST
from fastrnn.when_imported import when_imported


def install() -> None:
    """Add the layers to the table, now or when it is imported."""
    when_imported("torch.ao.quantization.quantization_mappings", _add)


def _add(mappings: ModuleType) -> None:
    table = mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
    for theirs, ours in FAST.items():
        if theirs in table:  # there is no quantized RNN
            table[ours] = _from_ours(table[theirs], theirs)


def _from_ours(quantized: Any, theirs: type[nn.Module]) -> Any:
    def from_float(cls: Any, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        return quantized.from_float(with_class(mod, theirs), use_precomputed_fake_quant)

    namespace = {
        "__doc__": quantized.__doc__,
        "__module__": __name__,
        "from_float": classmethod(from_float),
    }
    return type(quantized.__name__, (quantized,), namespace)
