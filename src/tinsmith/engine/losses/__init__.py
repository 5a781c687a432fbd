"""The losses that forward_backward knows, each in a file of its own.

A loss is a function of the target tokens' logprobs, token by token or of a whole datum; reduction is a sum
over tokens, datums and calls. Formulas: https://tinker-docs.thinkingmachines.ai/losses and docs/losses.md.
"""

from __future__ import annotations

from tinsmith.engine.aside import Aside
from tinsmith.engine.losses.base import Inputs, Loss
from tinsmith.engine.losses.cispo import CISPO
from tinsmith.engine.losses.cross_entropy import CROSS_ENTROPY
from tinsmith.engine.losses.custom import custom_loss
from tinsmith.engine.losses.dro import DRO
from tinsmith.engine.losses.gspo import GSPO
from tinsmith.engine.losses.importance_sampling import IMPORTANCE_SAMPLING
from tinsmith.engine.losses.ppo import PPO
from tinsmith.engine.losses.stable_reinforce import STABLE_REINFORCE
from tinsmith.wire.training import ContentError, TrainingRequest

_ALL = (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO, STABLE_REINFORCE)
LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ALL}


def find_loss(request: TrainingRequest, aside: Aside) -> Loss:
    """The loss that a request asks for: one of the built-in ones, or a custom one of its session. Raises
    ContentError."""
    if request.loss_fn == "custom":
        return custom_loss(request.config, aside)
    loss = LOSSES.get(request.loss_fn)
    if loss is None:
        known = ", ".join(sorted([*LOSSES, "custom"]))
        raise ContentError(f"loss_fn {request.loss_fn!r} is not known; use one of: {known}")
    return loss


__all__ = ["LOSSES", "Inputs", "Loss", "find_loss"]
