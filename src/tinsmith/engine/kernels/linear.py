"""A model's own products for the few rows of a sampling step, by the CPU kernel (linear.cpp).

torch's product rearranges a weight on every call; here that is done once, and the rows' adapters are part of
the call. Used where it has the bits of the product that the trainer takes: for bf16 on CPUs with instructions
for it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.kernels import lora
from tinsmith.engine.kernels.library import library

_COLUMNS = 32  # of a tile in linear.cpp
_PART = 4096  # of a wide matrix that is compared
_ROWS = 208  # that are tried: an odd number of the multiples that rows are padded to
_NUMBERS = 1 << 18  # results that are compared at least: another depth shows in one of some thousands


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel serves tensors of this kind here."""
    return lora.usable(device, dtype)


@functools.cache
def _function(name: str) -> Any:
    function = getattr(library(), name)
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = {
        "linear": [p, n, n, p, n, i],
        "linear_pack": [p, n, i],
        "linear_advise": [p, n],
    }[name]
    function.restype = None
    return function


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [n, k] as the kernel reads it, a bias [n] or None, and how many of the k it sums at a time."""

    tiles: Tensor
    bias: Tensor | None
    n: int
    k: int
    depth: int


def _tiled(n: int, k: int) -> int:
    """Numbers of a matrix [n, k] as tiles."""
    return -(-n // _COLUMNS) * _COLUMNS * k


def _pack(jobs: Sequence[tuple[Tensor, int, int]]) -> None:
    """Each matrix [n, k] to an address, that many of its rows together as columns of pairs."""
    table = np.array([(m.data_ptr(), to, *m.shape, width) for m, to, width in jobs], np.int64)
    _function("linear_pack")(table.ctypes.data, len(table), torch.get_num_threads())


def _empty(numbers: int) -> Tensor:
    made = torch.empty(numbers, dtype=torch.bfloat16)
    _function("linear_advise")(made.data_ptr(), made.nbytes)
    return made


def pack(weight: Tensor, bias: Tensor | None, depth: int) -> Matrix:
    """weight: bf16 [n, k], dense, k even."""
    n, k = weight.shape
    tiles = _empty(_tiled(n, k))
    _pack([(weight, tiles.data_ptr(), _COLUMNS)])
    return Matrix(tiles, bias, n, k, depth)


def packed_bytes(weight: Tensor) -> int:
    return _tiled(*weight.shape) * weight.element_size()


Table = npt.NDArray[np.int64]  # [slots, 3]: where an adapter's packed matrices are, and its rank

Segments = npt.NDArray[np.int64]  # [segments, 3]: first row, last row + 1, address of an adapter's table


def segments(spans: Sequence[tuple[int, int, Table | None]]) -> Segments:
    """Rows [start, stop) that meet one adapter each, whose table (AdapterWeights.table) must outlive this."""
    return np.array([(a, b, 0 if t is None else t.ctypes.data) for a, b, t in spans], np.int64).reshape(-1, 3)


def run(x: Tensor, matrices: Sequence[Matrix], where: Segments) -> Tensor:
    """x: [rows, k] -> [rows, sum of the n]: the matrices' outputs side by side, matrix i with the adapters'
    slot i."""
    y = x.new_empty(len(x), sum(m.n for m in matrices))
    x = x if x.stride(-1) == 1 else x.contiguous()
    table, at = [], y.data_ptr()
    for slot, m in enumerate(matrices):
        bias = 0 if m.bias is None else m.bias.data_ptr()
        row = x.data_ptr(), x.stride(0), m.k, m.n, m.depth, m.tiles.data_ptr(), bias, at, y.stride(0), slot
        table.append(row)
        at += m.n * y.element_size()
    listed = np.array(table, np.int64)
    _function("linear")(
        listed.ctypes.data, len(listed), len(x), where.ctypes.data, len(where), torch.get_num_threads()
    )
    return y


@torch.no_grad()
def find_depth(weight: Tensor, bias: Tensor | None) -> int:
    """How many numbers the library's product sums before it adds the sum to the others': with that, the
    kernel has its bits. 0 if it has them with none.

    weight: bf16 [n, k]; tried with random numbers of this shape, or with the weight itself where it is large.
    """
    n, k = weight.shape
    if k % 2 or not usable(weight.device, weight.dtype):
        return 0
    generator = torch.Generator().manual_seed(0)
    if n * k <= 1 << 26:
        weight = (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()
    part = weight[:_PART]
    rows = [_ROWS] * max(1, -(-_NUMBERS // (_ROWS * len(part))))
    tries = [torch.randn(count, k, generator=generator).bfloat16() for count in (16, *rows)]
    wanted = [F.linear(x, weight, bias)[:, : len(part)] for x in tries]
    nobody = segments([])
    for depth in dict.fromkeys([k, *(d for d in (2048, 1024, 512, 256, 128, 64) if d < k)]):
        matrix = pack(part, None if bias is None else bias[: len(part)], depth)
        if all(torch.equal(run(x, [matrix], nobody), y) for x, y in zip(tries, wanted, strict=True)):
            return depth
    return 0
