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


def forward(a: Tensor, b: Tensor) -> kernel.Packed:
    return packs(a, b).forward("w")


def backward(a: Tensor, b: Tensor) -> kernel.Packed:
    packed = packs(a, b).backward("w")
    assert packed is not None
    return packed


def chain(x: Tensor, packed: kernel.Packed, rank: int, y: Tensor) -> kernel.Chain:
    return kernel.Chain(x, packed, torch.empty(len(x), rank, dtype=torch.bfloat16), y)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions_are_those_of_double_precision(shape: tuple[int, int, int, int]) -> None:
    rows, inner, outer, rank = shape
    a, b = factors(inner, outer, rank)
    x, dy = random(rows, inner), random(rows, outer, seed=9)
    y, dx = random(rows, outer, seed=5), random(rows, inner, seed=6)
    out = chain(x, forward(a, b), rank, y.clone())
    back = chain(dy, backward(a, b), rank, dx.clone())
    kernel.run([out, back])
    assert out.y is not None
    assert back.y is not None
    assert relative(out.z, x.double() @ a.double().T) < ROUNDING
    assert relative(out.y, y.double() + out.z.double() @ b.double().T) < ROUNDING
    assert relative(back.z, dy.double() @ b.double()) < ROUNDING
    assert relative(back.y, dx.double() + back.z.double() @ a.double()) < ROUNDING


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
    dy = random(5, outer)
    packed = made.backward("w")
    assert packed is not None
    back = chain(dy, packed, made.padded, torch.zeros(5, inner, dtype=torch.bfloat16))
    kernel.run([back])
    assert back.y is not None
    assert relative(back.z, dy.double() @ wanted_b.double()) < ROUNDING
    assert relative(back.y, back.z.double() @ wanted_a.double()) < ROUNDING


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_company(shape: tuple[int, int, int, int]) -> None:
    rows, inner, outer, rank = shape
    packed = forward(*factors(inner, outer, rank))
    other = forward(*factors(inner, outer, 16, seed=40))
    x, y = random(rows, inner), random(rows, outer, seed=5)
    with threads(2):
        whole = chain(x, packed, rank, y.clone())
        kernel.run([whole])
        for first, count in ((0, 1), (3, 4), (0, rows - 1)):
            part = slice(first, first + count)
            alone = chain(x[part], packed, rank, y[part].clone())
            beside = chain(random(20, inner, seed=8), other, 16, random(20, outer, seed=8))
            kernel.run([beside, alone])
            assert torch.equal(alone.y, whole.y[part])
            assert torch.equal(alone.z, whole.z[part])


def test_columns_of_a_wider_output_are_left_alone() -> None:
    y = random(20, 96)
    before = y.clone()
    kernel.run([chain(random(20, 32), forward(*factors(32, 40, 16)), 16, y[:, 24:64])])
    assert torch.equal(y[:, :24], before[:, :24])
    assert torch.equal(y[:, 64:], before[:, 64:])
    assert not torch.equal(y[:, 24:64], before[:, 24:64])


@pytest.mark.parametrize("rank", [3, 16, 30])
@pytest.mark.parametrize("shape", [(96, 64, 128), (50, 48, 100), (1200, 30, 66)], ids=str)
def test_gradients_are_those_of_double_precision_block_after_block(
    shape: tuple[int, int, int], rank: int
) -> None:
    rows, inner, outer = shape
    padded = -(-rank // 16) * 16
    x, dy = random(rows, inner), random(rows, outer, seed=1)
    z, dz = random(rows, padded, seed=2), random(rows, padded, seed=3)
    a, b = torch.randn(rank, inner), torch.randn(outer, rank)
    expected_a = a.double() + dz[:, :rank].double().T @ x.double()
    expected_b = b.double() + 0.5 * dy.double().T @ z[:, :rank].double()
    together, apart = (a.clone(), b.clone()), (a.clone(), b.clone())
    cut = rows // 4 * 2
    parts = [slice(0, cut), slice(cut, rows)]

    def block(p: slice, into: tuple[Tensor, Tensor]) -> kernel.Outer:
        addresses = (t.data_ptr() for t in into)
        return kernel.Outer(x[p], dz[p], dy[p], z[p], *addresses, rank, 0.5)

    with threads(2):
        kernel.add_gradients([block(p, together) for p in parts])
    for p in parts:
        kernel.add_gradients([block(p, apart)])
    assert relative(together[0], expected_a) < 1e-6
    assert relative(together[1], expected_b) < 1e-6
    assert torch.equal(together[0], apart[0])
    assert torch.equal(together[1], apart[1])
