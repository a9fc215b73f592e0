"""Layers and steps of cells of one's own, and of csrc/cells: `Cell.layer` and `.step` make them.

They are torch's modules in everything but the cell: parameters and their names and initial values,
options, packed and unbatched input, state_dict, errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _C, all_states, autocast, functional, reference
from fastrnn.define import Cell, why_no_kernels
from fastrnn.fallback import count as count_fallback
from fastrnn.heads import results as results_of_heads
from fastrnn.modules import (
    RECOMPUTE,
    _is_exporting,
    _read_weights,
    _recompute,
    _with_batch_check,
    _without_assignments,
)
from fastrnn.network import Network, is_padded


class Layer(nn.RNNBase):
    """A layer of a cell of one's own, as :class:`torch.nn.GRU` is one of its cell.

    Args:
        definition: what `fastrnn.cell` made, or `fastrnn.define.Registered`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as those of
            torch.nn.GRU.
        proj_size: as that of torch.nn.LSTM; for cells whose ``allows_projection`` is true.
        recompute: whether to save only the outputs for backward, which computes the gates again.
        heads: how many blocks W_hh has, for cells with ``recurrent="heads"``.
        device, dtype: of the parameters.

    Shape:
        - input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence
        - hx: the initial states, by default zeros or what the cell's ``initial`` says: h
          [L*D, B, H or P], or for a cell with other states (h, c, ...), c [L*D, B, H]; without B
          for unbatched input
        - resets, lengths: see `fastrnn.segments`
        - return_states: whether to return all states too, see `fastrnn.all_states`
        - output: [T, B, D*(H or P)], in the layout of the input
        - the last states: as hx

    T is the number of steps, B the batch size, I ``input_size``, H ``hidden_size``, P
    ``proj_size``, L ``num_layers``, and D is 2 if ``bidirectional``, else 1. Parameters are named
    as torch's: weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, H or P], bias_ih_l0 and bias_hh_l0 [G*H],
    weight_hr_l0 [P, H], with the rows of the gates in the order of the definition. A vector w of
    the cell is w_l0 [H]. weight_hh_l0 is [G*H] of a diagonal cell, and [heads, G*H/heads, H/heads]
    of one with heads.

    Raises:
        ValueError: for options that the cell does not allow.
    """

    recompute = _recompute
    _update_flat_weights = _read_weights

    def __init__(
        self,
        definition: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        recompute: bool = False,
        heads: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # torch checks the arguments, and names the parameters, of a layer of one gate.
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device="meta", dtype=dtype,
        )  # fmt: skip
        if proj_size and not definition.allows_projection:
            raise ValueError(f"{definition.name} does not support projections")
        self.mode = definition.name
        self.definition = definition
        self.heads = _checked_heads(definition, hidden_size, heads)
        for name, of_one_gate in list(self._parameters.items()):
            assert of_one_gate is not None
            if name.startswith("weight_hh"):
                size = _size_of_weight_hh(definition, hidden_size, of_one_gate.size(1), heads)
            else:
                rows, *columns = of_one_gate.shape
                of_gates = 1 if name.startswith("weight_hr") else len(definition.gates)
                size = (rows * of_gates, *columns)
            values = torch.empty(size, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(values))
        # A direction's vectors follow its biases.
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            vectors = [f"{vector}{suffix}" for vector in definition.vectors]
            for name in vectors:
                values = torch.empty(hidden_size, device=device, dtype=dtype)
                setattr(self, name, nn.Parameter(values))
            at = 4 if bias else 2
            names[at:at] = vectors
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        if recompute:
            setattr(self, RECOMPUTE, True)
        self._init_flat_weights()
        self.reset_parameters()

    def _get_name(self) -> str:
        return self.definition.name

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _initialize(self)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.heads > 1:
            text += f", heads={self.heads}"
        return f"{text}, recompute=True" if self.recompute else text

    def flatten_parameters(self) -> None:
        """Does nothing: cuDNN has no layers of one's own cells."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        resets: Any = None,
        lengths: Any = None,
        return_states: bool = False,
    ) -> Any:
        if resets is not None or lengths is not None or return_states:
            return all_states.call(
                Layer.forward, Layer._results, self, input, hx, self.definition.initial,
                resets=resets, lengths=lengths, return_states=return_states,
            )  # fmt: skip
        return self._results(input, hx)

    def _results(
        self, input: Any, hx: Any, events: Tensor | None = None, return_states: bool = False
    ) -> Any:
        """The output, in rows as wide as those of the operator, and the last states."""
        if not torch.compiler.is_compiling():
            # For _C.layer no states are zeros. None too before the kernels are compiled, which
            # _computed does.
            if hx is not None or not any(self.definition.initial):
                results = _C.layer(self.definition.key, self, input, hx, return_states, events)
                if results is not None:
                    return results
        elif _is_exporting():
            return _without_assignments(Layer._slow_results, self, input, hx, events, return_states)
        return self._slow_results(input, hx, events, return_states)

    def _slow_results(self, input: Any, hx: Any, events: Tensor | None, return_states: bool) -> Any:
        """As `_results`, in all cases; it raises as torch's layers do."""
        x, batch_sizes, states = self.arguments(input, hx)
        batch_sizes = batch_sizes if events is None else events
        network = self.network(return_states)
        if self.definition.recurrent == "heads":
            results = results_of_heads(self, network, x, batch_sizes, states)
        else:
            results = _computed(
                self.definition, network, x, batch_sizes, states, self._flat_weights
            )
        return self._as_given(input, *results)

    def network(self, return_states: bool = False) -> Network:
        """The network that a call computes."""
        return Network(
            self.definition.key,
            self.bias,
            self.num_layers,
            self.bidirectional,
            self.dropout,
            return_states=return_states,
            train=self.training,
            recompute=getattr(self, RECOMPUTE, False),
        )

    def arguments(self, input: Any, hx: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The input [T, B, I] or [N, I], the batch sizes of the latter, and the initial states.

        Raises:
            ValueError, RuntimeError: as torch's layers do, for sizes and dtypes that do not fit.
        """
        self._update_flat_weights()
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, order, _ = input if packed else (input, None, None, None)
        if not packed and x.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        batched = packed or x.dim() == 3
        states = self._given_states(hx, batched)
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first and not packed:
            x = x.transpose(0, 1).contiguous()  # a copy, as torch's layers make
        self.check_input(x, batch_sizes)
        sizes = self._state_sizes(x.size(1) if batch_sizes is None else batch_sizes[0])
        if states is None:
            states = [
                torch.full(size, value, dtype=x.dtype, device=x.device)
                for size, value in zip(sizes, self.definition.initial, strict=True)
            ]
        elif order is not None:
            states = [_permuted(self, state, order) for state in states]
        if not packed or not torch.compiler.is_compiling():  # which does not know the batch size
            for i, (state, size) in enumerate(zip(states, sizes, strict=True)):
                which = f"hidden[{i}]" if len(sizes) > 1 else "hidden"
                count, batch, width = map(int, size)
                text = f"Expected {which} size {{}}, got {{}}"
                self.check_hidden_size(state, (count, batch, width), text)
        return x, batch_sizes, states

    def _given_states(self, hx: Any, batched: bool) -> list[Tensor] | None:
        """The states with a batch dimension, or None."""
        if hx is None:
            return None
        states = _list_of_states(self.definition, hx)
        dims = 3 if batched else 2
        for state in states:
            if state.dim() != dims:
                raise RuntimeError(
                    f"For {'batched' if batched else 'unbatched'} {dims}-D input, hx should also "
                    f"be {dims}-D but got {state.dim()}-D tensor"
                )
        return states if batched else [state.unsqueeze(1) for state in states]

    def _state_sizes(self, batch: Any) -> list[tuple[Any, ...]]:
        count = self.num_layers * (2 if self.bidirectional else 1)
        others = [self.hidden_size] * (len(self.definition.states) - 1)
        return [(count, batch, width) for width in (self.proj_size or self.hidden_size, *others)]

    def _as_given(self, input: Any, output: Any, *states: Tensor) -> Any:
        """The results in the layout of the input."""
        last: Sequence[Tensor] = states
        if isinstance(input, PackedSequence):
            _, batch_sizes, order, back = input
            output = PackedSequence(output, batch_sizes, order, back)
            if back is not None:
                last = [_permuted(self, state, back) for state in states]
        elif input.dim() == 2:
            output, last = output.squeeze(1), [state.squeeze(1) for state in states]
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, _one_or_all(last)


class Step(nn.RNNCellBase):
    """One step of a cell of one's own, as :class:`torch.nn.GRUCell` is of :class:`torch.nn.GRU`.

    Args:
        definition: what `fastrnn.cell` made, or `fastrnn.define.Registered`.
        input_size, hidden_size, bias, device, dtype: as those of torch.nn.GRUCell.
        heads: as that of `Layer`.

    Shape:
        - input: [B, I] or [I]
        - hx: h [B, H] or [H], or for a cell with other states (h, c, ...); if not given, as in
          `Layer`
        - the new states: as hx
    """

    def __init__(
        self,
        definition: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        heads: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        gates = len(definition.gates)
        super().__init__(input_size, hidden_size, bias, gates, device=device, dtype=dtype)
        self.definition = definition
        self.heads = _checked_heads(definition, hidden_size, heads)
        sizes: dict[str, tuple[int, ...]] = dict.fromkeys(definition.vectors, (hidden_size,))
        if definition.recurrent != "dense":
            sizes["weight_hh"] = _size_of_weight_hh(definition, hidden_size, hidden_size, heads)
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self.reset_parameters()

    def _get_name(self) -> str:
        return f"{self.definition.name}_step"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _initialize(self)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        definition = self.definition
        if not torch.compiler.is_compiling() and not (hx is None and any(definition.initial)):
            results = _C.cell(definition.key, self, input, hx)
            if results is not None:
                return results
        x, states = self.arguments(input, hx)
        if definition.recurrent == "heads":
            _, *last = results_of_heads(self, self.network(), x, None, states)
        else:
            _, *last = _computed(definition, self.network(), x, None, states, self.weights)
        shape = input.shape[:-1]
        return _one_or_all([state.view(*shape, self.hidden_size) for state in last])

    def network(self) -> Network:
        """The network of one step that a call computes."""
        return Network(self.definition.key, self.bias, 1, False, 0.0)

    @property
    def weights(self) -> list[Tensor]:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        return [getattr(self, name) for name in (*names, *self.definition.vectors)]

    def arguments(self, input: Tensor, hx: Any) -> tuple[Tensor, list[Tensor]]:
        """The input [1, B, I] and the states [1, B, H] of a network of one step.

        Raises:
            ValueError, RuntimeError: as torch's cells do.
        """
        name = self.definition.name
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is None:
            size = (*input.shape[:-1], self.hidden_size)
            states = [input.new_full(size, value) for value in self.definition.initial]
        else:
            states = _list_of_states(self.definition, hx)
        for state in states:
            if state.dim() != input.dim():
                raise ValueError(
                    f"{name}: Expected hidden to be {input.dim()}D, got {state.dim()}D instead"
                )
        x, *states = (t.view(1, -1, t.size(-1)) for t in (input, *states))
        return x, states


def _checked_heads(definition: Cell, hidden_size: int, heads: int) -> int:
    if heads != 1 and definition.recurrent != "heads":
        raise ValueError(
            f'{definition.name} has no heads: define it with fastrnn.cell(recurrent="heads")'
        )
    if heads < 1 or hidden_size % heads:
        raise ValueError(
            f"{definition.name}: expected heads that divide hidden_size {hidden_size}, got {heads}"
        )
    return heads


def _size_of_weight_hh(
    definition: Cell, hidden_size: int, recurrent_size: int, heads: int
) -> tuple[int, ...]:
    rows = len(definition.gates) * hidden_size
    if definition.recurrent == "diagonal":
        return (rows,)
    if definition.recurrent == "heads":
        return heads, rows // heads, recurrent_size // heads
    return rows, recurrent_size


def _initialize(module: nn.Module) -> None:
    """Gives parameters the initial values that the cell was defined with."""
    definition = getattr(module, "definition", None)
    if definition is None:  # called by torch's __init__
        return
    for name, parameter in module.named_parameters(recurse=False):
        value = definition.init.get(re.sub(r"_l\d+(_reverse)?$", "", name))
        if value is not None:
            with torch.no_grad():
                if callable(value):
                    value(parameter)
                else:
                    parameter.fill_(value)


_permuted = _with_batch_check(nn.RNNBase.permute_hidden)


def _one_or_all(states: Sequence[Tensor]) -> Any:
    return tuple(states) if len(states) > 1 else states[0]


def _list_of_states(definition: Cell, hx: Any) -> list[Tensor]:
    count = len(definition.states)
    states = [hx] if count == 1 else hx
    if (
        not isinstance(states, (list, tuple))
        or len(states) != count
        or not all(isinstance(state, Tensor) for state in states)
    ):
        expected = "a tensor" if count == 1 else f"a tuple of {count} tensors"
        raise RuntimeError(
            f"{definition.name} expects {expected} as hx: {', '.join(definition.states)}"
        )
    return list(states)


def _computed(
    definition: Cell,
    network: Network,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Any],
) -> tuple[Tensor, ...]:
    """output and the last states: by the kernels, or by the definition if there are none."""
    dtypes = autocast.dtypes(network.cell, is_padded(batch_sizes), x, states, weights)
    missing = why_no_kernels(definition.key, dtypes[0] or x.dtype, x.device.type)
    if missing is None:
        h0, *c0 = states
        given = states if len(c0) < 2 else [h0, torch.cat(c0, dim=-1)]
        kernels = functional.network_results(network, x, batch_sizes, given, weights, dtypes)
        return _apart(kernels, len(c0))
    count_fallback(f"{definition.name} {missing}", "its definition runs step by step")
    h0, *c0 = states
    mask = None
    if network.drops:
        rows, width = x.shape[:-1].numel(), network.directions * states[0].size(-1)
        mask = torch.rand(network.num_layers - 1, rows, width, device=x.device) >= network.dropout
    options = network._asdict()
    del options["train"], options["recompute"]
    found = reference.run(
        input=x, h0=h0, c0=states_together(c0), weights=weights, batch_sizes=batch_sizes,
        dropout_mask=mask, **options,
    )  # fmt: skip
    return _apart(found, len(c0))


def states_together(c: Sequence[Tensor]) -> Tensor | None:
    """The states besides h, [..., H] each, as the operators have them: one tensor [..., C]."""
    return None if not c else c[0] if len(c) == 1 else torch.cat(list(c), dim=-1)


def _apart(results: Sequence[Tensor | None], count: int) -> tuple[Tensor, ...]:
    """output and all states, from results whose last is such a tensor of `count` states."""
    output, h_n, *c_n = (t for t in results if t is not None)
    c = c_n[0].chunk(count, dim=-1) if count > 1 else c_n
    return output, h_n, *c
