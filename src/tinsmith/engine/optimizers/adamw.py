"""AdamW over an adapter's flat buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinsmith.engine.commands import AdamParams
from tinsmith.engine.optimizers.clipping import clip
from tinsmith.wire.training import ContentError


@torch.no_grad()
def adamw(
    params: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, settings: AdamParams
) -> float:
    """One step of torch.optim.AdamW, in place on flat fp32 `params`, `first` and `second` moments.

    `step` counts from 1. `gradient` is clipped to the global norm first and is left changed. Returns
    the norm before clipping. Raises ContentError, with nothing changed, where a factor is beyond fp32.
    """
    decay = 1 - settings.learning_rate * settings.weight_decay
    rate = settings.learning_rate / (1 - settings.beta1**step)
    if not max(abs(decay), rate, settings.eps) <= torch.finfo(torch.float32).max:
        raise ContentError(
            f"adam_params: learning_rate {settings.learning_rate} with weight_decay {settings.weight_decay} "
            f"and eps {settings.eps} goes beyond fp32; use smaller ones"
        )
    norm = clip(gradient, settings.grad_clip_norm)
    params.mul_(decay)
    first.lerp_(gradient, 1 - settings.beta1)
    second.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
    correction = math.sqrt(1 - settings.beta2**step)
    denominator = (second.sqrt() / correction).add_(settings.eps)
    params.addcdiv_(first, denominator, value=-rate)
    return norm
