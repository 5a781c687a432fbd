"""What the Triton kernels share. Imported only where kernels/gpu.py has found Triton and something to run it
on.

In Triton's interpreter (TRITON_INTERPRET=1) the same kernels run on a CPU, slowly: that is how they are
tested where there is no GPU. It computes with numpy, which has no bf16, and whose products look at their
neighbours: kernels convert what they load to fp32 before any arithmetic but a dot, and `dot` goes through
fp64 there, which makes the order of its sum matter to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def exact_dot(dtype: torch.dtype) -> int:
    """How `dot` must treat operands of `dtype`: 0 as they are, 1 without rounding to TF32, 2 in fp64."""
    return 2 if INTERPRETED else int(dtype is torch.float32)


def power(n: int, least: int = 16) -> int:
    """The power of two that holds `n`, at least `least`: a block's side."""
    return max(least, 1 << (n - 1).bit_length())


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a b, summed in fp32; EXACT as `exact_dot` gives it."""
    if EXACT == 2:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    if EXACT == 1:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


def table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers for a kernel: int32, on the device, in one copy that does not wait."""
    made = torch.tensor(rows, dtype=torch.int32)
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)
