"""Norms, gates, rotations and log-softmax in Triton: one pass over a row each, forward and backward.

A program takes whole rows and sums each in one order that its width alone decides, so a row's result is its
own, in training and in sampling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_common import INTERPRETED, power

_VOCAB = 4096  # logits of a row that are worked on at a time
_WIDE = 1 << 16 if INTERPRETED else 4096  # numbers that a program works on


@triton.jit
def _norm(
    X, W, Y, INVERSE, rows, width, stride, eps, STYLE: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """STYLE 0: (x / rms) rounded, times w; 1: x / rms times w in fp32; 2: times 1 + w in fp32."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    col = tl.arange(0, N)[None, :]
    real = (row < rows) & (col < width)
    x = tl.load(X + row * stride + col, mask=real, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1)[:, None] / width + eps)
    w = tl.load(W + col, mask=col < width, other=0.0).to(tl.float32)
    y = x * inverse
    if STYLE == 0:
        y = y.to(Y.dtype.element_ty).to(tl.float32)
    if STYLE == 2:
        w += 1.0
    tl.store(Y + row * width + col, (y * w).to(Y.dtype.element_ty), mask=real)
    if KEEP:
        tl.store(INVERSE + row, inverse, mask=row < rows)


@triton.jit
def _norm_backward(
    X, W, GRAD, INVERSE, DX, rows, width, stride, stride_g, STYLE: tl.constexpr, R: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    col = tl.arange(0, N)[None, :]
    real = (row < rows) & (col < width)
    inverse = tl.load(INVERSE + row, mask=row < rows, other=0.0)
    x = tl.load(X + row * stride + col, mask=real, other=0.0).to(tl.float32) * inverse
    grad = tl.load(GRAD + row * stride_g + col, mask=real, other=0.0).to(tl.float32)
    w = tl.load(W + col, mask=col < width, other=0.0).to(tl.float32)
    if STYLE == 2:
        w += 1.0
    grad *= w
    mean = tl.sum(grad * x, 1)[:, None] / width
    tl.store(DX + row * width + col, ((grad - x * mean) * inverse).to(DX.dtype.element_ty), mask=real)


def norm(x: Tensor, weight: Tensor, eps: float, style: int, inverse: Tensor | None) -> Tensor:
    """RMS norm of x [rows, width], last dimension dense; `inverse`, fp32 [rows], takes what backward
    needs."""
    rows, width = x.shape
    y, n = x.new_empty(rows, width), power(width)
    r = max(1, min(_WIDE // n, 256 if INTERPRETED else 16))
    _norm[(-(-rows // r),)](
        x, weight, y, inverse, rows, width, x.stride(0), eps, style, r, n, inverse is not None,
        num_warps=_warps(r * n),
    )  # fmt: skip
    return y


def norm_backward(x: Tensor, weight: Tensor, grad: Tensor, inverse: Tensor, style: int) -> Tensor:
    rows, width = x.shape
    dx, n = x.new_empty(rows, width), power(width)
    r = max(1, min(_WIDE // n, 256 if INTERPRETED else 16))
    _norm_backward[(-(-rows // r),)](
        x, weight, grad, inverse, dx, rows, width, x.stride(0), grad.stride(0), style, r, n,
        num_warps=_warps(r * n),
    )  # fmt: skip
    return dx


def _warps(numbers: int) -> int:
    return 4 if numbers <= 4096 else 8 if numbers <= 8192 else 16


@triton.jit
def _gate(X, UP, Y, rows, width, stride_x, stride_u, R: tl.constexpr, N: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    col = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    real = (row < rows) & (col < width)
    x = tl.load(X + row * stride_x + col, mask=real, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_u + col, mask=real, other=0.0).to(tl.float32)
    gate = (x / (1.0 + tl.exp(-x))).to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * width + col, (gate * up).to(Y.dtype.element_ty), mask=real)


@triton.jit
def _gate_backward(
    X, UP, GRAD, DX, DUP, rows, width, stride_x, stride_u, stride_g, R: tl.constexpr, N: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    col = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    real = (row < rows) & (col < width)
    x = tl.load(X + row * stride_x + col, mask=real, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_u + col, mask=real, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + row * stride_g + col, mask=real, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    dx = grad * up * sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(DX + row * width + col, dx.to(DX.dtype.element_ty), mask=real)
    tl.store(DUP + row * width + col, (grad * x * sigmoid).to(DUP.dtype.element_ty), mask=real)


def gate(x: Tensor, up: Tensor) -> Tensor:
    """silu(x) * up: [rows, width] each, last dimensions dense."""
    rows, width = x.shape
    y, (r, n) = x.new_empty(rows, width), _tile(width)
    _gate[(-(-rows // r), -(-width // n))](
        x, up, y, rows, width, x.stride(0), up.stride(0), r, n, num_warps=4
    )
    return y


def gate_backward(x: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    dx, dup, (r, n) = x.new_empty(rows, width), x.new_empty(rows, width), _tile(width)
    _gate_backward[(-(-rows // r), -(-width // n))](
        x, up, grad, dx, dup, rows, width, x.stride(0), up.stride(0), grad.stride(0), r, n, num_warps=4
    )
    return dx, dup


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns that a program works on where each number is its own affair."""
    n = min(power(width), 2048)
    return max(1, _WIDE // 2 // n), n


@triton.jit
def _rotate(
    X, COS, SIN, Y, pairs, heads, dim, half, second, stride_xh, stride_xr, stride_cos, BACK: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Some heads of some rows: the numbers j and j + half of a head turn together; the rest is copied. COS,
    SIN: [rows, stride_cos]; those of the second half begin at `second`."""
    pair = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    row, head = pair // heads, pair % heads
    col = tl.arange(0, N)[None, :]
    real = (pair < pairs) & (col < half)
    x_at = X + head * stride_xh + row * stride_xr
    y_at = Y + pair * dim
    a = tl.load(x_at + col, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x_at + half + col, mask=real, other=0.0).to(tl.float32)
    at = row * stride_cos + col
    cos_a = tl.load(COS + at, mask=real, other=0.0).to(tl.float32)
    sin_a = tl.load(SIN + at, mask=real, other=0.0).to(tl.float32)
    cos_b = tl.load(COS + at + second, mask=real, other=0.0).to(tl.float32)
    sin_b = tl.load(SIN + at + second, mask=real, other=0.0).to(tl.float32)
    if BACK:
        ya, yb = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        ya, yb = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(y_at + col, ya.to(Y.dtype.element_ty), mask=real)
    tl.store(y_at + half + col, yb.to(Y.dtype.element_ty), mask=real)
    if D > 0:
        rest = 2 * half + tl.arange(0, D)[None, :]
        real = (pair < pairs) & (rest < dim)
        tl.store(y_at + rest, tl.load(x_at + rest, mask=real), mask=real)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, *, back: bool) -> Tensor:
    """Rotary embedding by halves of the first `rotary` numbers of each head; `back` is its gradient.

    x: [heads, rows, dim], last dimension dense; cos, sin: dense [rows, rotary], or [rows, rotary / 2] where
    the halves share them. Returns [rows, heads, dim].
    """
    heads, rows, dim = x.shape
    half, width = rotary // 2, cos.shape[-1]
    y, n = x.new_empty(rows, heads, dim), power(half, 1)
    r = max(1, _WIDE // 4 // n)
    _rotate[(-(-rows * heads // r),)](
        x, cos, sin, y, rows * heads, heads, dim, half, width - half, x.stride(0), x.stride(1), width, back,
        r, n, 0 if rotary == dim else power(dim - rotary, 1), num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def _normalizers(X, TEMPERATURES, TOP, TOTAL, vocab, stride, N: tl.constexpr, SCALED: tl.constexpr):
    """The maximum of a row and the logarithm of the sum of exp(x - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, N)
    top = tl.full([N], float("-inf"), tl.float32)
    by = tl.load(TEMPERATURES + row) if SCALED else 1.0
    for n in range(0, vocab, N):
        x = tl.load(X + row * stride + n + offs, mask=n + offs < vocab, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.div_rn(x, by) if SCALED else x)
    most = tl.max(top, 0)
    total = tl.zeros([N], tl.float32)
    for n in range(0, vocab, N):
        x = tl.load(X + row * stride + n + offs, mask=n + offs < vocab, other=float("-inf")).to(tl.float32)
        total += tl.exp((tl.div_rn(x, by) if SCALED else x) - most)
    tl.store(TOP + row, most)
    tl.store(TOTAL + row, tl.log(tl.sum(total, 0)))


@triton.jit
def _table(X, TOP, TOTAL, OUT, vocab, stride, N: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    real = col < vocab
    x = tl.load(X + row * stride + col, mask=real, other=0.0).to(tl.float32)
    tl.store(OUT + row * vocab + col, x - tl.load(TOP + row) - tl.load(TOTAL + row), mask=real)


@triton.jit
def _gradient(X, TOP, TOTAL, IDS, GRADS, k, vocab, stride, N: tl.constexpr):
    """Overwrite a row by the gradient of sum_j grads_j * log_softmax(row)[ids_j]."""
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    real = col < vocab
    x = tl.load(X + row * stride + col, mask=real, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(TOP + row) - tl.load(TOTAL + row))
    whole = 0.0
    own = tl.zeros([N], tl.float32)
    for j in range(0, k):
        grad = tl.load(GRADS + row * k + j)
        whole += grad
        own += tl.where(col == tl.load(IDS + row * k + j), grad, 0.0)
    tl.store(X + row * stride + col, (own - p * whole).to(X.dtype.element_ty), mask=real)


class LogSoftmax:
    """The log-softmax of logits [n, vocab], row by row, in fp32: what of it is asked for, and no more.

    temperatures: fp32 [n], by which the logits are divided first.
    """

    def __init__(self, logits: Tensor, temperatures: Tensor | None = None) -> None:
        logits = logits.detach()
        self.logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self._temperatures = temperatures
        self._rows, self._vocab = logits.shape
        self._top, self._total = (logits.new_empty(self._rows, dtype=logits.float().dtype) for _ in range(2))
        if self._rows:
            _normalizers[(self._rows,)](
                self.logits, temperatures, self._top, self._total, self._vocab, self.logits.stride(0), _VOCAB,
                temperatures is not None, num_warps=8,
            )  # fmt: skip

    def table(self) -> Tensor:
        """All of it, fp32 [n, vocab]."""
        x = self.logits
        if self._temperatures is not None:
            x = x.float() / self._temperatures[:, None]
        out = x.new_empty(x.shape, dtype=self._top.dtype)
        if self._rows:
            _table[self._grid](x, self._top, self._total, out, self._vocab, x.stride(0), _VOCAB, num_warps=4)
        return out

    def gather(self, ids: Tensor) -> Tensor:
        """Those of `ids` int64 [n, k]: [n, k], the table's own bits."""
        chosen = self.logits.gather(1, ids).float()
        if self._temperatures is not None:
            chosen = chosen / self._temperatures[:, None]
        return chosen.sub_(self._top[:, None]).sub_(self._total[:, None])

    def gradient(self, ids: Tensor, grads: Tensor) -> Tensor:
        """d / d logits of sum(grads * gather(ids)): overwrites the logits and returns them.

        ids: int64 [n, k]; grads: fp32 [n, k].
        """
        if self._rows:
            _gradient[self._grid](
                self.logits, self._top, self._total, ids.contiguous(), grads.contiguous(), ids.shape[1],
                self._vocab, self.logits.stride(0), _VOCAB, num_warps=4,
            )  # fmt: skip
        return self.logits

    @property
    def _grid(self) -> tuple[int, int]:
        return self._rows, -(-self._vocab // _VOCAB)


@triton.jit
def _row_sums(X, OUT, width, stride, by, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, N)
    acc = tl.zeros([N], tl.float32)
    for n in range(0, width, N):
        acc += tl.load(X + row * stride + n + offs, mask=n + offs < width, other=0.0).to(tl.float32)
    tl.store(OUT + row, (tl.sum(acc, 0) / by).to(OUT.dtype.element_ty))


def row_sums(x: Tensor, by: float, dtype: torch.dtype) -> Tensor:
    """The sums of the rows of x [rows, width], last dimension dense, divided by `by`: [rows]."""
    out = x.new_empty(len(x), dtype=dtype)
    if len(x):
        n = min(power(x.shape[1]), 1024)  # one for each width: it decides the order of the sum
        _row_sums[(len(x),)](x, out, x.shape[1], x.stride(0), by, n, num_warps=4)
    return out
