"""sb3-contrib's recurrent policies, with fused layers also where an episode ends in a sequence.

    from fastrnn.integrations.sb3 import MlpLstmPolicy

    model = RecurrentPPO(MlpLstmPolicy, "CartPole-v1")  # instead of "MlpLstmPolicy"

sb3-contrib's own policies compute a batch step by step, in a Python loop, if any sequence of it has
a new episode. These compute it by one call with `resets=`, with the same results. ``CnnLstmPolicy``
and ``MultiInputLstmPolicy`` are the other two. A saved model has the policy's class, so a process
that loads it needs fastrnn.
"""

from __future__ import annotations

from typing import Any

from sb3_contrib.ppo_recurrent import policies
from torch import Tensor, nn

import fastrnn

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy"]

_States = tuple[Tensor, Tensor]


class _WithResets(nn.Module):
    """The part of a policy that is computed by fastrnn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fastrnn.accelerate(self)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: _States, episode_starts: Tensor, lstm: nn.LSTM
    ) -> tuple[Tensor, _States]:
        """The output of an LSTM, and its last states.

        Args:
            features: [B * T, I], row by row.
            lstm_states: (h, c), [L, B, H] each.
            episode_starts: [B * T], 1 where a step begins an episode, else 0.
            lstm: the actor's or the critic's.
        """
        batch = lstm_states[0].shape[1]
        sequence = features.reshape(batch, -1, lstm.input_size).swapaxes(0, 1)
        starts = episode_starts.reshape(batch, -1).swapaxes(0, 1)
        if len(sequence) == 1:  # while data is collected
            keep = (1.0 - starts).view(1, batch, 1)
            output, states = lstm(sequence, (keep * lstm_states[0], keep * lstm_states[1]))
        else:
            output, states = lstm(sequence, lstm_states, resets=starts > 0.5)
        return output.transpose(0, 1).flatten(0, 1), states


class MlpLstmPolicy(_WithResets, policies.MlpLstmPolicy):  # type: ignore[misc]
    """sb3_contrib.ppo_recurrent.MlpLstmPolicy, computed by fastrnn."""


class CnnLstmPolicy(_WithResets, policies.CnnLstmPolicy):  # type: ignore[misc]
    """sb3_contrib.ppo_recurrent.CnnLstmPolicy, computed by fastrnn."""


class MultiInputLstmPolicy(_WithResets, policies.MultiInputLstmPolicy):  # type: ignore[misc]
    """sb3_contrib.ppo_recurrent.MultiInputLstmPolicy, computed by fastrnn."""
