"""Causal attention by torch's own variable-length kernels (the ones behind torch.nn.attention.varlen).

They are faster than ours where they suit: 16-bit numbers, keys and values of one head size, an order of sums
that may depend on the batch. They know no sinks, but give the log-sum-exp of the scores, with which a sink is
a factor of the output: o exp(lse) / (exp(lse) + exp(sink)). With the new output and log-sum-exp their
backward pass is that of the softmax with sinks: what it does with both is rowsum(dO O) and exp(score - lse).

The operators below them are called, because varlen_attn itself differs from version to version; whether they
do here what they are called for is tried at first use.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.engine.kernels import gpu

log = logging.getLogger(__name__)

_OPS = torch.ops.aten
_WIDEST = 256  # of a head


class Spans:
    """Where sequences lie in packed rows, as the operators want it: the rows between them are sequences,
    too."""

    def __init__(self, spans: Sequence[tuple[int, int]], rows: int, device: torch.device) -> None:
        bounds = sorted({0, rows, *(n for start, length in spans for n in (start, start + length))})
        self.longest = max(b - a for a, b in itertools.pairwise(bounds))
        made = torch.tensor(bounds, dtype=torch.int32)
        self.bounds = (
            made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
        )


def suits(q: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> bool:
    """Whether the operators do this attention here, forward and backward."""
    dim = q.shape[-1]
    if q.device.type != "cuda" or gpu.CHOICE.deterministic or q.dtype is not torch.bfloat16:
        return False
    if dim != v.shape[-1] or dim > _WIDEST or dim % 8:
        return False
    return _works(q.device, dim, window is not None, sinks is not None)


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q: [rows, Hq, D], k and v: [rows, Hkv, D], last dimensions dense -> the output [rows, Hq, D], the
    log-sum-exp, fp32 [Hq, rows], and two tensors for `backward`."""
    out, lse, *rest = _OPS._flash_attention_forward(
        q, k, v, spans.bounds, spans.bounds, spans.longest, spans.longest, 0.0, window is None, False,
        scale=scale, **_window(window),
    )  # fmt: skip
    if sinks is not None:
        out = out * torch.sigmoid(lse - sinks[:, None]).T.unsqueeze(-1).to(out.dtype)
        lse = torch.logaddexp(lse, sinks[:, None])
    return out, lse, rest[0], rest[1]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Tensor, unused: Tensor,
    spans: Spans, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    dq, dk, dv = _OPS._flash_attention_backward(
        grad, q, k, v, out, lse, spans.bounds, spans.bounds, spans.longest, spans.longest, 0.0,
        window is None, state, unused, scale=scale, **_window(window),
    )  # fmt: skip
    return dq, dk, dv


def _window(window: int | None) -> dict[str, int]:
    """Theirs counts the positions before a query, ours the query with them."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


@functools.cache
def _works(device: torch.device, dim: int, window: bool, sinks: bool) -> bool:
    try:
        problem = _differs(device, dim, 50 if window else None, sinks)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem:
        log.warning(
            "torch's attention for heads of %d%s%s is not used, ours in Triton is: %s",
            dim,
            ", a window" if window else "",
            ", sinks" if sinks else "",
            problem,
        )  # fmt: skip
    return not problem


@torch.no_grad()
def _differs(device: torch.device, dim: int, window: int | None, sinks: bool) -> str:
    from tinsmith.engine.kernels.trial import plain_attention

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    cut, rows, scale = 70, 198, dim**-0.5
    q, k, v, grad = random(rows, 4, dim), random(rows, 2, dim), random(rows, 2, dim), random(rows, 4, dim)
    extra = random(4).float() if sinks else None
    spans = Spans([(0, cut), (cut, rows - cut)], rows, device)
    out, lse, state, unused = forward(q, k, v, spans, scale, window, extra)
    ours = [out, *backward(grad, q, k, v, out, lse, state, unused, spans, scale, window)]
    leaves = [x.transpose(0, 1).double().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        wanted = torch.cat(
            [
                plain_attention(leaves[0][:, a:b], leaves[1][:, a:b], leaves[2][:, a:b], scale, window, extra)
                for a, b in ((0, cut), (cut, rows))
            ]
        )
        theirs = torch.autograd.grad(wanted, leaves, grad.double())
    for mine, other in zip(ours, [wanted.detach(), *(x.transpose(0, 1) for x in theirs)], strict=True):
        distance = float((mine.double() - other).norm() / other.norm())
        if not distance < 2e-2:
            return f"it is {distance:.1e} away from its formula"
    return ""
