"""Norms, gates, rotations and log-softmax by the CPU kernel (elementwise.cpp), or on a GPU by Triton's
(triton_elementwise.py): a pass over a row each.

A row's result depends on that row alone, in training and in sampling, forward and backward.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.library import library

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "norm_forward": [_P, _P, _P, _P, _N, _N, _N, _F, _I, _I],
    "norm_backward": [_P, _P, _P, _P, _P, _N, _N, _N, _N, _I, _I],
    "gate_forward": [_P, _P, _P, _N, _N, _N, _N, _I],
    "gate_backward": [_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _I],
    "rotate": [_P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _N, _N, _I, _I],
    "normalizers": [_P, _P, _P, _N, _N, _N, _I],
    "log_softmax": [_P, _P, _P, _P, _N, _N, _N, _I],
    "log_softmax_backward": [_P, _P, _P, _P, _P, _N, _N, _N, _N, _I],
}


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels serve tensors of this kind here."""
    return gpu.takes(device, dtype) or (device.type == "cpu" and dtype in _NAMES and library() is not None)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(library(), f"{name}_{_NAMES[dtype]}")
    function.argtypes, function.restype = _ARGUMENTS[name], None
    return function


def _same_dtype(x: Tensor, other: Tensor) -> None:
    """A kernel reads all of its operands as what the first one is. Raises TypeError."""
    if x.dtype is not other.dtype:
        raise TypeError(f"operands of one dtype are needed, not {x.dtype} and {other.dtype}")


def _gpu() -> Any:
    return gpu.module("triton_elementwise")


class NormStyle(enum.IntEnum):
    """Where families round and what they scale by: (x / rms) rounded, times w; x / rms times w in fp32; or
    times 1 + w in fp32."""

    ROUND_THEN_SCALE = 0
    SCALE = 1
    SCALE_BY_ONE_PLUS = 2


def norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
    """RMS norm over the last dimension: x [..., n], weight [n], one dtype -> [..., n] dense."""
    _same_dtype(x, weight)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Norm.apply(x, weight, eps, style)
        return result
    return _norm(x.contiguous(), weight, eps, style, None)


def _norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle, inverse: Tensor | None) -> Tensor:
    if gpu.takes(x.device):
        flat = _gpu().norm(x.view(-1, x.shape[-1]), weight, eps, int(style), inverse)
        result: Tensor = flat.view(x.shape)
        return result
    y, width = torch.empty_like(x), x.shape[-1]
    _function("norm_forward", x.dtype)(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), None if inverse is None else inverse.data_ptr(),
        x.numel() // width, width, width, eps, style, torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
        x = x.contiguous()
        inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        y = _norm(x, weight, eps, style, inverse)
        ctx.save_for_backward(x, weight, inverse)
        ctx.style = style
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if gpu.takes(x.device):
            flat = _gpu().norm_backward(_rows(x), weight, _rows(grads[0]), inverse, int(ctx.style))
            return flat.view(x.shape), None, None, None
        grad, dx, width = grads[0].contiguous(), torch.empty_like(x), x.shape[-1]
        _function("norm_backward", x.dtype)(
            x.data_ptr(), weight.data_ptr(), grad.data_ptr(), inverse.data_ptr(), dx.data_ptr(),
            x.numel() // width, width, width, width, ctx.style, torch.get_num_threads(),
        )  # fmt: skip
        return dx, None, None, None


