"""cross_entropy = sum(-logprob * weights); without weights every target counts 1."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinsmith.engine.losses.base import Inputs, Loss


def _value(logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    return -logprobs


# As the hosted service answers: programs look for `elementwise_loss`, and print the type.
CROSS_ENTROPY = Loss(
    "cross_entropy", _value, many_targets=True, output_type="CrossEntropyLossReturn", elementwise=True
)
