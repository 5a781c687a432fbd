"""Adapters' products and the fixed-tile matrix products in Triton against float64, and in other company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.tiny import relative

pytest.importorskip("triton")
from tinsmith.engine.kernels import triton_lora as lora
from tinsmith.engine.kernels import triton_matmul as matmul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IN, OUT = 80, 144
RANKS = (16, 32, 48)
SEGMENTS = [(0, 32, 1), (32, 16, 0), (48, 20, 3), (68, 32, 2)]  # first row, rows, adapter; 3 is none
ROWS = 100
NEAR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([*(x.data_ptr() for x in tensors), 0], device=DEVICE)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestAdapters:
    @pytest.mark.parametrize("parts", [1, 2])
    def test_every_row_meets_its_own_adapter(self, dtype: torch.dtype, parts: int) -> None:
        x, y = random(ROWS, IN, dtype=dtype), random(ROWS, OUT, seed=1, dtype=dtype)
        a = [random(r, IN, seed=r, dtype=dtype) for r in RANKS]
        b = [random(OUT, r, seed=-r, dtype=dtype) for r in RANKS]
        tiles, ranks = ints(SEGMENTS), ints([*RANKS, 0])
        z = lora.shrink(x, tiles, addresses(a), ranks, 48, rank_first=True, rows=32, parts=parts)
        out = y.clone()
        lora.expand(z, out, tiles, addresses(b), ranks, rank_first=False, rows=32)
        for start, n, owner in SEGMENTS:
            rows = slice(start, start + n)
            if owner == 3:
                assert torch.equal(out[rows], y[rows])
                continue
            expected = y[rows].double() + x[rows].double() @ a[owner].double().T @ b[owner].double().T
            assert relative(out[rows].cpu(), expected.cpu()) < NEAR[dtype]

    def test_backward_goes_through_the_transposed_factors(self, dtype: torch.dtype) -> None:
        dy, dx = random(ROWS, OUT, dtype=dtype), random(ROWS, IN, seed=1, dtype=dtype)
        a = [random(r, IN, seed=r, dtype=dtype) for r in RANKS]
        b = [random(OUT, r, seed=-r, dtype=dtype) for r in RANKS]
        tiles, ranks = ints(SEGMENTS), ints([*RANKS, 0])
        dz = lora.shrink(dy, tiles, addresses(b), ranks, 48, rank_first=False, rows=32)
        out = dx.clone()
        lora.expand(dz, out, tiles, addresses(a), ranks, rank_first=True, rows=32)
        for start, n, owner in SEGMENTS[:2]:
            rows = slice(start, start + n)
            expected = dx[rows].double() + dy[rows].double() @ b[owner].double() @ a[owner].double()
            assert relative(out[rows].cpu(), expected.cpu()) < NEAR[dtype]

    @pytest.mark.parametrize("rank_first", [True, False])
    def test_gradients_are_added_block_after_block(self, dtype: torch.dtype, rank_first: bool) -> None:
        """To targets of odd ranks, and with the same bits in one launch and in one for every block."""
        u, v = random(ROWS, 48, dtype=dtype), random(ROWS, IN, seed=1, dtype=dtype)
        true, scales = (16, 30, 48), (1.0, 2.0, 0.5)
        blocks = ints([(0, 16), (16, 32), (32, 48), (68, 100)])
        before = [random(r, IN, seed=r) if rank_first else random(IN, r, seed=r) for r in true]
        ranks, of = ints(list(true)), torch.tensor(scales, device=DEVICE)

        def run(jobs: list[list[tuple[int, int, int, int]]]) -> list[Tensor]:
            targets = [x.clone() for x in before]
            for each in jobs:
                to = torch.tensor([targets[job[3]].data_ptr() for job in each], device=DEVICE)
                lora.outer(u, v, ints(each), blocks, to, ranks, of, width=48, rank_first=rank_first)
            return targets

        together = run([[(0, 2, 1, 1), (2, 1, 1, 0), (3, 1, 1, 2)]])
        apart = run([[(0, 1, 1, 1)], [(1, 1, 1, 1)], [(2, 1, 1, 0)], [(3, 1, 1, 2)]])
        for owner, (start, stop) in enumerate(((32, 48), (0, 32), (68, 100))):
            part = u[start:stop, : true[owner]].double().T @ v[start:stop].double() * scales[owner]
            expected = before[owner].double() + (part if rank_first else part.T)
            assert relative(together[owner].cpu(), expected.cpu()) < 1e-6
            assert torch.equal(together[owner], apart[owner])

    def test_company_changes_no_bit(self, dtype: torch.dtype) -> None:
        x = random(ROWS, IN, dtype=dtype)
        a = [random(r, IN, seed=r, dtype=dtype) for r in RANKS]
        ranks = ints([*RANKS, 0])
        whole = lora.shrink(x, ints(SEGMENTS), addresses(a), ranks, 48, rank_first=True, rows=32)
        alone = lora.shrink(x[37:], ints([(0, 3, 0)]), addresses(a), ranks, 16, rank_first=True, rows=32)
        assert torch.equal(alone[:3, :16], whole[37:40, :16])


class TestProducts:
    def test_any_strides_and_a_bias(self, dtype: torch.dtype) -> None:
        x, w, b = random(ROWS, IN, dtype=dtype), random(70, IN, seed=1, dtype=dtype), random(70, dtype=dtype)
        expected = x.double() @ w.double().T + b.double()
        assert relative(matmul.matmul(x, w.T, b).cpu(), expected.cpu()) < NEAR[dtype]
        assert relative(matmul.matmul(w, x.T).cpu(), (w.double() @ x.double().T).cpu()) < NEAR[dtype]
        batch = random(3, 20, IN, dtype=dtype)
        assert (
            relative(matmul.matmul(batch, batch.mT).cpu(), (batch.double() @ batch.double().mT).cpu())
            < NEAR[dtype]
        )

    def test_a_row_has_its_bits_alone_and_in_any_company(self, dtype: torch.dtype) -> None:
        x, w = random(ROWS, IN, dtype=dtype), random(70, IN, seed=1, dtype=dtype)
        whole = matmul.matmul(x, w.T)
        for first, n in ((0, 1), (37, 1), (99, 1), (5, 17), (50, 50)):
            assert torch.equal(matmul.matmul(x[first : first + n], w.T), whole[first : first + n])

    def test_experts_have_their_own_weights(self, dtype: torch.dtype) -> None:
        x, w, b = random(ROWS, IN, dtype=dtype), random(4, 70, IN, dtype=dtype), random(4, 70, dtype=dtype)
        y = matmul.grouped(x, w.transpose(1, 2), b, ints(SEGMENTS), 32)
        for start, n, owner in SEGMENTS:
            rows = slice(start, start + n)
            expected = x[rows].double() @ w[owner].double().T + b[owner].double()
            assert relative(y[rows].cpu(), expected.cpu()) < NEAR[dtype]
