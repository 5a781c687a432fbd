"""Attention over the paged cache: one step's rows, each over its own sequence's pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.kernels import attention as kernel
from tinsmith.engine.kernels import gpu
from tinsmith.engine.kv_cache import NULL, PagePool
from tinsmith.engine.model.attention import PAGE, TILE, attend, pad_rows


@dataclass(slots=True)
class Chunk:
    """New tokens of one sequence: packed rows [row, row + length), positions from `position` on."""

    row: int
    length: int
    position: int
    pages: Sequence[int]


@dataclass(slots=True)
class _Decode:
    """Single rows of several sequences with about as many pages: rows [B], pages [B, NB], positions [B]."""

    rows: Tensor
    pages: Tensor
    positions: Tensor


class PagedAttention:
    """An AttentionBackend: writes the step's keys and values into the pages and attends over them."""

    def __init__(self, pool: PagePool, chunks: Sequence[Chunk], rows: int) -> None:
        device = pool.model.device
        self.pool, self.rows = pool, rows
        self.chunks: kernel.Chunks | None = None
        self._on_gpu: Any = None
        if pool.on_gpu or pool.by_kernel:
            numbers = [(c.row, c.length, c.position, c.pages) for c in chunks]
            if pool.on_gpu:
                self._on_gpu = gpu.module("gpu_attention").Pages.of(numbers, rows, device)
            else:
                self.chunks = kernel.Chunks(numbers)
            return
        at: list[int] = []
        page: list[int] = []
        place: list[int] = []
        for chunk in chunks:
            for i in range(chunk.length):
                position = chunk.position + i
                at.append(chunk.row + i)
                page.append(chunk.pages[position // PAGE])
                place.append(position % PAGE)
        self._at, self._page, self._place = (torch.tensor(x, device=device) for x in (at, page, place))
        buckets: dict[int, list[Chunk]] = {}
        self._prefill: list[tuple[Chunk, Tensor]] = []
        for chunk in chunks:
            if chunk.length == 1:
                pages = chunk.position // PAGE + 1
                buckets.setdefault((pages - 1).bit_length(), []).append(chunk)
            else:
                count = (chunk.position + chunk.length - 1) // PAGE + 1
                self._prefill.append((chunk, torch.tensor(list(chunk.pages[:count]), device=device)))
        self._decode = [self._bucket(members, device) for _, members in sorted(buckets.items())]

    @staticmethod
    def _bucket(chunks: list[Chunk], device: torch.device) -> _Decode:
        width = max(c.position // PAGE + 1 for c in chunks)
        pages = [
            [*c.pages[: c.position // PAGE + 1], *[NULL] * (width - c.position // PAGE - 1)] for c in chunks
        ]
        return _Decode(
            torch.tensor([c.row for c in chunks], device=device),
            torch.tensor(pages, device=device),
            torch.tensor([c.position for c in chunks], device=device),
        )

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if self._on_gpu is not None:
            attended: Tensor = self._on_gpu.attend(q, k, v, keys, values, scale, window, sinks)
            return attended
        if self.chunks is not None:
            return kernel.paged_attention(q, k, v, keys, values, self.chunks, scale, window, sinks)
        keys[self._page, :, self._place] = k[:, self._at].transpose(0, 1)
        values[self._page, :, self._place] = v[:, self._at].transpose(0, 1)
        out = q.new_zeros(self.rows, q.shape[0], v.shape[-1])
        heads = keys.shape[1]
        group = q.shape[0] // heads
        for part in self._decode:
            rows = q[:, part.rows].unflatten(0, (heads, group)).permute(2, 0, 1, 3).float()
            padded = torch.nn.functional.pad(rows, (0, 0, 0, pad_rows(group) - group))
            positions = torch.full((len(part.rows), padded.shape[2]), -1, device=q.device)
            positions[:, :group] = part.positions[:, None]
            o = self._attend(padded, keys, values, part.pages, positions, scale, window, sinks, group, 1)
            out[part.rows] = o[:, :, :group].flatten(1, 2).to(out.dtype)
        for chunk, pages in self._prefill:
            for start in range(0, chunk.length, TILE):
                stop = min(start + TILE, chunk.length)
                width = pad_rows(stop - start)
                tile = q[:, chunk.row + start : chunk.row + stop].unflatten(0, (heads, group)).float()
                tile = torch.nn.functional.pad(tile, (0, 0, 0, width - (stop - start))).flatten(1, 2)
                positions = torch.full((1, width), -1, device=q.device)
                positions[0, : stop - start] = torch.arange(
                    chunk.position + start, chunk.position + stop, device=q.device
                )
                seen = pages[: (chunk.position + stop - 1) // PAGE + 1].unsqueeze(0)
                o = self._attend(
                    tile.unsqueeze(0),
                    keys,
                    values,
                    seen,
                    positions.repeat(1, group),
                    scale,
                    window,
                    sinks,
                    group,
                    width,
                )
                o = o[0].unflatten(1, (group, width))[:, :, : stop - start].flatten(0, 1).transpose(0, 1)
                out[chunk.row + start : chunk.row + stop] = o.to(out.dtype)
        return out

    @staticmethod
    def _attend(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        positions: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
        group: int,
        width: int,
    ) -> Tensor:
        """q: fp32 [B, Hkv, R, D], pages: [B, NB]; R is `group` heads of `width` positions each, padded."""
        b, n = pages.shape
        k = keys[pages.flatten()].unflatten(0, (b, n)).transpose(1, 2).float()
        v = values[pages.flatten()].unflatten(0, (b, n)).transpose(1, 2).float()
        rows_sinks = None
        if sinks is not None:
            per_head = sinks.float().view(1, -1, group, 1).expand(1, -1, group, width).flatten(2, 3)
            rows_sinks = torch.nn.functional.pad(per_head, (0, q.shape[2] - per_head.shape[2]))
        return attend(q, k, v, positions, scale, window, rows_sinks)
