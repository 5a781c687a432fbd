"""cispo = -sum(stop_grad(clip(ratio, low, high)) * logprob * advantage), bounds 0 and 4."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinsmith.engine.losses.base import Inputs, Loss
from tinsmith.engine.losses.clipping import BOUNDS, clipped


def _value(logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    ratio = (logprobs.detach() - inputs["logprobs"]).exp()
    return -clipped(ratio, inputs, config) * logprobs * inputs["advantages"]


CISPO = Loss(
    "cispo",
    _value,
    required=("logprobs", "advantages"),
    optional=BOUNDS,
    config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
)
