"""ppo = -sum(min(ratio * advantage, clip(ratio, low, high) * advantage)), bounds 0.8 and 1.2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinsmith.engine.losses.base import Inputs, Loss
from tinsmith.engine.losses.clipping import BOUNDS, clipped


def _value(logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    ratio = (logprobs - inputs["logprobs"]).exp()
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, clipped(ratio, inputs, config) * advantages)


PPO = Loss(
    "ppo",
    _value,
    required=("logprobs", "advantages"),
    optional=BOUNDS,
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
)
