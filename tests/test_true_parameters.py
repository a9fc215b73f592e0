"""Parametrized weights: the original parameters are trained, as with torch's layers.

test_module_weights.py and test_weights_fresh.py change such parameters without an optimizer.
"""

import pytest
import torch
from helpers import LAYERS, flat
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from training_cases import CASES, mean_squares, module_pair

# Runs before any kernel, so one instruction set is enough.
pytestmark = pytest.mark.once


class LowRank(nn.Module):
    """W + B A, where only A and B are trained; their rank is 2."""

    def __init__(self, weight):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(2, columns, dtype=weight.dtype) / 4)
        self.B = nn.Parameter(torch.zeros(rows, 2, dtype=weight.dtype))

    def forward(self, weight):
        return weight + self.B @ self.A


def low_rank(module, name):
    for p in module.parameters():
        p.requires_grad_(False)
    parametrize.register_parametrization(module, name, LowRank(getattr(module, name)))


def unstructured(module, name):
    prune.l1_unstructured(module, name, amount=0.4)


#: parametrization -> how the names of a weight's original parameters end
ORIGINALS = {
    parametrizations.weight_norm: ["original0", "original1"],
    parametrizations.spectral_norm: ["original"],
    parametrizations.orthogonal: ["original"],
    low_rank: ["0.A", "0.B"],
    unstructured: ["_orig"],
    nn.utils.weight_norm: ["_g", "_v"],
    nn.utils.spectral_norm: ["_orig"],
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "how", ORIGINALS, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}"
)
@pytest.mark.parametrize("case", CASES)
def test_original_parameters_are_trained(case, how):
    ours, theirs, args = module_pair(case)
    name = "weight_hh_l0" if case in LAYERS else "weight_hh"
    losses = []
    for module in [ours, theirs]:
        torch.manual_seed(1)
        how(module, name)
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        originals = [next(n for n in names if n.endswith(end)) for end in ORIGINALS[how]]
        assert name not in names
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            # cached() evaluates once per call. torch's layers evaluate several times otherwise, and
            # spectral_norm does a power iteration in each evaluation.
            with parametrize.cached():
                loss = mean_squares(module(*args))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        after = dict(module.named_parameters())
        moved = [n for n in before if not torch.equal(before[n], after[n])]
        assert moved == names
        assert set(originals) <= set(moved)
        assert all(after[n].grad.any() for n in originals)
    assert len(set(map(float, losses[:3]))) == 3  # each call uses the step before it
    assert_close(losses[:3], losses[3:])
    assert_close(ours.state_dict(), theirs.state_dict())

    # A plain layer with the trained weights gives the same results.
    for module in [ours, theirs]:
        module.eval()
    results = flat(ours(*args))
    plain = module_pair(case)[1]
    plain.load_state_dict({n: getattr(ours, n).detach() for n in plain.state_dict()})
    assert_close(results, flat(plain(*args)))
    assert_close(results, flat(theirs(*args)))


@pytest.mark.parametrize("case", CASES)
def test_pruned_weights_stay_zero(case):
    ours, _, args = module_pair(case)
    name = "weight_hh_l0" if case in LAYERS else "weight_hh"
    unstructured(ours, name)
    zeros = getattr(ours, f"{name}_mask") == 0
    assert zeros.float().mean().item() == pytest.approx(0.4, abs=0.01)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    for _ in range(2):
        mean_squares(ours(*args)).backward()
        assert not getattr(ours, f"{name}_orig").grad[zeros].any()
        optimizer.step()
    expected = flat(ours(*args))
    prune.remove(ours, name)
    assert isinstance(getattr(ours, name), nn.Parameter)
    assert not getattr(ours, name)[zeros].any()
    assert_close(flat(ours(*args)), expected)
