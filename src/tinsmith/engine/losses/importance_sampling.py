"""importance_sampling = -sum(exp(logprob - sampled logprob) * advantage)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinsmith.engine.losses.base import Inputs, Loss


def _value(logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    return -(logprobs - inputs["logprobs"]).exp() * inputs["advantages"]


IMPORTANCE_SAMPLING = Loss("importance_sampling", _value, required=("logprobs", "advantages"))
