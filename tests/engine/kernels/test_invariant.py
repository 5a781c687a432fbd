"""torch's products and sums in one order: what torch gives, and a row's bits in any company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.engine.tiny import relative

pytest.importorskip("triton")
from tinsmith.engine.kernels import invariant

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = torch.device(KIND)


@pytest.fixture(autouse=True)
def replaced() -> Iterator[None]:
    with invariant.replaced(KIND):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_are_torchs(dtype: torch.dtype) -> None:
    x, w, b, batch = (
        random(20, 70, dtype=dtype),
        random(30, 70, dtype=dtype),
        random(30, dtype=dtype),
        random(2, 20, 70, dtype=dtype),
    )
    near = 1e-6 if dtype is torch.float32 else 1e-2
    dx, dw, db, dbatch = (t.double().cpu() for t in (x, w, b, batch))
    linear = torch.nn.functional.linear
    pairs = [
        (linear(x, w), linear(dx, dw)),
        (linear(x, w, b), linear(dx, dw, db)),
        (linear(batch, w, b), linear(dbatch, dw, db)),
        (
            torch.addmm(x[:, :30], x, w.T, beta=0.5, alpha=2.0),
            torch.addmm(dx[:, :30], dx, dw.T, beta=0.5, alpha=2.0),
        ),
        (batch @ batch.mT, dbatch @ dbatch.mT),
        (batch.mean(-1, keepdim=True), dbatch.mean(-1, keepdim=True)),
        (x.T.sum(-1), dx.T.sum(-1)),
        (batch.sum((0, 1)), dbatch.sum((0, 1))),
        (batch.mean(), dbatch.mean()),
    ]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype is dtype
        assert relative(ours.cpu(), theirs) < near


def test_other_numbers_go_torchs_way() -> None:
    x = torch.arange(12, device=DEVICE).view(3, 4)
    assert x.sum(-1).tolist() == [6, 22, 38]
    assert (x > 5).sum(-1).tolist() == [0, 2, 4]
    assert torch.equal(
        x.double() @ x.double().T, (x @ x.T).double() if KIND == "cpu" else x.double() @ x.double().T
    )


def test_gradients_go_through_them() -> None:
    x, w = random(20, 70).requires_grad_(), random(30, 70)
    (x @ w.T).mean(-1).sum().backward()
    assert x.grad is not None
    assert relative(x.grad.cpu(), (w.double().sum(0) / 30).expand(20, -1).cpu()) < 1e-6


def test_rows_have_their_bits_in_any_company() -> None:
    assert invariant.holds(DEVICE, 300)
