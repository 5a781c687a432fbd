"""torch's products and sums with one order for every result, whatever the batch: what --deterministic needs
of the code that is not ours (routers, norms that are not taken over, rotary frequencies).

torch's own choose tiles, and splits of a sum, by the number of rows, so that a row has other bits in other
company (He et al., "Defeating Nondeterminism in LLM Inference", 2025, whose way this is). They are replaced
below autograd, for one kind of device, from `replace` on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tinsmith.engine.kernels.triton_elementwise import row_sums
from tinsmith.engine.kernels.triton_matmul import matmul

_FLOATS = (torch.bfloat16, torch.float32)


def _ours(*tensors: Tensor) -> bool:
    """Others go to the `out` variants, which are not replaced."""
    return all(x.dtype is tensors[0].dtype for x in tensors) and tensors[0].dtype in _FLOATS


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _ours(a, b):
        return matmul(a, b)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _ours(a, b, bias) and beta == alpha == 1 and bias.dim() == 1 and bias.stride(0) == 1:
        return matmul(a, b, bias)
    if _ours(a, b, bias):
        return bias * beta + matmul(a, b) * alpha
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=out)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if _ours(a, b):
        return matmul(a, b)
    return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def _sums(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None, mean: bool
) -> Tensor | None:
    """Of the last dimension alone; None for others."""
    if dim is None or [d % max(x.dim(), 1) for d in dim] != [x.dim() - 1] or x.dtype not in _FLOATS:
        return None
    if dtype not in (None, *_FLOATS):
        return None
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
    out = row_sums(rows, float(x.shape[-1]) if mean else 1.0, dtype or x.dtype)
    return out.view(*x.shape[:-1], *([1] if keepdim else []))


def _mean(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    out = _sums(x, dim, keepdim, dtype, True)
    return _torchs(torch.mean, x, dim, keepdim, dtype) if out is None else out


def _sum(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    out = _sums(x, dim, keepdim, dtype, False)
    return _torchs(torch.sum, x, dim, keepdim, dtype) if out is None else out


def _torchs(
    function: object, x: Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
) -> Tensor:
    dims = list(range(x.dim())) if not dim else [d % x.dim() for d in dim]
    shape = [1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims]
    kind = dtype or (torch.int64 if not x.dtype.is_floating_point and function is torch.sum else x.dtype)
    out = torch.empty(shape, dtype=kind, device=x.device)
    result: Tensor = function(x, dims, keepdim, dtype=dtype, out=out)  # type: ignore[operator]
    return result


_REPLACED = {"mm": _mm, "addmm": _addmm, "bmm": _bmm, "mean.dim": _mean, "sum.dim_IntList": _sum}
_kept: list[torch.library.Library] = []


def replace(kind: str) -> None:
    """For devices of `kind`, "cuda" or "cpu", for the rest of the process."""
    if not _kept:
        _kept.append(_register(kind))


@contextmanager
def replaced(kind: str) -> Iterator[None]:
    """The same meanwhile."""
    library = _register(kind)
    try:
        yield
    finally:
        library._destroy()


def _register(kind: str) -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that something is replaced is meant
        for name, function in _REPLACED.items():
            library.impl(name, function, kind.upper())
    return library


def holds(device: torch.device, width: int) -> bool:
    """Whether what is replaced has the same bits for one row and for many, as the numbers of this device
    go."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, width, generator=generator).to(device)
    w = torch.randn(width, 48, generator=generator).to(device) / math.sqrt(width)
    return all(
        torch.equal(x[3:4] @ w, (x @ w)[3:4]) and torch.equal(x[3:4].mean(-1), x.mean(-1)[3:4])
        for x, w in ((x, w), (x.bfloat16(), w.bfloat16()))
    )
