"""AdamW over an adapter's flat buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinsmith.engine.commands import AdamParams
from tinsmith.engine.kernels import optimizer as kernel
from tinsmith.engine.optimizers.clipping import clip, clip_coefficient, gradient_norm
from tinsmith.wire.training import ContentError


@torch.no_grad()
def adamw(
    params: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    settings: AdamParams,
    norm: float | None = None,
) -> float:
    """One step of torch.optim.AdamW, in place on flat fp32 `params`, `first` and `second` moments.

    `step` counts from 1. `gradient` is clipped to the global norm first and may be left changed; `norm` is
    the one that it has, if that is known. Returns the norm before clipping. Raises ContentError, with nothing
    changed, where a factor is beyond fp32.
    """
    decay = 1 - settings.learning_rate * settings.weight_decay
    rate = settings.learning_rate / (1 - settings.beta1**step)
    if not max(abs(decay), rate, settings.eps) <= torch.finfo(torch.float32).max:
        raise ContentError(
            f"adam_params: learning_rate {settings.learning_rate} with weight_decay {settings.weight_decay} "
            f"and eps {settings.eps} goes beyond fp32; use smaller ones"
        )
    correction = math.sqrt(1 - settings.beta2**step)
    norm = gradient_norm(gradient) if norm is None else norm
    if kernel.usable(params):
        kernel.adamw(
            params, gradient, first, second, scale=clip_coefficient(norm, settings.grad_clip_norm),
            decay=decay, betas=(settings.beta1, settings.beta2), eps=settings.eps, rate=rate,
            correction=correction,
        )  # fmt: skip
        return norm
    clip(gradient, norm, settings.grad_clip_norm)
    if params.device.type == "cuda":
        fused(params, gradient, first, second, step, settings)
        return norm
    params.mul_(decay)
    first.lerp_(gradient, 1 - settings.beta1)
    second.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
    denominator = (second.sqrt() / correction).add_(settings.eps)
    params.addcdiv_(first, denominator, value=-rate)
    return norm


@torch.no_grad()
def fused(
    params: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, settings: AdamParams
) -> None:
    """The same step behind the clipping, by torch's fused kernel: one pass over memory."""
    steps = torch.full((), float(step), device=params.device)
    torch._fused_adamw_(
        [params], [gradient], [first], [second], [], [steps], lr=settings.learning_rate,
        beta1=settings.beta1, beta2=settings.beta2, weight_decay=settings.weight_decay, eps=settings.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
