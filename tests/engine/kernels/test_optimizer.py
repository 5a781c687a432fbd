"""The optimizer's kernel against torch.optim.AdamW in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engine.tiny import relative, threads
from tinsmith.engine.commands import AdamParams
from tinsmith.engine.kernels import optimizer as kernel
from tinsmith.engine.optimizers import adamw
from tinsmith.engine.optimizers.clipping import gradient_norm

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="no C++ compiler here")

SETTINGS = AdamParams(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, grad_clip_norm=1.0)


def random(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 15, 40_000])
def test_steps_are_those_of_torch(n: int) -> None:
    params, first, second = random(n, 0), torch.zeros(n), torch.zeros(n)
    wide = params.double().requires_grad_(True)
    other = torch.optim.AdamW([wide], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 4):
        gradient = random(n, step)
        wide.grad = gradient.double()
        norm = adamw(params, gradient.clone(), first, second, step, SETTINGS)
        assert norm == pytest.approx(float(gradient.double().norm()))
        torch.nn.utils.clip_grad_norm_([wide], 1.0)
        other.step()
    assert relative(params, wide.detach()) < 1e-6


def test_threads_change_no_bit() -> None:
    results = []
    for count in (1, 2):
        with threads(count):
            params, first, second = random(100_001, 0), torch.zeros(100_001), torch.zeros(100_001)
            norm = adamw(params, random(100_001, 1), first, second, 1, SETTINGS)
            results.append((norm, params, first, second))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_is_finite_if_and_only_if_every_number_is(bad: float) -> None:
    x = torch.full((20_000,), torch.finfo(torch.float32).max)
    assert math.isfinite(gradient_norm(x))
    x[19_999] = bad
    assert not math.isfinite(gradient_norm(x))
