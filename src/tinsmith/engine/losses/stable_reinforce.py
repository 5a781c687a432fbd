"""stable_reinforce = sum over sampled tokens of -w * advantage * logprob + kl_coeff / 2 * (logprob - q)^2.

w = 1 where the advantage is positive, else min(ratio, 1), without gradient; q is the logprob that the token
was sampled with. Tinker's own objective is not public. This is the closest published method: Tapered
Off-Policy REINFORCE (Le Roux et al. 2025, arXiv 2503.14286) token by token, with the squared log-ratio of
Kimi k1.5 (arXiv 2501.12599, equation 3) for the divergence from what was sampled from, which is Schulman's
estimator k2. As long as the policy is the one that was sampled from, the gradient is that of REINFORCE.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.aside import Aside
from tinsmith.engine.losses.base import Inputs, Loss
from tinsmith.engine.provenance import sampled_targets
from tinsmith.wire.training import Array, ContentError, Datum

SAMPLED = "is_sampled"


def _value(logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    advantages, log_ratio = inputs["advantages"], logprobs - inputs["logprobs"]
    tapered = torch.where(advantages < 0, log_ratio.detach().exp().clamp(max=1.0), 1.0)
    value = -tapered * advantages * logprobs + 0.5 * config["kl_coeff"] * log_ratio.square()
    return torch.where(inputs[SAMPLED] != 0, value, 0.0)


class _StableReinforce(Loss):
    """Adds to a datum's inputs which of its targets were sampled and, unless it brings them, with which
    logprobs; both are what was recorded then."""

    def check(self, datum: Datum, where: str, vocab: int, aside: Aside) -> tuple[Array, dict[str, Array]]:
        targets, inputs = super().check(datum, where, vocab, aside)
        is_sampled, recorded = sampled_targets(datum, targets, where, aside)
        inputs.setdefault("logprobs", recorded)
        inputs[SAMPLED] = is_sampled.astype(np.float32)
        alone = np.flatnonzero((inputs["advantages"] != 0) & ~is_sampled)
        if alone.size:
            raise ContentError(
                f"{where}.loss_fn_inputs['advantages'] is not 0 at position {alone[0]}, which no sampled "
                f"span covers; {self.name} moves sampled tokens alone"
            )
        return targets, inputs


STABLE_REINFORCE = _StableReinforce(
    "stable_reinforce",
    _value,
    required=("advantages",),
    optional=("logprobs",),
    config={"kl_coeff": 0.0},
)
