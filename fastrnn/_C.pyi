from typing import Any

has_cuda: bool

def cells() -> dict[str, dict[str, int]]: ...
def build_info() -> dict[str, Any]: ...
def without_lost_threads() -> None: ...
def layer(cell: str, module: Any, input: Any, hx: Any) -> Any: ...
def cell(cell: str, module: Any, input: Any, hx: Any) -> Any: ...
def network(
    cell: str,
    input: Any,
    hx: Any,
    params: Any,
    batch_sizes: Any,
    options: tuple[bool, int, bool, float],
    train: bool,
    recompute: bool,
    dtype: Any,
) -> Any: ...
def step(cell: str, input: Any, hx: Any, params: Any, dtype: Any) -> Any: ...
def autocast_to(tensors: Any, dtype: Any) -> list[Any]: ...
def explain(
    cell: str,
    input: Any,
    h0: Any,
    c0: Any,
    weights: Any,
    batch_sizes: Any,
    options: tuple[bool, int, bool, float],
) -> list[tuple[dict[str, str], dict[str, str]]]: ...
