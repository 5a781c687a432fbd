"""Dimuon: an orthogonalized momentum step for each of an adapter's matrices.

Its definition is not public. What the SDK says of it: an EMA momentum; a matrix sign by a fixed number of
iterations; a damped preconditioner of rows and columns; a direction of Frobenius norm sqrt(rank), times a
learning rate that is corrected by (rank / 32) ^ 0.175, the same for all LoRA matrices. This is the closest
published method, Muon (Jordan et al. 2024) with the diagonal of Shampoo's preconditioner (Gupta et al. 2018,
arXiv 1802.09568) on both sides:

    M <- beta1 M + (1 - beta1) G
    R, C = diag(rows), diag(columns) of (mean square of M's row or column / that of M + damping) ^ (-1/4)
    D = R msign(R M C) C
    W <- W - lr (rank / 32) ^ 0.175 * sqrt(rank) D / |D|

msign is Muon's quintic Newton-Schulz iteration, five times. For M of [r, n] it is a polynomial in the small
matrix M M^T, which is computed in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinsmith.engine.commands import DimuonParams
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.optimizers.clipping import clip, gradient_norm
from tinsmith.wire.training import ContentError

STEPS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
REFERENCE_RANK = 32


@torch.no_grad()
def dimuon(
    layout: Layout, params: Tensor, gradient: Tensor, momentum: Tensor, settings: DimuonParams
) -> float:
    """One step, in place on flat fp32 `params` and `momentum`. `gradient` is clipped to the global norm first
    and is left changed. Returns the norm before clipping. Raises ContentError, with nothing changed, where
    the learning rate is beyond fp32."""
    rank = layout.spec.rank
    rate = settings.learning_rate * (rank / REFERENCE_RANK) ** settings.rank_lr_correction_exponent
    if not rate * rank**0.5 <= torch.finfo(torch.float32).max:
        raise ContentError(
            f"optimizer_params: learning_rate {settings.learning_rate} goes beyond fp32 at rank {rank}; use "
            "a smaller one"
        )
    norm = gradient_norm(gradient)
    clip(gradient, norm, settings.grad_clip_norm)
    momentum.lerp_(gradient, 1 - settings.beta1)
    moments = layout.views(momentum)
    for name, (a, b) in layout.views(params).items():
        m_a, m_b = moments[name]
        a.sub_(direction(m_a, settings.damping), alpha=rate)
        b.sub_(direction(m_b.mT, settings.damping).mT, alpha=rate)
    return norm


def direction(m: Tensor, damping: float) -> Tensor:
    """The step's direction for momentum `m` [..., r, n]: Frobenius norm sqrt(r), zero where m is zero."""
    square = m.square()
    mean = square.mean((-2, -1), keepdim=True)
    alive = mean > 0
    mean = torch.where(alive, mean, 1.0)
    rows = (square.mean(-1, keepdim=True) / mean + damping).pow(-0.25)
    columns = (square.mean(-2, keepdim=True) / mean + damping).pow(-0.25)
    # Divided by its norm, so that tiny and huge gradients alike stay within fp32.
    scaled = m / mean.sqrt() * rows * columns
    d = rows * matrix_sign(scaled) * columns
    norm = torch.linalg.matrix_norm(d, keepdim=True)
    return torch.where(alive & (norm > 0), d * (m.shape[-2] ** 0.5 / norm.clamp(min=1e-30)), 0.0)


def matrix_sign(x: Tensor) -> Tensor:
    """Muon's approximation of U V^T for x = U S V^T, [..., r, n]. Singular values end up near 1, in 0.7 to
    1.2; those far below the largest stay small."""
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
    x = x / norm
    a, b, c = QUINTIC
    wide = x.double()
    gram = wide @ wide.mT
    eye = torch.eye(x.shape[-2], dtype=torch.float64, device=x.device)
    product = eye
    for _ in range(STEPS):
        factor = a * eye + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return (product @ wide).float()
