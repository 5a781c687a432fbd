"""Mixture-of-experts layers with adapters, through transformers' experts interface.

Token-expert pairs are sorted by (expert, unit), a unit being a training block or a sampling segment,
and each group is padded to PADDING.rows rows. So the rows of a product, and the gradient of an expert's
factors, depend on the unit's own tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.attention import PADDING
from tinsmith.engine.model.lora import AdapterWeights, Gradients, Slot
from tinsmith.engine.model.packing import Pass, current_pass, units
from tinsmith.engine.model.routing import route


@dataclass(slots=True)
class _Group:
    """Padded rows [start, stop) of one expert and one unit."""

    expert: int
    start: int
    stop: int
    weights: AdapterWeights | None
    gradients: Gradients | None


@dataclass(slots=True)
class _Plan:
    """Where the token-expert pairs of one layer go; kernels/gpu_experts.py has that of a GPU."""

    groups: list[_Group]
    spans: list[tuple[int, int, int]]  # (expert, start, stop): an expert's groups together
    place: Tensor  # int64 [tokens * k]: the padded row of each token-expert pair
    rows: int

    def take(self, hidden: Tensor) -> Tensor:
        """[tokens, H] -> the pairs' rows."""
        tokens = hidden.shape[0]
        pairs = torch.arange(tokens, device=hidden.device).repeat_interleave(len(self.place) // tokens)
        rows = hidden.index_select(0, pairs)
        return hidden.new_zeros(self.rows, hidden.shape[1]).index_copy(0, self.place, rows)

    def linear(
        self,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        parts: list[tuple[str, slice]],
    ) -> Tensor:
        """x: the pairs' rows [rows, in], weight: [E, out, in] -> [rows, out]."""
        y: Tensor = _GroupedLinear.apply(x, anchor, weight, bias, self, parts)
        return y

    def combine(self, z: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The pairs' results, weighted [tokens, k] and added -> [tokens, out]."""
        out = z.index_select(0, self.place).view(*weights.shape, -1) * weights.unsqueeze(-1)
        return out.sum(dim=1).to(dtype)


def _plan(this: Pass, experts: Tensor, count: int) -> _Plan:
    """Where each pair of `experts` [tokens, k] goes."""
    tokens, k = experts.shape
    owners: list[tuple[AdapterWeights | None, Gradients | None]] = []
    unit_of_row = torch.zeros(tokens, dtype=torch.int64)
    for segment in this.segments:
        for start, stop, gradients in units(segment):
            unit_of_row[start:stop] = len(owners)
            owners.append((segment.weights, gradients))
    n = len(owners)
    key = (experts.cpu() * n + unit_of_row[:, None]).flatten()
    order = torch.argsort(key, stable=True)
    sizes = torch.bincount(key, minlength=count * n)
    padded = (sizes + PADDING.rows - 1) // PADDING.rows * PADDING.rows
    starts = torch.cumsum(padded, 0) - padded
    within = torch.arange(tokens * k) - (torch.cumsum(sizes, 0) - sizes)[key[order]]
    place = torch.empty(tokens * k, dtype=torch.int64)
    place[order] = starts[key[order]] + within
    groups: list[tuple[int, _Group]] = []
    spans: list[tuple[int, int, int]] = []
    for index in sizes.nonzero().flatten().tolist():
        expert, unit = divmod(index, n)
        start, stop = int(starts[index]), int(starts[index] + padded[index])
        groups.append((unit, _Group(expert, start, stop, *owners[unit])))
        if spans and spans[-1][0] == expert:
            spans[-1] = (expert, spans[-1][1], stop)
        else:
            spans.append((expert, start, stop))
    # Unit after unit, as if each went by itself: the experts share a factor, whose gradient is a sum.
    groups.sort(key=lambda pair: pair[0])
    return _Plan([group for _, group in groups], spans, place.to(experts.device), int(padded.sum()))


class _GroupedLinear(torch.autograd.Function):
    """y[rows of expert e] = x W_e^T + b_e + each group's own LoRA on each part of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        plan: _Plan,
        parts: list[tuple[str, slice]],
    ) -> Tensor:
        """weight: [E, out, in]; parts: (slot name, columns of the output)."""
        y = x.new_empty(x.shape[0], weight.shape[1])
        for expert, start, stop in plan.spans:
            y[start:stop] = F.linear(x[start:stop], weight[expert], None if bias is None else bias[expert])
        hidden: list[Tensor] = []
        for group in plan.groups:
            rows = slice(group.start, group.stop)
            for name, columns in parts:
                ab = _factors(group, name)
                if ab is not None:
                    hidden.append(F.linear(x[rows], ab[0]))
                    y[rows, columns] += F.linear(hidden[-1], ab[1])
        ctx.save_for_backward(x, weight, *hidden)
        ctx.plan, ctx.parts = plan, parts
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, *saved = ctx.saved_tensors
        hidden = iter(saved)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        if dx is not None:
            for expert, start, stop in ctx.plan.spans:
                dx[start:stop] = dy[start:stop] @ weight[expert]
        for group in ctx.plan.groups:
            rows = slice(group.start, group.stop)
            for name, columns in ctx.parts:
                ab = _factors(group, name)
                if ab is None:
                    continue
                h, part = next(hidden), dy[rows, columns].contiguous()
                dh = part @ ab[1]
                if dx is not None:
                    dx[rows] += dh @ ab[0]
                if group.gradients is not None:
                    group.gradients.add(name, group.expert, x[rows], h, part, dh)
        return dx, None, None, None, None, None


def _factors(group: _Group, name: str) -> tuple[Tensor, Tensor] | None:
    ab = group.weights.get(name) if group.weights is not None else None
    if ab is None:
        return None
    a, b = ab
    return (a[group.expert] if a.dim() == 3 else a), (b[group.expert] if b.dim() == 3 else b)


def expert_slots(name: str, module: Any) -> list[Slot]:
    """The slots of an experts module: w1 (gate) and w3 (up) share A, w2 (down) shares B, Tinker's names.

    Without a gate w1 is the up projection, and there is no w3.
    """
    up = module.gate_up_proj if module.has_gate else module.up_proj
    e, hidden, inner = _dims(up, module.is_transposed)
    inner = inner // 2 if module.has_gate else inner
    ups = ["w1", "w3"] if module.has_gate else ["w1"]
    slots = [Slot(f"{name}.{w}", "mlp", hidden, inner, e, "A") for w in ups]
    return [*slots, Slot(f"{name}.w2", "mlp", inner, hidden, e, "B")]


def _dims(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """(experts, in, out) of a 3-D weight."""
    e, a, b = weight.shape
    return (e, a, b) if transposed else (e, b, a)


def experts_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface: hidden [tokens, H], both others [tokens, k] -> [tokens, H]."""
    this = current_pass()
    if this is None:
        raise RuntimeError("experts run inside a pass only")
    up, up_bias = (
        (self.gate_up_proj, getattr(self, "gate_up_proj_bias", None))
        if self.has_gate
        else (self.up_proj, getattr(self, "up_proj_bias", None))
    )
    down, down_bias = self.down_proj, getattr(self, "down_proj_bias", None)
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if hidden.is_meta:  # where tokens go is decided by values, and only shapes are asked for
        return torch.empty_like(hidden)
    of_batch = None
    if this.places is not None:  # the rows stand in a batch of sequences: take them out, and put them back
        of_rows, of_batch = this.places.of_rows, this.places.of_batch
        hidden, top_k_index, top_k_weights = (
            x.index_select(0, of_rows) for x in (hidden, top_k_index, top_k_weights)
        )
    name = getattr(self, "tinsmith_name", "")
    top_k_index, top_k_weights = route(name, top_k_index, top_k_weights)
    if gpu.takes(hidden.device, hidden.dtype):
        of = up.shape[0], up.element_size()
        plan = gpu.module("gpu_experts").Route(this, top_k_index, *of)
    else:
        plan = _plan(this, top_k_index, up.shape[0])
    x = plan.take(hidden)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[tuple[str, slice]]) -> Tensor:
        anchor = None if x.requires_grad else this.anchor_of(part for part, _ in parts)
        y: Tensor = plan.linear(x, anchor, weight, bias, parts)
        return y

    if self.has_gate:
        inner = up.shape[1] // 2
        gate, rest = (
            (slice(0, inner), slice(inner, None))
            if self.is_concatenated
            else (slice(0, None, 2), slice(1, None, 2))
        )
        y = linear(x, up, up_bias, [(f"{name}.w1", gate), (f"{name}.w3", rest)])
        y = self._apply_gate(y)
    else:
        y = self.act_fn(linear(x, up, up_bias, [(f"{name}.w1", slice(None))]))
    z = linear(y, down, down_bias, [(f"{name}.w2", slice(None))])
    out: Tensor = plan.combine(z, top_k_weights, hidden.dtype)
    return out if of_batch is None else out.index_select(0, of_batch)
