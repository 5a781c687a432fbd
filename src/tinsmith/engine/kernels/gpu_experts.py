"""Mixture-of-experts layers with adapters on a GPU.

Token-expert pairs are sorted by (expert, unit), a unit being rows of one adapter and one request; where which
group lies is computed on the device and never asked for, so that nothing waits and a decode step can be
captured. Each product is one grouped one over experts (torch's, or ours under --deterministic), and a launch
each for the adapters' two factors, one of which the experts of a layer share.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.gpu_lora import Adapters, StaticAdapters, adapters_of
from tinsmith.engine.kernels.triton_common import table
from tinsmith.engine.kernels.triton_experts import weighted_sum, weighted_sum_backward
from tinsmith.engine.kernels.triton_lora import expand, outer, shrink
from tinsmith.engine.kernels.triton_matmul import grouped
from tinsmith.engine.model.packing import Pass, units

log = logging.getLogger(__name__)

Parts = Sequence[tuple[str, slice]]
_ROWS = 64  # of a tile


@dataclass(slots=True)
class StaticUnits:
    """The units of a decode step, in buffers that stay where they are: the adapters, and none."""

    count: int
    of_row: Tensor
    owner: Tensor
    requests: tuple[()] = ()

    @classmethod
    def of(cls, adapters: StaticAdapters) -> StaticUnits:
        count = len(adapters.ranks)
        return cls(count, adapters.of_row, torch.arange(count, device=adapters.ranks.device))


class Units:
    """The units of a pass: `of_row` int64 [rows], the unit of each row; `owner` int64 [count], the adapter of
    each (behind the last where there is none); `requests`, the first unit of each and the one behind its
    last.
    """

    def __init__(self, this: Pass, adapters: Adapters, rows: int, device: torch.device) -> None:
        of_row = torch.zeros(rows, dtype=torch.int64)
        numbers = {w.serial: i for i, w in enumerate(adapters.weights)}
        owners: list[int] = []
        requests: list[tuple[int, int]] = []
        known: list[Any] = []
        for segment in this.segments:
            number = len(adapters.weights) if segment.weights is None else numbers[segment.weights.serial]
            before = None
            for start, stop, gradients in units(segment):
                # A block is summed by itself where the order of sums matters.
                joins = before is gradients and before is not None and not gpu.CHOICE.deterministic
                if not joins:
                    owners.append(number)
                if gradients is not None and segment.weights is not None:
                    if before is not gradients:
                        known.append(gradients)
                        requests.append((len(owners) - 1, len(owners)))
                    elif requests and known[-1] is gradients:
                        requests[-1] = (requests[-1][0], len(owners))
                of_row[start:stop] = len(owners) - 1
                before = gradients
        if len({id(g) for g in known}) < len(known):
            raise ValueError("a request's blocks stand apart in a pass")
        self.count = len(owners)
        self.of_row = of_row.to(device, non_blocking=True)
        self.owner = torch.tensor(owners, dtype=torch.int64).to(device, non_blocking=True)
        self.requests = requests


class Route:
    """Where the token-expert pairs of one layer go."""

    def __init__(self, this: Pass, experts: Tensor, count: int, itemsize: int) -> None:
        """experts: int64 [tokens, k], of `count`; itemsize: bytes of a number of the model."""
        tokens, self.k = experts.shape
        device, self.itemsize = experts.device, itemsize
        self.adapters = adapters_of(this, device)
        if self.adapters.units is None:
            self.adapters.units = Units(this, self.adapters, tokens, device)
        self.units: Units | StaticUnits = self.adapters.units
        self.count, n = count, self.units.count
        keys = (experts * n + self.units.of_row[:, None]).flatten()
        ordered, order = torch.sort(keys, stable=True)
        self.rows = len(keys)
        self.token_of_row = order // self.k
        self.places = torch.empty_like(order).scatter_(
            0, order, torch.arange(self.rows, device=device)
        ).view(tokens, self.k)  # fmt: skip
        # Where group (expert, unit) begins; the last one's end behind them.
        self.bounds = torch.searchsorted(ordered, torch.arange(count * n + 1, device=device)).to(torch.int32)
        few = self.rows < 16 * count and not gpu.CHOICE.deterministic
        self.tile_rows = 16 if few else _ROWS

    def take(self, hidden: Tensor) -> Tensor:
        """[tokens, H] -> the pairs' rows, sorted."""
        x: Tensor = _Take.apply(hidden, self)
        return x

    def linear(
        self, x: Tensor, anchor: Tensor | None, weight: Tensor, bias: Tensor | None, parts: Parts
    ) -> Tensor:
        """x: sorted rows [rows, in], weight: [E, out, in] -> [rows, out]. anchor: see Pass."""
        y: Tensor = _GroupedLinear.apply(x, anchor, weight, bias, self, parts)
        return y

    def combine(self, z: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The sorted rows' results, weighted [tokens, k] and added -> [tokens, out]."""
        out: Tensor = _Combine.apply(z, weights, self, dtype)
        return out

    @functools.cached_property
    def expert_bounds(self) -> Tensor:
        return self.bounds[:: self.units.count].contiguous()

    @functools.cached_property
    def expert_tiles(self) -> Tensor:
        return self._tiles(self.expert_bounds)

    @functools.cached_property
    def group_tiles(self) -> Tensor:
        return self.expert_tiles if self.units.count == 1 else self._tiles(self.bounds)

    def _tiles(self, bounds: Tensor) -> Tensor:
        """int32 [tiles, 3], (first row, rows, group): as many as there can be, the last ones empty."""
        sizes = bounds.diff()
        groups, size = len(sizes), self.tile_rows
        cut = (sizes + size - 1) // size
        behind = cut.cumsum(0)
        number = torch.arange(self.rows // size + min(groups, self.rows), device=bounds.device)
        group = torch.searchsorted(behind, number, right=True).clamp_(max=groups - 1)
        first = bounds[group] + (number - (behind[group] - cut[group])) * size
        rows = torch.where(number < behind[-1], (bounds[group + 1] - first).clamp(0, size), 0)
        return torch.stack([first, rows, group], 1).to(torch.int32)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Each row times its expert's weight, [E, in, out] in any strides, plus its bias [E, out]."""
        if gpu.CHOICE.deterministic or not _suits(x, weight):
            return grouped(x, weight, bias, self.expert_tiles, self.tile_rows)
        y: Tensor = torch._grouped_mm(x, weight, offs=self.expert_bounds[1:])
        if bias is not None:
            expert = torch.searchsorted(
                self.expert_bounds, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True
            )
            y += bias[expert - 1]
        return y

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """The addresses of A and of B by group, int64 [E * units], and the padded ranks; None without any."""
        found = self.adapters.factors(name)
        if found is None:
            return None
        a, b = self.adapters.shapes(name)
        ranks = self.adapters.ranks[self.units.owner]
        step = ranks.to(torch.int64) * self.itemsize
        return (
            self._by_expert(found[0][self.units.owner], step * a[-1], len(a) == 3),
            self._by_expert(found[1][self.units.owner], step * b[-2], len(b) == 3),
            ranks.repeat(self.count),
        )

    def _by_expert(self, base: Tensor, step: Tensor, apart: bool) -> Tensor:
        """base: int64 [n] addresses -> [E * n]: the same for all experts, or `step` bytes further for
        each."""
        if not apart:
            return base.repeat(self.count)
        experts = torch.arange(self.count, device=base.device)[:, None]
        return torch.where(base == 0, 0, base + experts * step).flatten()

    def add_gradients(self, u: Tensor, v: Tensor, name: str, factor: int) -> None:
        """Add u^T v over each request's rows to its gradient of A (factor 0) or B (1): one sum a unit and
        expert, unit after unit."""
        targets, requests = self.adapters.targets, self.units.requests
        where = targets.of(name)
        if where is None:
            return
        shape = self.adapters.shapes(name)[factor]
        wide = shape[-1] if factor == 0 else shape[-2]
        start, stop = self.bounds[:-1], self.bounds[1:]
        n, device = self.units.count, u.device
        step = targets.ranks.to(torch.int64) * wide * 4
        if len(shape) == 3:
            first = torch.arange(self.count, device=device)[:, None] * n
            of = table([(begin, end - begin, 1, i) for i, (begin, end) in enumerate(requests)], device)
            jobs = of.repeat(self.count, 1, 1)
            jobs[..., 0] += first
            jobs = jobs.flatten(0, 1)
            addresses = self._by_expert(where[factor], step, True)
        else:
            start, stop = (x.view(self.count, n).T.flatten() for x in (start, stop))
            e = self.count
            jobs = table(
                [(begin * e, (end - begin) * e, 1, i) for i, (begin, end) in enumerate(requests)], device
            )
            addresses = where[factor]
        outer(
            u, v, jobs, torch.stack([start, stop], 1), addresses, targets.ranks,
            targets.ones if factor == 0 else targets.scales, width=targets.widest, rank_first=factor == 0,
        )  # fmt: skip


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return hidden.index_select(0, route.token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        return weighted_sum(grad, ctx.route.places, None, grad.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor, route: Route, dtype: torch.dtype) -> Tensor:
        z, weights = z.contiguous(), weights.contiguous()
        ctx.save_for_backward(z, weights)
        ctx.route = route
        return weighted_sum(z, route.places, weights, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        return *weighted_sum_backward(z, ctx.route.places, weights, grad), None, None


class _GroupedLinear(torch.autograd.Function):
    """y[rows of expert e] = x W_e^T + b_e + each group's own LoRA on each part of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        route: Route,
        parts: Parts,
    ) -> Tensor:
        y = route.product(x, weight.transpose(1, 2), bias)
        kept, hidden = [], []
        for name, columns in parts:
            found = route.factors(name)
            if found is None:
                continue
            a, b, ranks = found
            z = shrink(
                x, route.group_tiles, a, ranks, route.adapters.width, rank_first=True, rows=route.tile_rows
            )
            expand(z, y[:, columns], route.group_tiles, b, ranks, rank_first=False, rows=route.tile_rows)
            kept.append((name, columns))
            hidden.append(z)
        ctx.save_for_backward(x, weight, *hidden)
        ctx.route, ctx.parts = route, kept
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *hidden = ctx.saved_tensors
        route: Route = ctx.route
        dy = grads[0].contiguous()
        dx = route.product(dy, weight, None) if ctx.needs_input_grad[0] else None
        for (name, columns), z in zip(ctx.parts, hidden, strict=True):
            part = dy[:, columns].contiguous()
            found = route.factors(name)
            assert found is not None
            a, b, ranks = found
            dz = shrink(
                part,
                route.group_tiles,
                b,
                ranks,
                route.adapters.width,
                rank_first=False,
                rows=route.tile_rows,
            )
            if dx is not None:
                expand(dz, dx, route.group_tiles, a, ranks, rank_first=True, rows=route.tile_rows)
            if route.units.requests:
                route.add_gradients(dz, x, name, 0)
                route.add_gradients(z, part, name, 1)
        return dx, None, None, None, None, None, None


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product does this one here: rows and columns of a multiple of 16 bytes."""
    inner, out = weight.shape[1:]
    fits = all(n * x.element_size() % 16 == 0 for n in (inner, out)) and x.data_ptr() % 16 == 0
    return fits and len(x) > 0 and _works(x.device, x.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried at first use: it is there in some versions alone, and for some devices and dtypes."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((40, 32), (3, 48, 32)))
    ends = torch.tensor([17, 17, 40], dtype=torch.int32, device=device)
    wanted = torch.cat([x[:17] @ w[0].T, x[17:] @ w[2].T]).double()
    try:
        forward = torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
        back = torch._grouped_mm(forward, w, offs=ends)
    except Exception as error:
        log.warning("no grouped products of torch's in %s, ours in Triton are taken: %s", dtype, error)
        return False
    theirs = torch.cat([forward[:17] @ w[0], forward[17:] @ w[2]]).double()
    pairs = ((forward, wanted), (back, theirs))
    near = all(float((a.double() - b).norm() / b.norm()) < 2e-2 for a, b in pairs)
    if not near:
        log.warning("torch's grouped products in %s are wrong here, ours in Triton are taken", dtype)
    return near