def gate(x: Tensor, up: Tensor) -> Tensor:
    """silu(x) * up, both [..., n] of one shape and dtype."""
    _same_dtype(x, up)
    if torch.is_grad_enabled() and (x.requires_grad or up.requires_grad):
        result: Tensor = _Gate.apply(x, up)
        return result
    return _gate(_rows(x), _rows(up)).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n], whose last dimension lies together; no copy where it does already."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _gate(x: Tensor, up: Tensor) -> Tensor:
    if gpu.takes(x.device):
        result: Tensor = _gpu().gate(x, up)
        return result
    y = x.new_empty(x.shape)
    _function("gate_forward", x.dtype)(
        x.data_ptr(), up.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], x.stride(0), up.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor) -> Tensor:
        ctx.shape = x.shape
        x, up = _rows(x), _rows(up)
        ctx.save_for_backward(x, up)
        return _gate(x, up).view(ctx.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, up = ctx.saved_tensors
        grad = _rows(grads[0])
        if gpu.takes(x.device):
            dx, dup = _gpu().gate_backward(x, up, grad)
            return dx.view(ctx.shape), dup.view(ctx.shape)
        dx, dup = x.new_empty(x.shape), x.new_empty(x.shape)
        _function("gate_backward", x.dtype)(
            x.data_ptr(), up.data_ptr(), grad.data_ptr(), dx.data_ptr(), dup.data_ptr(), x.shape[0],
            x.shape[1], x.stride(0), up.stride(0), grad.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return dx.view(ctx.shape), dup.view(ctx.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    """Rotary embedding of the first `rotary` numbers of each head by halves.

    x: [1, heads, rows, dim]; cos, sin: [1, rows, rotary], or [1, rows, rotary / 2] where the halves share
    them. Returns [1, heads, rows, dim] that lies as [rows, heads, dim].
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Rotate.apply(x, cos, sin, rotary)
        return result
    return _rotate(x, cos, sin, rotary, back=False)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, *, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    if gpu.takes(x.device):
        turned: Tensor = _gpu().rotate(x[0], cos[0], sin[0], rotary, back=back)
        return turned.unsqueeze(0).transpose(1, 2)
    _, heads, rows, dim = x.shape
    y = x.new_empty(1, rows, heads, dim)
    half, width = rotary // 2, cos.shape[-1]
    _function("rotate", x.dtype)(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), rows, heads, dim, half,
        width - half, width, x.stride(1), x.stride(2), back, torch.get_num_threads(),
    )  # fmt: skip
    return y.transpose(1, 2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotary = rotary
        return _rotate(x, cos, sin, rotary, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, ctx.rotary, back=True), None, None, None


class LogSoftmax:
    """The log-softmax of logits [n, vocab], row by row, in fp32: what of it is asked for, and no more.

    top, total: fp32 [n], each row's maximum and the logarithm of the sum of exp(x - maximum).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.detach()
        if self.logits.stride(-1) != 1:
            self.logits = self.logits.contiguous()
        n, vocab = self.logits.shape
        self.top, self.total = torch.empty(n), torch.empty(n)
        _function("normalizers", logits.dtype)(
            self.logits.data_ptr(), self.top.data_ptr(), self.total.data_ptr(), n, vocab,
            self.logits.stride(0), torch.get_num_threads(),
        )  # fmt: skip

    def table(self) -> Tensor:
        """All of it, [n, vocab]."""
        out = torch.empty(self.logits.shape, dtype=torch.float32)
        n, vocab = out.shape
        _function("log_softmax", self.logits.dtype)(
            self.logits.data_ptr(), self.top.data_ptr(), self.total.data_ptr(), out.data_ptr(), n, vocab,
            self.logits.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gather(self, ids: Tensor) -> Tensor:
        """Those of `ids` int64 [n, k]: [n, k], the table's own bits."""
        chosen = self.logits.gather(1, ids).float()
        return chosen.sub_(self.top[:, None]).sub_(self.total[:, None])

    def gradient(self, ids: Tensor, grads: Tensor) -> Tensor:
        """d / d logits of sum(grads * gather(ids)): overwrites the logits and returns them.

        ids: int64 [n, k]; grads: fp32 [n, k].
        """
        ids, grads = ids.contiguous(), grads.contiguous()
        n, vocab = self.logits.shape
        _function("log_softmax_backward", self.logits.dtype)(
            self.logits.data_ptr(), self.top.data_ptr(), self.total.data_ptr(), ids.data_ptr(),
            grads.data_ptr(), ids.shape[1], n, vocab, self.logits.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return self.logits


def log_softmax(logits: Tensor) -> LogSoftmax:
    """Of logits on a device that the kernels serve."""
    if gpu.takes(logits.device):
        on_gpu: LogSoftmax = _gpu().LogSoftmax(logits)
        return on_gpu
    return LogSoftmax(logits)
