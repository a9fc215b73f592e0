"""Cells of one's own: a Python function of one step becomes layers with fused kernels.

    @fastrnn.cell(gates=("f", "g", "o"))
    def coupled_lstm(x, r, h, c):
        f, o = torch.sigmoid(x.f + r.f), torch.sigmoid(x.o + r.o)
        c = f * c + (1 - f) * torch.tanh(x.g + r.g)
        return o * torch.tanh(c), c

    layer = coupled_lstm.layer(32, 64, num_layers=2, bidirectional=True)
    step = coupled_lstm.step(32, 64)

The function is traced, differentiated and written as C++ (fastrnn/codegen), and compiled at the
first call of a dtype on the CPU, and on a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrnn import _C, reference
from fastrnn.codegen import Gates, compiler, cuda, generate
from fastrnn.registered import CELLS

if TYPE_CHECKING:
    from fastrnn.own_modules import Layer, Step

_cells: dict[str, Cell] = {}  # by key
_LOAD = {"cpu": compiler.load, **({"cuda": cuda.load} if _C.has_cuda else {})}  # by device
_TORCH_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

#: What W_hh is: a matrix, a vector a gate, or a matrix for each head of the hidden units.
RECURRENT = ("dense", "diagonal", "heads")

#: A parameter's initial values: a number, or a function that fills the tensor in place.
Init = float | Callable[[Tensor], Any]


def cell(
    *,
    gates: Sequence[str],
    name: str | None = None,
    recurrent: str = "dense",
    initial: Mapping[str, float] | None = None,
    init: Mapping[str, Init] | None = None,
) -> Callable[[Callable[..., Any]], Definition]:
    """Define a recurrent cell by a Python function of one step.

    The function gets

    - x: W_ih x_t + b_ih, and r: W_hh h_{t-1} + b_hh, by gate: ``x.f`` or ``x[0]``,
    - the states h_{t-1}, and up to three others such as c_{t-1},
    - as keyword-only arguments vectors of one value a unit, which layers have as parameters,

    and returns the new states in the same order. It may use + - * /, comparisons in torch.where,
    and torch's sigmoid, tanh, relu, exp, log, logsigmoid, softplus, silu, sqrt, rsqrt, abs, square,
    maximum, minimum, clamp, erf and gelu.

    Args:
        gates: the names of the gates, in the order of the rows of weight_ih and weight_hh.
        name: of the cell; by default that of the function.
        recurrent: W_hh is "dense" [G*H, H]; "diagonal" [G*H], so that r = w h_{t-1} + b_hh unit by
            unit; or "heads" [heads, G*H/heads, H/heads], a block for each of the heads that a layer
            is given.
        initial: what states begin with, by name, where that is not 0.
        init: a parameter's initial values, by its name without layer and direction: a number, or a
            function that fills the tensor, such as those of torch.nn.init. By default torch's.

    Returns:
        A decorator that makes a `Definition` of the function.

    Raises:
        CellError: the function uses something else; the message has the line.
        ValueError: `recurrent`, `initial` or `init` is not as above.
    """

    def define(function: Callable[..., Any]) -> Definition:
        return Definition(function, gates, name, recurrent, initial or {}, init or {})

    return define


class Cell:
    """What layers and steps are made of: a cell of one's own, or one of csrc/cells."""

    name: str
    key: str
    """What the operators call it."""
    gates: tuple[str, ...]
    states: tuple[str, ...]
    """h, and up to three others, such as c."""
    vectors: tuple[str, ...]
    """The parameters of one value a unit."""
    recurrent: str = "dense"
    """One of `RECURRENT`."""
    initial: tuple[float, ...]
    """What the states begin with."""
    init: Mapping[str, Init]
    allows_projection: bool

    def why_no_kernels(self, dtype: torch.dtype, device: str) -> str | None:
        """Why there are no kernels for a dtype and device, or None. Compiles them if need be.

        Without kernels the definition runs step by step.
        """
        raise NotImplementedError

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        return self

    def layer(self, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> Layer:
        """A layer of this cell, with the options, parameter names and results of torch.nn.GRU, or
        for a cell with c of torch.nn.LSTM. See `fastrnn.own_modules.Layer`."""
        from fastrnn.own_modules import Layer

        return Layer(self, input_size, hidden_size, *args, **kwargs)

    def step(self, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> Step:
        """One step of this cell, as torch.nn.GRUCell is of torch.nn.GRU. See
        `fastrnn.own_modules.Step`."""
        from fastrnn.own_modules import Step

        return Step(self, input_size, hidden_size, *args, **kwargs)


class Registered(Cell):
    """A cell that was built with fastrnn: a line of csrc/cells/registry.h.

    Args:
        name: in `fastrnn.CELLS`.
    """

    def __init__(self, name: str) -> None:
        if name not in CELLS or "-" in name:
            raise ValueError(f"no cell is called '{name}', expected one of: {', '.join(CELLS)}")
        info = CELLS[name]
        self.name = self.key = name
        self.gates = tuple(map(str, range(info["gates"])))
        self.states = ("h", *(f"c{i}" if i else "c" for i in range(info["states"] - 1)))
        self.vectors = tuple(f"w{i}" for i in range(info["vectors"]))
        self.recurrent = "diagonal" if info["diagonal"] else "dense"
        self.initial, self.init = (0.0,) * len(self.states), {}
        self.allows_projection = bool(info["allows_projection"])
        _cells[name] = self

    def __reduce__(self) -> Any:
        return Registered, (self.name,)

    def why_no_kernels(self, dtype: torch.dtype, device: str) -> str | None:
        built = device in ("cpu", "meta") or (device == "cuda" and _C.has_cuda)
        if not built:
            return f"on {device}"
        return None if dtype in compiler.TYPES else f"of {dtype}"


class Definition(Cell):
    """A cell of one's own, made by `fastrnn.cell`. Calling it calls the function.

    Pickled by the qualified name of the function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        gates: Sequence[str],
        name: str | None = None,
        recurrent: str = "dense",
        initial: Mapping[str, float] = MappingProxyType({}),
        init: Mapping[str, Init] = MappingProxyType({}),
    ) -> None:
        diagonal = recurrent == "diagonal"
        self.generated = generate(function, gates=gates, name=name, diagonal=diagonal)
        self.name, self.gates = self.generated.name, self.generated.gates
        self.states, self.vectors = self.generated.states, self.generated.vectors
        if recurrent not in RECURRENT:
            raise self._error("recurrent", recurrent, RECURRENT)
        for state in initial:
            if state not in self.states:
                raise self._error("initial of", state, self.states)
        parameters = (*_TORCH_PARAMETERS, *self.vectors)
        for parameter in init:
            if parameter not in parameters:
                raise self._error("init of", parameter, parameters)
        self.recurrent, self.init = recurrent, dict(init)
        self.initial = tuple(float(initial.get(state, 0)) for state in self.states)
        # Heads have no h in common that a projection could mix.
        self.allows_projection = self.generated.allows_projection and recurrent != "heads"
        self.function = function
        functools.update_wrapper(self, function)
        # What layers and exported graphs call the cell: another definition has another name.
        digest = hashlib.sha256(self.generated.header.encode()).hexdigest()[:8]
        self.key = f"{self.name}-{digest}"
        self._lock = threading.Lock()
        self._checked = False
        self._built: set[tuple[str, torch.dtype]] = set()  # devices and dtypes
        self._why_not: dict[str, str] = {}  # by device
        reference.CELLS[self.key] = self._one_step
        reference.VECTORS[self.key] = len(self.vectors)
        _cells[self.key] = self

    def _error(self, what: str, found: str, expected: Sequence[str]) -> ValueError:
        return ValueError(
            f"cell {self.name!r}: {what} {found!r}, expected one of: {', '.join(expected)}"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<cell {self.name}: gates {', '.join(self.gates)}; states {', '.join(self.states)}>"

    def __reduce__(self) -> Any:
        return _by_name, (self.function.__module__, self.function.__qualname__)

    def build(
        self,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        device: str | torch.device = "cpu",
    ) -> None:
        """Compile the kernels for these dtypes now, rather than at the first call of each.

        Compiled kernels are kept in FASTRNN_CACHE, by default fastrnn in ~/.cache, for later
        processes.

        Args:
            device: "cpu", or "cuda" for the GPUs of this process.

        Raises:
            ValueError: for a dtype other than float32, float64, bfloat16 and float16, or a device
                without kernels in this build of fastrnn.
            CellError: if the generated backward differs from autograd's.
            CompileError: if the compiler refuses the generated source.
            NoCompiler: without a compiler; for "cuda", without nvcc or a GPU.
        """
        kind = device.type if isinstance(device, torch.device) else device
        if kind not in self._devices:
            raise ValueError(
                f"{self.name}: this build of fastrnn can compile it for "
                f"{' and '.join(self._devices)}, got device {kind!r}"
            )
        for dtype in dtypes:
            if dtype not in compiler.TYPES:
                raise ValueError(
                    f"{self.name}: expected dtypes among {', '.join(map(str, compiler.TYPES))}, "
                    f"got {dtype}"
                )
            with self._lock:
                if (kind, dtype) in self._built:
                    continue
                if not self._checked:
                    # In a thread of its own: the first call may be inside vmap, where random
                    # numbers are an error, or another transform or mode, which are a thread's own.
                    with ThreadPoolExecutor(1) as alone:
                        alone.submit(self.generated.check).result()
                    self._checked = True
                _LOAD[kind](self.key, self.generated.struct, self.generated.header, dtype)
                CELLS.update(_C.cells())
                self._built.add((kind, dtype))

    def why_no_kernels(self, dtype: torch.dtype, device: str) -> str | None:
        device = "cpu" if device == "meta" else device
        if (device, dtype) in self._built:
            return None
        if device not in self._devices:
            return f"on {device}"
        if dtype not in compiler.TYPES:
            return f"of {dtype}"
        if device not in self._why_not:
            try:
                self.build([dtype], device)
                return None
            except compiler.NoCompiler as error:
                of_device = "" if device == "cpu" else f"on {device} "
                self._why_not[device] = f"{of_device}without a compiler ({error})"
        return self._why_not[device]

    @property
    def _devices(self) -> Sequence[str]:
        """Those that it can be compiled for."""
        on_gpus = not self.generated.step.takes_arrays and self.recurrent != "diagonal"
        return [device for device in _LOAD if device == "cpu" or on_gpus]

    def _one_step(
        self, x: Tensor, r: Tensor, h: Tensor, c: Tensor | None, *vectors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One step as `fastrnn.reference` has them."""
        count = len(self.gates)
        gates = [Gates(self.gates, products.chunk(count, dim=-1)) for products in (x, r)]
        others = () if c is None else c.chunk(len(self.states) - 1, dim=-1)
        named = dict(zip(self.vectors, vectors, strict=True))
        returned = self.function(*gates, h, *others, **named)
        if c is None:
            return returned, None
        h, *others = returned
        return h, torch.cat(others, dim=-1) if len(others) > 1 else others[0]


def why_no_kernels(key: str, dtype: torch.dtype, device: str) -> str | None:
    """`Cell.why_no_kernels` of the cell with this key."""
    return _cells[key].why_no_kernels(dtype, device)


# torch.compile calls it while it traces, and takes what it returns for a constant:
# torch._dynamo.assume_constant_result, which would import Dynamo now.
why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _by_name(module: str, qualified_name: str) -> Definition:
    """The definition of that name, which a process that unpickles it has to have."""
    __import__(module)
    found: Any = sys.modules[module]
    for part in qualified_name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Definition):
        raise TypeError(f"{module}.{qualified_name} is not a cell of fastrnn.cell")
    return found
