"""Experts' tokens in Triton: the weighted sum of what a token's experts gave, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_common import INTERPRETED, power

_ROWS = 64 if INTERPRETED else 4  # tokens that a program works on
_COLUMNS = 512


@triton.jit
def _sum(
    Z,
    PLACES,
    WEIGHTS,
    OUT,
    tokens,
    k,
    width,
    stride,
    WEIGHTED: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """OUT[t] = sum_j WEIGHTS[t, j] Z[PLACES[t, j]], in order of j."""
    token = tl.program_id(0) * R + tl.arange(0, R)
    col = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    real = token < tokens
    acc = tl.zeros([R, N], tl.float32)
    for j in range(0, k):
        place = tl.load(PLACES + token * k + j, mask=real, other=0)
        z = tl.load(Z + place[:, None] * stride + col, mask=real[:, None] & (col < width), other=0.0).to(
            tl.float32
        )
        if WEIGHTED:
            z *= tl.load(WEIGHTS + token * k + j, mask=real, other=0.0).to(tl.float32)[:, None]
        acc += z
    to = OUT + token.to(tl.int64)[:, None] * width + col
    tl.store(to, acc.to(OUT.dtype.element_ty), mask=real[:, None] & (col < width))


@triton.jit
def _sum_backward(
    Z,
    PLACES,
    WEIGHTS,
    GRAD,
    DZ,
    DWEIGHTS,
    tokens,
    k,
    width,
    stride,
    stride_g,
    R: tl.constexpr,
    N: tl.constexpr,
):
    token = tl.program_id(0) * R + tl.arange(0, R)
    real = token < tokens
    for j in range(0, k):
        place = tl.load(PLACES + token * k + j, mask=real, other=0)
        weight = tl.load(WEIGHTS + token * k + j, mask=real, other=0.0).to(tl.float32)
        acc = tl.zeros([R], tl.float32)
        for n in range(0, width, N):
            col = (n + tl.arange(0, N))[None, :]
            inside = real[:, None] & (col < width)
            g_at = GRAD + token.to(tl.int64)[:, None] * stride_g + col
            grad = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
            z = tl.load(Z + place[:, None] * stride + col, mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(grad * z, 1)
            tl.store(
                DZ + place[:, None] * width + col,
                (grad * weight[:, None]).to(DZ.dtype.element_ty),
                mask=inside,
            )
        tl.store(DWEIGHTS + token * k + j, acc.to(DWEIGHTS.dtype.element_ty), mask=real)


def weighted_sum(z: Tensor, places: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z: [rows, width]; places: int64 [tokens, k], rows of z; weights: [tokens, k], or None for ones ->
    [tokens, width] of `dtype`."""
    tokens, k = places.shape
    width = z.shape[1]
    out, n = z.new_empty(tokens, width, dtype=dtype), min(power(width), _COLUMNS)
    _sum[(-(-tokens // _ROWS), -(-width // n))](
        z, places, weights, out, tokens, k, width, z.stride(0), weights is not None, _ROWS, n, num_warps=4
    )
    return out


def weighted_sum_backward(z: Tensor, places: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z, whose rows all have one place, and of the weights."""
    tokens, k = places.shape
    width = z.shape[1]
    dz, dweights = z.new_empty(z.shape), torch.empty_like(weights)
    _sum_backward[(-(-tokens // _ROWS),)](
        z, places, weights, grad, dz, dweights, tokens, k, width, z.stride(0), grad.stride(0), _ROWS,
        min(power(width), _COLUMNS), num_warps=4,
    )  # fmt: skip
    return dz, dweights
