"""Adapters' products by the CPU kernel: as in double precision, and each row's own affair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.tiny import relative, threads
from tinsmith.engine.kernels import lora as kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="no compiler, or no bf16 instructions here")

# rows, in, out, rank: also what is no multiple of a register's width or of a block
SHAPES = [(96, 64, 128, 16), (33, 80, 206, 96), (50, 48, 100, 32), (7, 512, 34, 48), (530, 30, 64, 16)]
ROUNDING = 4e-3  # bf16 keeps 8 bits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def factors(inner: int, outer: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random(rank, inner, seed=seed + 1) / 8, random(outer, rank, seed=seed + 2) / 4


def packs(a: Tensor, b: Tensor, scale: float = 1.0) -> kernel.Packs:
    rank = len(a)
    made = kernel.Packs([("w", a.shape[1], len(b))], -(-rank // 16) * 16, backward=True)
    made.fill({"w": (a.float(), b.float())}, rank, scale)
    return made


def backward(made: kernel.Packs) -> kernel.Packed:
    packed = made.backward("w")
    assert packed is not None
    return packed


def run(x: Tensor, packed: kernel.Packed, rank: int, y: Tensor) -> Tensor:
    """z [rows, rank] of one adapter, alone; y is added to."""
    return kernel.Plan([(0, len(x), rank)]).run(x, [packed], y).view(len(x), rank)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions_are_those_of_double_precision(shape: tuple[int, int, int, int]) -> None:
    rows, inner, outer, rank = shape
    a, b = factors(inner, outer, rank)
    made = packs(a, b)
    x, dy = random(rows, inner), random(rows, outer, seed=9)
    y, dx = random(rows, outer, seed=5), random(rows, inner, seed=6)
    to_y, to_dx = y.clone(), dx.clone()
    z = run(x, made.forward("w"), rank, to_y)
    dz = run(dy, backward(made), rank, to_dx)
    assert relative(z, x.double() @ a.double().T) < ROUNDING
    assert relative(to_y, y.double() + z.double() @ b.double().T) < ROUNDING
    assert relative(dz, dy.double() @ b.double()) < ROUNDING
    assert relative(to_dx, dx.double() + dz.double() @ a.double()) < ROUNDING


@pytest.mark.parametrize("rank", [1, 16, 30])
def test_both_packs_hold_the_rounded_matrices_the_rank_padded(rank: int) -> None:
    inner, outer = 70, 34
    a, b = torch.randn(rank, inner), torch.randn(outer, rank)
    made = packs(a, b, scale=3.0)
    padding = made.padded - rank
    wanted_a = torch.nn.functional.pad(a.bfloat16(), (0, 0, 0, padding))
    wanted_b = torch.nn.functional.pad((b * 3).bfloat16(), (0, padding))
    assert torch.equal(made.matrices("w")[0], wanted_a)
    assert torch.equal(made.matrices("w")[1], wanted_b)
    dy, dx = random(5, outer), torch.zeros(5, inner, dtype=torch.bfloat16)
    dz = run(dy, backward(made), made.padded, dx)
    assert relative(dz, dy.double() @ wanted_b.double()) < ROUNDING
    assert relative(dx, dz.double() @ wanted_a.double()) < ROUNDING


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_company(shape: tuple[int, int, int, int]) -> None:
    """Beside rows of another adapter, whose rank is another, and rows of none."""
    rows, inner, outer, rank = shape
    made, other = packs(*factors(inner, outer, rank)), packs(*factors(inner, outer, 16, seed=40))
    x, y = random(rows, inner), random(rows, outer, seed=5)
    with threads(2):
        whole = y.clone()
        z = run(x, made.forward("w"), rank, whole)
        for first, count in ((0, 1), (3, 4), (0, rows - 1)):
            part = slice(first, first + count)
            beside = torch.cat([random(23, inner, seed=8), x[part]])
            out = torch.cat([random(23, outer, seed=8), y[part]])
            untouched = out[20:23].clone()
            plan = kernel.Plan([(0, 20, 16), (23, 23 + count, rank)])
            flat = plan.run(beside, [other.forward("w"), made.forward("w")], out)
            assert torch.equal(out[23:], whole[part])
            assert torch.equal(flat[20 * 16 :].view(count, rank), z[part])
            assert torch.equal(out[20:23], untouched)


def test_columns_of_a_wider_output_are_left_alone() -> None:
    y = random(20, 96)
    before = y.clone()
    made = packs(*factors(32, 40, 16))
    run(random(20, 32), made.forward("w"), 16, y[:, 24:64])
    assert torch.equal(y[:, :24], before[:, :24])
    assert torch.equal(y[:, 64:], before[:, 64:])
    assert not torch.equal(y[:, 24:64], before[:, 24:64])


@pytest.mark.parametrize("rank", [3, 16, 30])
@pytest.mark.parametrize("shape", [(96, 64, 128), (50, 48, 100), (1200, 30, 66)], ids=str)
def test_gradients_are_those_of_double_precision_block_after_block(
    shape: tuple[int, int, int], rank: int
) -> None:
    """Together, by itself, and as the second adapter of a pass."""
    rows, inner, outer = shape
    padded = -(-rank // 16) * 16
    x, dy = random(rows, inner), random(rows, outer, seed=1)
    z, dz = random(rows, padded, seed=2), random(rows, padded, seed=3)
    a, b = torch.randn(rank, inner), torch.randn(outer, rank)
    expected_a = a.double() + dz[:, :rank].double().T @ x.double()
    expected_b = b.double() + 0.5 * dy.double().T @ z[:, :rank].double()
    together, apart = (a.clone(), b.clone()), (a.clone(), b.clone())
    cut = rows // 4 * 2
    parts = [(0, cut), (cut, rows)]

    def add(blocks: list[tuple[int, int]], into: tuple[Tensor, Tensor]) -> None:
        plan = kernel.Plan([(0, rows, padded)], [(0, *block, rank, 0.5) for block in blocks])
        to = [(into[0].data_ptr(), into[1].data_ptr())] * len(blocks)
        plan.add_gradients(x, dz.flatten(), dy, z.flatten(), to)

    with threads(2):
        add(parts, together)
    for part in parts:
        add([part], apart)
    assert relative(together[0], expected_a) < 1e-6
    assert relative(together[1], expected_b) < 1e-6
    assert torch.equal(together[0], apart[0])
    assert torch.equal(together[1], apart[1])

    second = (a.clone(), b.clone())
    plan = kernel.Plan([(0, 10, 16), (10, 10 + rows, padded)], [(1, 10, 10 + rows, rank, 0.5)])
    plan.add_gradients(
        torch.cat([random(10, inner), x]), torch.cat([random(160), dz.flatten()]),
        torch.cat([random(10, outer), dy]), torch.cat([random(160), z.flatten()]),
        [(second[0].data_ptr(), second[1].data_ptr())],
    )  # fmt: skip
    assert relative(second[0], expected_a) < 1e-6
    assert relative(second[1], expected_b) < 1e-6
