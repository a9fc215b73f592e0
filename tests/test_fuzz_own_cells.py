"""Random layers of cells of one's own, compared with a loop of their definitions."""

from dataclasses import dataclass

import pytest
import torch
from helpers import check_examples, example_count, leaves, ragged
from hypothesis import note
from hypothesis import strategies as st
from own_cells import CELLS, WIDE, by_definition, states_of, values_and_gradients

pytestmark = pytest.mark.cpu("own cells have kernels on the CPU")
KINDS = {definition.name: definition for definition in [*CELLS, *WIDE]}
flags = st.booleans()


@dataclass(frozen=True)
class Case:
    """A layer and its arguments; H is heads times units."""

    kind: str
    lengths: tuple[int, ...]
    I: int
    units: int
    heads: int
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    packed: bool
    state: bool
    threads: int
    recompute: bool
    seed: int


cases = st.builds(
    Case,
    kind=st.sampled_from(list(KINDS)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9).map(tuple),
    I=st.integers(1, 40), units=st.integers(1, 40), heads=st.integers(1, 4),
    layers=st.integers(1, 3), bidirectional=flags, bias=flags, batch_first=flags, packed=flags,
    state=flags, threads=st.integers(1, 3), recompute=flags, seed=st.integers(0, 2**16),
)  # fmt: skip


def check(case: Case) -> None:
    note(f"check({case!r})")
    torch.manual_seed(case.seed)
    torch.set_num_threads(case.threads)
    definition, dtype = KINDS[case.kind], torch.float64
    heads = {"heads": case.heads} if definition.recurrent == "heads" else {}
    H = case.units * heads.get("heads", 1)
    layer = definition.layer(
        case.I, H, case.layers, case.bias, case.batch_first, bidirectional=case.bidirectional,
        recompute=case.recompute, dtype=dtype, **heads,
    )  # fmt: skip
    batch, steps = len(case.lengths), max(case.lengths)
    if case.packed:
        x = ragged(case.lengths, case.I, dtype)
    else:
        size = (batch, steps) if case.batch_first else (steps, batch)
        x = torch.randn(*size, case.I, dtype=dtype)
    given = states_of(layer, batch)
    if not case.state:
        states = given if isinstance(given, tuple) else (given,)
        initial = tuple(
            torch.full_like(state, value)
            for state, value in zip(states, definition.initial, strict=True)
        )
        given = initial if len(initial) > 1 else initial[0]
    x, hx = leaves((x, given))
    expected = values_and_gradients(lambda *args: by_definition(layer, *args), layer, x, hx)
    torch.testing.assert_close(values_and_gradients(layer, layer, x, hx), expected)
    if not case.state:
        torch.testing.assert_close(layer(x)[0], layer(x, hx)[0])


def test_layers(pytestconfig):
    check_examples(pytestconfig, cases, check, max(1, example_count(pytestconfig) // 25))
