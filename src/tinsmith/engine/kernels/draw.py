"""Drawing tokens from logits by the CPU kernel (draw.cpp): one pass over a row, and no sorted copy of it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinsmith.engine.kernels.elementwise import LogSoftmax
from tinsmith.engine.kernels.library import library

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def usable(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in _NAMES and library() is not None


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    function = getattr(library(), f"draw_{_NAMES[dtype]}")
    p, n = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = [p, p, p, p, p, p, n, n, n, ctypes.c_int], None
    return function


def draw(
    soft: LogSoftmax, u: npt.NDArray[np.float64], top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64]
) -> Tensor:
    """A token of each row, int64 [n]: the first at which the running sum of what top_k, and then top_p,
    leaves exceeds u in [0, 1) times the whole. u below 0 takes the likeliest; top_k 0 and top_p 1 leave all.
    """
    logits = soft.logits
    out = torch.empty(len(logits), dtype=torch.int64)
    _function(logits.dtype)(
        logits.data_ptr(), soft.top.data_ptr(), u.ctypes.data, top_k.ctypes.data, top_p.ctypes.data,
        out.data_ptr(), *logits.shape, logits.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out
