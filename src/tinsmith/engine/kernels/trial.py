"""Every Triton kernel on small random numbers against torch's own operations in fp64, on the device
itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.kernels import (
    triton_attention,
    triton_elementwise,
    triton_lora,
    triton_matmul,
    triton_sampling,
)
from tinsmith.engine.kernels.triton_attention_backward import packed_backward

_NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def differences(device: torch.device) -> str:
    """The first kernel that gives something else than torch, with what it was tried on; empty if none
    does."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, trial in _TRIALS.items():
            for ours, wanted in trial(device, dtype):
                distance = float(
                    (ours.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
                )
                if not distance <= _NEAR[dtype]:  # NaN is no small number
                    return f"{name} in {dtype} is {distance:.1e} away from what torch computes"
    return ""


Pairs = list[tuple[Tensor, Tensor]]


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """One sequence by its formula: [heads, rows, dim] each -> [rows, Hq, Dv], differentiable."""
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    at = torch.arange(n, device=q.device)
    hidden = at[None] > at[:, None]
    if window is not None:
        hidden |= at[None] <= at[:, None] - window
    scores = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, n, 1)], -1)
    return (scores.softmax(-1)[..., :n] @ v).transpose(0, 1)


def _attention(device: torch.device, dtype: torch.dtype) -> Pairs:
    n = 100
    q, k, v = (_random(device, dtype, n, h, 64).transpose(0, 1) for h in (4, 2, 2))
    sinks = _random(device, torch.float32, 4)
    spans = triton_attention.Packed([(0, n)], 2, device)
    out, lse = triton_attention.packed_forward(q, k, v, spans.tiles, 0.1, 70, sinks, keep=True)
    assert lse is not None
    grad = _random(device, dtype, n, 4, 64)
    ours = packed_backward(q, k, v, out, lse, grad, spans, 0.1, 70)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        wanted = plain_attention(leaves[0], leaves[1], leaves[2], 0.1, 70, sinks)
        theirs = torch.autograd.grad(wanted, leaves, grad.double())
    keys, values = (
        torch.zeros(3, triton_attention.KEYS, 2, 64, dtype=dtype, device=device) for _ in range(2)
    )
    slots = torch.arange(triton_attention.KEYS, triton_attention.KEYS + n, device=device)
    triton_attention.write(k, v, keys, values, slots)
    pages = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    last = torch.tensor([[n - 1, 1, n - 1, 0]], dtype=torch.int32, device=device)
    single, split = torch.zeros_like(out), torch.zeros_like(out)
    triton_attention.paged_forward(q, keys, values, last, pages, single, 0.1, 70, sinks)
    triton_attention.decode(q, keys, values, last, pages, split, 0.1, 70, sinks, 2)
    wanted = wanted.detach()
    return [
        (out, wanted),
        *zip(ours, theirs, strict=True),
        (single[-1], wanted[-1]),
        (split[-1], wanted[-1]),
    ]


def _adapters(device: torch.device, dtype: torch.dtype) -> Pairs:
    x, y = _random(device, dtype, 40, 96), _random(device, dtype, 40, 80)
    a, b = _random(device, dtype, 16, 96), _random(device, dtype, 80, 16)
    tiles = torch.tensor([(0, 16, 0), (16, 16, 0), (32, 8, 0)], dtype=torch.int32, device=device)
    at_a, at_b = (torch.tensor([f.data_ptr()], device=device) for f in (a, b))
    ranks = torch.tensor([16], dtype=torch.int32, device=device)
    pairs = []
    for rows, parts in ((16, 1), (16, 2)):
        z = triton_lora.shrink(x, tiles, at_a, ranks, 16, rank_first=True, rows=rows, parts=parts)
        out = y.clone()
        triton_lora.expand(z, out, tiles, at_b, ranks, rank_first=False, rows=rows)
        pairs.append((out, y.double() + x.double() @ a.double().T @ b.double().T))
    dz = triton_lora.shrink(y, tiles, at_b, ranks, 16, rank_first=False, rows=16)
    dx = x.clone()
    triton_lora.expand(dz, dx, tiles, at_a, ranks, rank_first=True, rows=16)
    pairs.append((dx, x.double() + y.double() @ b.double() @ a.double()))
    for wide, first in ((x, True), (y, False)):
        target = torch.zeros(16, wide.shape[1], device=device)
        target = target if first else target.T.contiguous()
        triton_lora.outer(
            dz, wide, torch.tensor([[0, 2, 1, 0]], dtype=torch.int32, device=device),
            torch.tensor([[0, 16], [16, 40]], dtype=torch.int32, device=device),
            torch.tensor([target.data_ptr()], device=device), ranks, torch.ones(1, device=device),
            width=16, rank_first=first,
        )  # fmt: skip
        sum_ = dz.double().T @ wide.double()
        pairs.append((target, sum_ if first else sum_.T))
    return pairs


