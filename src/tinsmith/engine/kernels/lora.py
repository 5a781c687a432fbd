"""The products of adapters by the CPU kernel (lora.cpp): all adapters of a pass in one call a layer.

bf16 on CPUs with instructions for it; everything else takes torch's path in model/lora.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.library import library

_COLUMNS = 16  # of a vector register in lora.cpp: what a packed matrix is padded to
_PANEL = 64  # of its columns that stand together


@functools.cache
def available() -> bool:
    found = library()
    return found is not None and bool(found.lora_usable())


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel serves tensors of this kind here."""
    return dtype is torch.bfloat16 and device.type == "cpu" and not gpu.takes(device) and available()


@dataclass(frozen=True, slots=True)
class Packed:
    """Where an adapter's two matrices lie as the kernel reads them, "pairs" of lora.cpp, each bf16
    [K/2, N, 2] in panels, N padded to a register's width: addresses in memory that `owner` holds.

    Forward: `first` is A^T (K = in, N = rank), `second` the scaled B^T (K = rank, N = out). Backward: `first`
    is the scaled B (K = out, N = rank), `second` A (K = rank, N = in).
    """

    first: int
    second: int
    owner: object


class Packs:
    """All plain matrices of an adapter, packed for the way forward and, where asked for, for the way back.

    slots: (name, in, out), even numbers all of them; `padded` is the rank with its padding.
    """

    def __init__(self, slots: Sequence[tuple[str, int, int]], padded: int, *, backward: bool) -> None:
        self.padded = padded
        self.shapes = {name: (inner, outer) for name, inner, outer in slots}
        self.offsets: dict[str, tuple[int, int, int, int]] = {}  # in elements, of either buffer
        at = back = 0
        for name, inner, outer in slots:
            wide_in, wide_out = (-(-n // _COLUMNS) * _COLUMNS * padded for n in (inner, outer))
            self.offsets[name] = (at, at + inner * padded, back, back + outer * padded)
            at += inner * padded + wide_out
            back += outer * padded + wide_in
        self._forward = torch.empty(at, dtype=torch.bfloat16)
        self._backward = torch.empty(back, dtype=torch.bfloat16) if backward else None

    @property
    def nbytes(self) -> int:
        return 2 * (self._forward.numel() + (0 if self._backward is None else self._backward.numel()))

    def fill(self, sources: Mapping[str, tuple[Tensor, Tensor]], rank: int, scale: float) -> None:
        """From A [rank, in] and B [out, rank] of every slot, fp32 and dense; B is multiplied by `scale`."""
        table = np.empty((len(self.shapes), 8), np.int64)
        for row, (name, (inner, outer)) in zip(table, self.shapes.items(), strict=True):
            a, b = sources[name]
            forward, back = self.forward(name), self.backward(name)
            ends = (0, 0) if back is None else (back.first, back.second)
            row[:] = a.data_ptr(), b.data_ptr(), inner, outer, forward.first, forward.second, *ends
        kernels = library()
        assert kernels is not None
        kernels.lora_pack(
            ctypes.c_void_p(table.ctypes.data), len(table), ctypes.c_int64(rank), ctypes.c_int64(self.padded),
            ctypes.c_float(scale), torch.get_num_threads(),
        )  # fmt: skip

    def forward(self, name: str) -> Packed:
        at, base = self.offsets[name], self._forward.data_ptr()
        return Packed(base + 2 * at[0], base + 2 * at[1], self._forward)

    def backward(self, name: str) -> Packed | None:
        if self._backward is None:
            return None
        at, base = self.offsets[name], self._backward.data_ptr()
        return Packed(base + 2 * at[2], base + 2 * at[3], self._backward)

    def forget_backward(self) -> None:
        self._backward = None

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A [padded rank, in] and the scaled B [out, padded rank], as they were packed."""
        inner, outer = self.shapes[name]
        first, second, *_ = self.offsets[name]
        return (
            _unpacked(self._forward[first:], self.padded, inner),
            _unpacked(self._forward[second:], outer, self.padded),
        )


def _unpacked(numbers: Tensor, n: int, k: int) -> Tensor:
    """The matrix [n, k] whose transpose was packed, panel after panel."""
    padded, panels, at = -(-n // _COLUMNS) * _COLUMNS, [], 0
    for column in range(0, padded, _PANEL):
        width = min(_PANEL, padded - column)
        panels.append(numbers[at : at + width * k].view(-1, width, 2).transpose(0, 1).flatten(1))
        at += width * k
    return torch.cat(panels)[:n].contiguous()


def packable(inner: int, outer: int) -> bool:
    """Whether a plain adapter's A [rank, in] and B [out, rank] have even sides."""
    return inner % 2 == outer % 2 == 0


@dataclass(frozen=True, slots=True)
class Chain:
    """One adapter's rows: z = x first, y += z second, where there is a y. x: [n, K], z: [n, rank], y: [n, N],
    views of bf16 tensors whose last dimension lies together."""

    x: Tensor
    packed: Packed
    z: Tensor
    y: Tensor | None


def run(chains: Sequence[Chain]) -> None:
    """All chains; no two of them may write the same elements."""
    table = np.array(
        [
            (
                c.x.data_ptr(),
                c.x.stride(0),
                c.x.shape[0],
                c.x.shape[1],
                c.packed.first,
                c.z.shape[1],
                c.z.data_ptr(),
                c.packed.second,
                *((0, 0, 0) if c.y is None else (c.y.shape[1], c.y.data_ptr(), c.y.stride(0))),
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

    x: [n, in], dz and z: [n, padded rank], dy: [n, out], bf16, n even; a and b are the addresses of
    [rank, in] and [out, rank], fp32 and dense.
    """

    x: Tensor
    dz: Tensor
    dy: Tensor
    z: Tensor
    a: int
    b: int
    rank: int
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
                g.rank,
                g.a,
                g.b,
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
