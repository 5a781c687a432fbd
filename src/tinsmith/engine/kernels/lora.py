"""The products of adapters by the CPU kernel (lora.cpp): all adapters of a pass in one call a layer.

bf16 on CPUs with instructions for it; everything else takes torch's path in model/lora.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.kernels.library import library

_COLUMNS = 16  # of a vector register in lora.cpp: what a packed matrix is padded to


@functools.cache
def available() -> bool:
    found = library()
    return found is not None and bool(found.lora_usable())


def usable(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and available()


@dataclass(frozen=True, slots=True)
class Packed:
    """An adapter's two matrices as the kernel reads them, "pairs" of lora.cpp, each bf16 [K/2, N, 2].

    Forward: `first` is A^T (K = in, N = rank), `second` the scaled B^T (K = rank, N = out). Backward: `first`
    is the scaled B (K = out, N = rank), `second` A (K = rank, N = in).
    """

    first: Tensor
    second: Tensor

    @property
    def nbytes(self) -> int:
        return 2 * (self.first.numel() + self.second.numel())


def packable(a: Tensor, b: Tensor) -> bool:
    """Whether a plain adapter's A [rank, in] and B [out, rank] have even sides."""
    return a.dim() == b.dim() == 2 and a.shape[1] % 2 == b.shape[0] % 2 == 0


def pack_forward(a: Tensor, b: Tensor) -> Packed:
    return Packed(_pairs_of_columns(a), _pairs_of_columns(b))


def pack_backward(a: Tensor, b: Tensor) -> Packed:
    return Packed(_pairs_of_rows(b), _pairs_of_rows(a))


def _pairs_of_columns(x: Tensor) -> Tensor:
    """[N, K] -> the pairs of its transpose."""
    return _padded(x.unflatten(1, (-1, 2)).transpose(0, 1))


def _pairs_of_rows(x: Tensor) -> Tensor:
    """[K, N] -> its pairs."""
    return _padded(x.unflatten(0, (-1, 2)).transpose(1, 2))


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % _COLUMNS)).contiguous()


@dataclass(frozen=True, slots=True)
class Chain:
    """One adapter's rows: z = x first, y += z second. x: [n, K], z: [n, rank], y: [n, N], views of bf16
    tensors whose last dimension lies together."""

    x: Tensor
    packed: Packed
    z: Tensor
    y: Tensor


def run(chains: Sequence[Chain]) -> None:
    """All chains; no two of them may write the same elements."""
    table = np.array(
        [
            (
                c.x.data_ptr(),
                c.x.stride(0),
                c.x.shape[0],
                c.x.shape[1],
                c.packed.first.data_ptr(),
                c.z.shape[1],
                c.z.data_ptr(),
                c.packed.second.data_ptr(),
                c.y.shape[1],
                c.y.data_ptr(),
                c.y.stride(0),
            )
            for c in chains
        ],
        np.int64,
    )
    kernels = library()
    assert kernels is not None
    kernels.lora_chains(ctypes.c_void_p(table.ctypes.data), len(chains), torch.get_num_threads())


@dataclass(frozen=True, slots=True)
class Outer:
    """One block's part of gradients: a += dz^T x, b += scale dy^T z.

    x: [n, in], dz and z: [n, padded rank], dy: [n, out], bf16, n even; a: [rank, in], b: [out, rank], fp32
    and dense.
    """

    x: Tensor
    dz: Tensor
    dy: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    scale: float


def add_gradients(blocks: Sequence[Outer]) -> None:
    """Blocks of one layer, added in their order."""
    table = np.array(
        [
            (
                g.x.data_ptr(),
                g.dz.data_ptr(),
                g.dy.data_ptr(),
                g.z.data_ptr(),
                g.x.stride(0),
                g.dy.stride(0),
                g.x.shape[0],
                g.z.shape[1],
                g.a.shape[0],
                g.a.data_ptr(),
                g.b.data_ptr(),
            )
            for g in blocks
        ],
        np.int64,
    )
    scales = np.array([g.scale for g in blocks], np.float32)
    kernels = library()
    assert kernels is not None
    kernels.lora_gradients(
        ctypes.c_void_p(table.ctypes.data),
        ctypes.c_void_p(scales.ctypes.data),
        len(blocks),
        ctypes.c_int64(blocks[0].x.shape[1]),
        ctypes.c_int64(blocks[0].dy.shape[1]),
        torch.get_num_threads(),
    )
