"""A model's own products by the CPU kernel: torch's bits, each row by itself, adapters on their own rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.tiny import threads
from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.kernels import linear as kernel
from tinsmith.engine.kernels import lora
from tinsmith.engine.model.lora import AdapterWeights, Layout, Slot

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not kernel.usable(CPU, torch.bfloat16), reason="no compiler, or no bf16 instructions here"
)

# out, in: also what is no multiple of a tile's columns or of a register's pairs
SHAPES = [(64, 64), (100, 48), (17, 30), (130, 1600), (1, 64)]
ROWS = (1, 2, 7, 8, 9, 16, 33, 64, 65, 150)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_double(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_double_precision(shape: tuple[int, int], with_bias: bool) -> None:
    n, k = shape
    weight, bias = random(n, k) / 8, random(n, seed=3) if with_bias else None
    for depth in (k, 32):
        matrix = kernel.pack(weight, bias, depth)
        for rows in ROWS:
            x = random(rows, k, seed=rows)
            y = kernel.run(x, [matrix], kernel.segments([]))
            expected = in_double(x, weight, bias)
            assert y.shape == (rows, n)
            assert float((y.double() - expected).abs().max()) < 4e-3 * float(expected.abs().max())


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_does_not_depend_on_its_company(count: int) -> None:
    n, k = 130, 96
    matrix, x = kernel.pack(random(n, k), random(n, seed=3), 64), random(150, k, seed=1)
    with threads(count):
        whole = kernel.run(x, [matrix], kernel.segments([]))
        for rows in ROWS:
            assert torch.equal(kernel.run(x[:rows], [matrix], kernel.segments([])), whole[:rows])


def test_the_depth_is_found_with_which_the_bits_are_torchs() -> None:
    if "amx_bf16" in Path("/proc/cpuinfo").read_text():
        pytest.skip("another instruction's order of sums")
    for n, k in ((96, 64), (64, 2048), (48, 1000)):
        weight, x = random(n, k, seed=5), random(48, k, seed=6)
        depth = kernel.find_depth(weight, None)
        assert depth
        found = kernel.run(x, [kernel.pack(weight, None, depth)], kernel.segments([]))
        assert torch.equal(found, F.linear(x, weight))


def test_a_product_of_another_order_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.linear
    monkeypatch.setattr(kernel.F, "linear", lambda x, w, b=None: real(x.float(), w.float(), b).bfloat16())
    assert kernel.find_depth(random(64, 2048), None) == 0


def adapter(slots: list[Slot], rank: int, seed: int) -> AdapterWeights:
    layout = Layout(slots, LoraSpec(rank=rank, seed=seed))
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    return AdapterWeights(layout, flat, torch.bfloat16, CPU)


@pytest.mark.parametrize("count", [1, 2])
def test_adapters_do_what_the_trainers_kernel_does(count: int) -> None:
    """Two parts of one output, adapters of different ranks, rows without one between them."""
    slots = [Slot("a", "attn", 96, 40, 0), Slot("b", "attn", 96, 98, 0)]
    one, other = adapter(slots, 8, 1), adapter([slots[1]], 72, 2)
    weight, x = random(138, 96), random(90, 96, seed=4)
    matrices = [kernel.pack(weight[:40], None, 96), kernel.pack(weight[40:], None, 96)]
    spans = [(0, 3, one), (3, 40, other), (71, 90, one)]
    where = kernel.segments([(a, b, w.table(("a", "b"))) for a, b, w in spans])
    with threads(count):
        y = kernel.run(x, matrices, where)
        expected = kernel.run(x, matrices, kernel.segments([]))
        for start, stop, weights in spans:
            for name, columns in (("a", slice(0, 40)), ("b", slice(40, 138))):
                packed = weights.packed(name, backward=False)
                if packed is None:
                    continue
                plan = lora.Plan([(start, stop, weights.rank)])
                plan.run(x, [packed], expected[:, columns])
    assert torch.equal(y, expected)