def _products(device: torch.device, dtype: torch.dtype) -> Pairs:
    x, w, b = (_random(device, dtype, *s) for s in ((40, 96), (2, 80, 96), (2, 80)))
    tiles = torch.tensor([(0, 16, 0), (16, 16, 1), (32, 8, 1)], dtype=torch.int32, device=device)
    wide = x.double() @ w.double().mT + b.double().unsqueeze(1)
    return [
        (triton_matmul.matmul(x, w[0].T, b[0]), wide[0]),
        (triton_matmul.grouped(x, w.mT, b, tiles, 16), torch.cat([wide[0, :16], wide[1, 16:]])),
    ]


def _rows(device: torch.device, dtype: torch.dtype) -> Pairs:
    x, up = _random(device, dtype, 20, 96), _random(device, dtype, 20, 97)[:, 1:]
    inverse = torch.empty(20, device=device)
    leaf = x.double().requires_grad_()
    with torch.enable_grad():
        norm = F.rms_norm(leaf, (96,), x[0].double(), 1e-5)
        (theirs,) = torch.autograd.grad(norm, leaf, up.double())
        gate = F.silu(leaf) * up.double()
        (of_gate,) = torch.autograd.grad(gate, leaf, x.double())
        table = leaf.log_softmax(-1)
        (of_table,) = torch.autograd.grad(table[:, 3].sum(), leaf)
    softmax = triton_elementwise.LogSoftmax(x.clone())
    ids = torch.full((20, 1), 3, device=device)
    q = _random(device, dtype, 3, 20, 32)
    turned = torch.cat(
        [
            q[..., :16] * up[:, :16] - q[..., 16:] * x[:, :16],
            q[..., 16:] * up[:, :16] + q[..., :16] * x[:, :16],
        ],
        -1,
    )
    cos, sin = up[:, :16].contiguous(), x[:, :16].contiguous()
    return [
        (triton_elementwise.norm(x, x[0], 1e-5, 1, inverse), norm.detach()),
        (triton_elementwise.norm_backward(x, x[0], up, inverse, 1), theirs),
        (triton_elementwise.gate(x, up), gate.detach()),
        (triton_elementwise.gate_backward(x, up, x)[0], of_gate),
        (triton_elementwise.rotate(q, cos, sin, 32, back=False).transpose(0, 1), turned),
        (softmax.table(), table.detach()),
        (softmax.gradient(ids, torch.ones(20, 1, device=device)), of_table),
    ]


def _draws(device: torch.device, dtype: torch.dtype) -> Pairs:
    """Greedy, and three draws of two tokens that are equally likely and all that top_k or top_p keep."""
    logits = _random(device, dtype, 1, 5000)
    logits[0, [70, 4500]] = 20.0
    zeros = torch.zeros(4, dtype=torch.int64, device=device)
    tokens = triton_sampling.choose(
        logits, zeros, torch.tensor([0.0, 1.0, 1.0, 1.0], device=device),
        torch.tensor([0, 2, 0, 0], dtype=torch.int32, device=device),
        torch.tensor([1.0, 1.0, 0.9, 1.0], device=device),
        torch.tensor([0.9, 0.4, 0.6, 0.9], dtype=torch.float64, device=device),
    )  # fmt: skip
    return [(tokens, torch.tensor([70, 70, 4500, 4500], device=device))]


_TRIALS = {
    "attention": _attention,
    "an adapter": _adapters,
    "a product": _products,
    "a norm, gate, rotation or log-softmax": _rows,
    "the draw of a token": _draws,
}
