"""Optimizer steps over flat fp32 buffers by the CPU kernel (optimizer.cpp), in one pass over memory."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.kernels.library import library


def usable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype is torch.float32 and x.is_contiguous() and library() is not None


@functools.cache
def _functions() -> tuple[Any, Any]:
    kernels = library()
    assert kernels is not None
    pointer, number = ctypes.c_void_p, ctypes.c_float
    kernels.sum_of_squares.argtypes = [pointer, ctypes.c_int64, ctypes.c_int]
    kernels.sum_of_squares.restype = ctypes.c_double
    kernels.adamw.argtypes = [pointer] * 4 + [ctypes.c_int64] + [number] * 7 + [ctypes.c_int]
    kernels.adamw.restype = None
    return kernels.sum_of_squares, kernels.adamw


def sum_of_squares(x: Tensor) -> float:
    """Of fp32 numbers, in fp64; finite if and only if all of them are."""
    return float(_functions()[0](x.data_ptr(), x.numel(), torch.get_num_threads()))


def adamw(
    params: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    scale: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    rate: float,
    correction: float,
) -> None:
    """p = p * decay - rate * m / (sqrt(v) / correction + eps); m, v are the moments of scale * gradient."""
    _functions()[1](
        params.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), params.numel(), scale,
        decay, *betas, eps, rate, correction, torch.get_num_threads(),
    )  # fmt: skip
