"""The padding that makes rows independent of their number is found out on the machine itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.test_training import TestExactness as TrainingExactness
from tests.engine.tiny import load
from tinsmith.engine import exactness
from tinsmith.engine.exactness import failures, settle
from tinsmith.engine.model.attention import PADDING

Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = PADDING.rows
    yield
    PADDING.rows = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "qwen3-moe"])
def test_this_machine_needs_no_more_than_sixteen(folder: Folder, family: str, dtype: torch.dtype) -> None:
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("promised for x86 with AVX-512")
    assert settle([load(folder(family), dtype)], 64) == {f"tests/{family}": []}
    assert PADDING.rows == 16


def test_a_machine_that_needs_more_gets_more(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if products were row-invariant in multiples of 32 only: the engine stays exact with that padding."""
    real = exactness._rows_hold
    monkeypatch.setattr(exactness, "_rows_hold", lambda x, product: PADDING.rows >= 32 and real(x, product))
    assert settle([load(folder("qwen3"))], 64) == {"tests/qwen3": []}
    assert PADDING.rows == 32
    TrainingExactness().seven_other_tenants(load(folder("qwen3")))


def test_what_no_padding_repairs_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "_rows_hold", lambda x, product: x.shape[1] != 128)
    (found,) = settle([load(folder("qwen3"))], 64).values()
    assert any("linear 128 -> 64" in reason for reason in found)
    assert PADDING.rows == 16


def test_the_probe_sees_a_product_that_looks_at_its_neighbours(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        exactness.F, "linear", lambda x, w, *rest: real(x, w, *rest) * (1 + 1e-6 * (x.shape[0] > 100))
    )
    assert any(reason.startswith("linear") for reason in failures(load(folder("qwen3")), 32))
