"""The products of adapters by the CPU kernel (lora.cpp): all adapters of a pass in one call a layer.

bf16 on CPUs with instructions for it; everything else takes torch's path in model/lora.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
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


Packed = tuple[int, int]
"""Where an adapter's two matrices lie as the kernel reads them: addresses of "pairs" of lora.cpp, each bf16
[K/2, N, 2] in panels, N padded to a register's width. Forward the first is A^T (K = in, N = rank), and the
second the scaled B^T (K = rank, N = out); backward the scaled B (K = out, N = rank) and A (K = rank, N = in).
"""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where matrices lie once they are packed: of every slot those of the way forward and those of the way
    back, in elements; and the same in bytes beside the matrices' own sides, as a table [slots, 6]."""

    shapes: dict[str, tuple[int, int]]
    offsets: dict[str, tuple[int, int, int, int]]
    forward: int
    backward: int
    table: npt.NDArray[np.int64]


@functools.lru_cache(maxsize=256)  # runs of one model and rank have the same
def _places(slots: tuple[tuple[str, int, int], ...], padded: int) -> _Places:
    shapes = {name: (inner, outer) for name, inner, outer in slots}
    offsets: dict[str, tuple[int, int, int, int]] = {}
    at = back = 0
    for name, inner, outer in slots:
        wide_in, wide_out = (-(-n // _COLUMNS) * _COLUMNS * padded for n in (inner, outer))
        offsets[name] = (at, at + inner * padded, back, back + outer * padded)
        at += inner * padded + wide_out
        back += outer * padded + wide_in
    rows = [(*shapes[name], *(2 * offset for offset in offsets[name])) for name in shapes]
    return _Places(shapes, offsets, at, back, np.array(rows, np.int64).reshape(-1, 6))


class Packs:
    """All plain matrices of an adapter, packed for the way forward and, where asked for, for the way back.

    slots: (name, in, out), even numbers all of them; `padded` is the rank with its padding.
    """

    def __init__(self, slots: Sequence[tuple[str, int, int]], padded: int, *, backward: bool) -> None:
        self.padded = padded
        self._places = _places(tuple(slots), padded)
        self.shapes, self.offsets = self._places.shapes, self._places.offsets
        self._forward = torch.empty(self._places.forward, dtype=torch.bfloat16)
        self._backward = torch.empty(self._places.backward, dtype=torch.bfloat16) if backward else None

    @property
    def nbytes(self) -> int:
        return 2 * (self._forward.numel() + (0 if self._backward is None else self._backward.numel()))

    def fill(self, sources: Mapping[str, tuple[Tensor, Tensor]], rank: int, scale: float) -> None:
        """From A [rank, in] and B [out, rank] of every slot, fp32 and dense; B is multiplied by `scale`."""
        pairs = [sources[name] for name in self.shapes]
        self.fill_from(np.array([(a.data_ptr(), b.data_ptr()) for a, b in pairs], np.int64), rank, scale)

    def fill_from(self, addresses: npt.NDArray[np.int64], rank: int, scale: float) -> None:
        """The same from where A and B of every slot lie: [slots, 2]."""
        table = np.zeros((len(self.shapes), 8), np.int64)
        table[:, :2], table[:, 2:] = addresses, self._places.table
        table[:, 4:6] += self._forward.data_ptr()
        if self._backward is None:
            table[:, 6:] = 0
        else:
            table[:, 6:] += self._backward.data_ptr()
        kernels = library()
        assert kernels is not None
        kernels.lora_pack(
            ctypes.c_void_p(table.ctypes.data), len(table), ctypes.c_int64(rank), ctypes.c_int64(self.padded),
            ctypes.c_float(scale), torch.get_num_threads(),
        )  # fmt: skip

    def forward(self, name: str) -> Packed:
        at, base = self.offsets[name], self._forward.data_ptr()
        return base + 2 * at[0], base + 2 * at[1]

    def backward(self, name: str) -> Packed | None:
        if self._backward is None:
            return None
        at, base = self.offsets[name], self._backward.data_ptr()
        return base + 2 * at[2], base + 2 * at[3]

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


class Plan:
    """Rows that meet adapters: where each adapter's rows stand, where its A x lies in one flat buffer, and
    the blocks whose gradients are wanted.

    spans: (first row, last row + 1, padded rank) of each adapter; blocks: (adapter, first row, last row + 1,
    rank, scale) of each block, an even number of rows.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int, int]],
        blocks: Sequence[tuple[int, int, int, int, float]] = (),
    ) -> None:
        table = np.array(spans, np.int64).reshape(-1, 3)
        self.first, self.ranks = table[:, 0], table[:, 2]
        self.rows = table[:, 1] - self.first
        sizes = self.rows * self.ranks
        self._at = np.cumsum(sizes) - sizes
        self.size = int(sizes.sum())
        owners = np.array([b[0] for b in blocks], np.int64)
        table = np.array([b[1:4] for b in blocks], np.int64).reshape(-1, 3)
        self._block_first, self._block_ranks = table[:, 0], table[:, 2]
        self._block_rows = table[:, 1] - self._block_first
        self._block_padded = self.ranks[owners]
        inside = (self._block_first - self.first[owners]) * self._block_padded
        self._block_at = self._at[owners] + inside
        self._scales = np.array([b[4] for b in blocks], np.float32)

    def run(self, x: Tensor, packed: Sequence[Packed], y: Tensor | None) -> Tensor:
        """z = x first, and y += z second where there is a y, for every adapter on its own rows.

        x: [rows, K], y: [rows, N], views of bf16 tensors whose last dimension lies together. Returns z, flat:
        [rows, padded rank] of each adapter, one after the other.
        """
        z = torch.empty(self.size, dtype=x.dtype)
        table = np.zeros((len(packed), 11), np.int64)
        table[:, 0] = x.data_ptr() + 2 * x.stride(0) * self.first
        table[:, 1], table[:, 2], table[:, 3] = x.stride(0), self.rows, x.shape[1]
        table[:, (4, 7)] = packed
        table[:, 5], table[:, 6] = self.ranks, z.data_ptr() + 2 * self._at
        if y is not None:
            table[:, 8], table[:, 10] = y.shape[1], y.stride(0)
            table[:, 9] = y.data_ptr() + 2 * y.stride(0) * self.first
        _call("lora_chains")(table.ctypes.data, len(table), torch.get_num_threads())
        return z

    def add_gradients(
        self, x: Tensor, dz: Tensor, dy: Tensor, z: Tensor, to: Sequence[tuple[int, int]]
    ) -> None:
        """a += dz^T x, b += scale dy^T z for every block, in their order.

        x: [rows, in], dy: [rows, out]; dz and z as `run` gives them; `to` has the addresses of a [rank, in]
        and b [out, rank], fp32 and dense, of each block.
        """
        table = np.empty((len(to), 11), np.int64)
        table[:, 0] = x.data_ptr() + 2 * x.stride(0) * self._block_first
        table[:, 1] = dz.data_ptr() + 2 * self._block_at
        table[:, 2] = dy.data_ptr() + 2 * dy.stride(0) * self._block_first
        table[:, 3] = z.data_ptr() + 2 * self._block_at
        table[:, 4], table[:, 5] = x.stride(0), dy.stride(0)
        table[:, 6], table[:, 7], table[:, 8] = self._block_rows, self._block_padded, self._block_ranks
        table[:, (9, 10)] = to
        _call("lora_gradients")(
            table.ctypes.data, self._scales.ctypes.data, len(table), x.shape[1], dy.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip


@functools.cache
def _call(name: str) -> Any:
    function = getattr(library(), name)
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = {"lora_chains": [p, i, i], "lora_gradients": [p, p, i, n, n, i]}[name]
    function.restype = None
    return function
