"""Clipping by the global norm, the same for every optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinsmith.engine.kernels import optimizer as kernel


def clip_coefficient(norm: float, limit: float) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients by; `limit` 0 switches clipping off."""
    return 1.0 if limit <= 0 else min(1.0, limit / (norm + 1e-6))


def gradient_norm(gradient: Tensor) -> float:
    """The L2 norm of a flat fp32 gradient, summed in fp64: finite if and only if all of it is."""
    if kernel.usable(gradient):
        return math.sqrt(kernel.sum_of_squares(gradient))
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def clip(gradient: Tensor, norm: float, limit: float) -> None:
    """Clip a flat gradient of this norm in place to the norm `limit`."""
    scale = clip_coefficient(norm, limit)
    if scale != 1.0:
        gradient.mul_(scale)
