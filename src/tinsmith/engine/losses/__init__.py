"""The losses that forward_backward knows, each in a file of its own.

A loss is a function of the target tokens' logprobs, token by token or of a whole datum; reduction is a sum
over tokens, datums and calls. Formulas: https://tinker-docs.thinkingmachines.ai/losses and docs/losses.md.
"""

from __future__ import annotations

from tinsmith.engine.losses.base import Inputs, Loss
from tinsmith.engine.losses.cispo import CISPO
from tinsmith.engine.losses.cross_entropy import CROSS_ENTROPY
from tinsmith.engine.losses.dro import DRO
from tinsmith.engine.losses.gspo import GSPO
from tinsmith.engine.losses.importance_sampling import IMPORTANCE_SAMPLING
from tinsmith.engine.losses.ppo import PPO
from tinsmith.engine.losses.stable_reinforce import STABLE_REINFORCE

_ALL = (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO, STABLE_REINFORCE)
LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ALL}

__all__ = ["LOSSES", "Inputs", "Loss"]
