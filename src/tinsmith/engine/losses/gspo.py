"""gspo = -sum(min(s_t * advantage, clip(s_t, low, high) * advantage)), bounds 0.8 and 1.2.

GSPO-token of Zheng et al. 2025 (arXiv 2507.18071, section 4.3), as Tinker's documentation has it: s_t has
the value of the sequence's ratio, the geometric mean of the tokens' ratios over `sequence_ratio_mask`,
and the gradient of its own token's logprob.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinsmith.engine.losses.base import Inputs, Loss
from tinsmith.engine.losses.clipping import BOUNDS, clipped
from tinsmith.wire.training import Array, ContentError

MASK = "sequence_ratio_mask"


def _value(
    logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]
) -> tuple[Tensor, Mapping[str, float]]:
    detached = logprobs.detach()
    log_ratio = (detached - inputs["logprobs"])[inputs[MASK] != 0].mean()
    ratio = (log_ratio + logprobs - detached).exp()
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, clipped(ratio, inputs, config) * advantages), {}


def _check(inputs: Mapping[str, Array], where: str) -> None:
    if not inputs[MASK].any():
        raise ContentError(
            f"{where}.loss_fn_inputs[{MASK!r}] is 0 everywhere; mark the sampled tokens with 1: gspo takes "
            "the sequence's ratio over them"
        )


GSPO = Loss(
    "gspo",
    whole=_value,
    required=("logprobs", "advantages", MASK),
    optional=BOUNDS,
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    check_inputs=_check,
)
