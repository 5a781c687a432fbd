"""Norms, gates, rotations and log-softmax by the CPU kernel: as in float64, and each row's own affair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.engine.tiny import relative, threads
from tinsmith.engine.kernels import elementwise as kernel
from tinsmith.engine.kernels.elementwise import LogSoftmax, NormStyle

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="no C++ compiler here")

DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 3e-7, torch.bfloat16: 4e-3}
WIDTHS = [7, 64, 100, 515]
EPS = 1e-6


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(ours: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and gradients against float64."""
    near = NEAR[inputs[0].dtype]
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    wide = [x.double().requires_grad_(True) for x in inputs]
    out, expected = ours(*leaves), exact(*wide)
    assert relative(out.detach(), expected.detach()) < near
    grad = random(*out.shape, dtype=out.dtype, seed=9)
    out.backward(grad)
    expected.backward(grad.double())
    for leaf, other in zip(leaves, wide, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert relative(leaf.grad, other.grad) < near
    with torch.no_grad():
        assert torch.equal(ours(*inputs), out)  # the way without a graph


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("style", NormStyle)
def test_norm(style: NormStyle, width: int, dtype: torch.dtype) -> None:
    weight = random(width, dtype=dtype, seed=1)

    def exact(x: Tensor) -> Tensor:
        scale = weight.double() + (style is NormStyle.SCALE_BY_ONE_PLUS)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * scale

    check(lambda x: kernel.norm(x, weight, EPS, style), exact, random(2, 9, width, dtype=dtype))
    strided = random(9, 2, width, dtype=dtype).transpose(0, 1)
    assert torch.equal(
        kernel.norm(strided, weight, EPS, style), kernel.norm(strided.contiguous(), weight, EPS, style)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gate(width: int, dtype: torch.dtype) -> None:
    def exact(x: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * up

    x, up = (20 * random(1, 9, width, dtype=dtype, seed=s) for s in (0, 1))
    check(kernel.gate, exact, x, up)
    both = random(9, 2 * width, dtype=dtype)
    assert torch.equal(
        kernel.gate(*both.chunk(2, -1)), kernel.gate(*(c.contiguous() for c in both.chunk(2, -1)))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "width", "rotary"), [(64, 64, 64), (80, 32, 32), (24, 12, 24)])
def test_rotate(dim: int, width: int, rotary: int, dtype: torch.dtype) -> None:
    cos, sin = (random(1, 11, width, dtype=dtype, seed=s) for s in (1, 2))

    def exact(x: Tensor) -> Tensor:
        c, s = (torch.cat([t, t], -1) if width < rotary else t for t in (cos.double(), sin.double()))
        turned, rest = x[..., :rotary], x[..., rotary:]
        left, right = turned.chunk(2, -1)
        return torch.cat([turned * c + torch.cat([-right, left], -1) * s, rest], -1)

    x = random(1, 11, 3, dim, dtype=dtype).transpose(1, 2)
    check(lambda x: kernel.rotate(x, cos, sin, rotary), exact, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [3, 500, 8193])
class TestLogSoftmax:
    def test_table_and_chosen_ones_are_those_of_float64(self, vocab: int, dtype: torch.dtype) -> None:
        logits = 10 * random(9, vocab, dtype=dtype)
        ids = torch.randint(0, vocab, (9, 4), generator=torch.Generator().manual_seed(0))
        exact = torch.log_softmax(logits.double(), -1)
        own = LogSoftmax(logits)
        assert relative(own.table(), exact) < 3e-7
        assert torch.equal(own.gather(ids), own.table().gather(1, ids))

    def test_the_gradient_overwrites_the_logits(self, vocab: int, dtype: torch.dtype) -> None:
        """Also where a token is chosen twice."""
        logits = 5 * random(9, vocab, dtype=dtype)
        ids = torch.randint(0, vocab, (9, 4), generator=torch.Generator().manual_seed(0))
        ids[:, 3] = ids[:, 0]
        grads = random(9, 4, seed=3)
        wide = logits.double().requires_grad_(True)
        (torch.log_softmax(wide, -1).gather(1, ids) * grads).sum().backward()
        assert wide.grad is not None
        out = LogSoftmax(logits).gradient(ids, grads)
        assert out.data_ptr() == logits.data_ptr()
        assert relative(out, wide.grad) < (1e-6 if dtype is torch.float32 else 4e-3)

    def test_infinities_are_kept_apart(self, vocab: int, dtype: torch.dtype) -> None:
        logits = random(2, vocab, dtype=dtype)
        logits[0, 1] = float("-inf")
        table = LogSoftmax(logits).table()
        assert table[0, 1] == float("-inf")
        assert bool(torch.isfinite(table[1]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_does_not_depend_on_its_company(width: int, dtype: torch.dtype) -> None:
    x, up = (random(700, width, dtype=dtype, seed=s) for s in (0, 1))
    weight = random(width, dtype=dtype, seed=2)

    def all_of(x: Tensor, up: Tensor) -> list[Tensor]:
        out = [kernel.norm(x, weight, EPS, style) for style in NormStyle]
        return [*out, kernel.gate(x, up), LogSoftmax(x).table()]

    with threads(2):
        whole = all_of(x, up)
        for rows in (slice(0, 1), slice(3, 20), slice(693, 700)):
            for ours, theirs in zip(all_of(x[rows], up[rows]), whole, strict=True):
                assert torch.equal(ours, theirs[rows])
