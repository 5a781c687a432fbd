"""dro = -sum(logprob * advantage - beta / 2 * (logprob - sampled logprob)^2), beta 0.05."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinsmith.engine.losses.base import Inputs, Loss


def _value(logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    quadratic = (logprobs - inputs["logprobs"]).square()
    return -(logprobs * inputs["advantages"] - 0.5 * config["beta"] * quadratic)


DRO = Loss("dro", _value, required=("logprobs", "advantages"), config={"beta": 0.05})
