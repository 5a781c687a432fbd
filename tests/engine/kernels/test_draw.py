"""Tokens drawn by the CPU kernel: those of torch's sorted and summed probabilities, each row by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.tiny import threads
from tinsmith.engine.commands import SampleParams
from tinsmith.engine.kernels import draw as kernel
from tinsmith.engine.kernels.library import library
from tinsmith.engine.sampling import choose, sample

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler here")

CUTS = [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.8}]
CUTS += [{"top_k": 10_000}, {"top_p": 0.9999}]


def logits(vocab: int, dtype: torch.dtype, spread: float = 3.0, rows: int = 1) -> Tensor:
    return (spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)


def params(**cut: float) -> SampleParams:
    return SampleParams(seed=0, max_tokens=1, **cut)  # type: ignore[arg-type]


def tokens(x: Tensor, u: np.ndarray, own: SampleParams) -> np.ndarray:
    return np.array(sample(x.expand(len(u), -1), [own] * len(u), u, 0).tokens)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocab", "spread"), [(1, 1.0), (50, 3.0), (1000, 3.0), (1003, 0.01), (5000, 20.0)])
def test_the_tokens_are_torchs(vocab: int, spread: float, dtype: torch.dtype, cut: dict[str, float]) -> None:
    """But where a number falls between two tokens within rounding."""
    x, own = logits(vocab, dtype, spread), params(**cut)
    u = (np.arange(400) + 0.5) / 400
    expected = np.array(choose(x.float().expand(len(u), -1), [own] * len(u), u))
    assert (tokens(x, u, own) == expected).mean() > 0.99


def test_the_ends_are_the_first_and_the_last_that_have_any_probability() -> None:
    x = torch.full((1, 300), -float("inf"))
    x[0, 70], x[0, 200] = 1.0, 2.0
    u = np.array([0.0, 1 - 2**-53])
    for own in (params(), params(top_p=0.9999), params(top_k=5)):
        found = tokens(x, u, own)
        assert set(found) == {70, 200}
    assert list(tokens(x, u, params())) == [70, 200]


def test_greedy_takes_the_first_of_equals() -> None:
    x = torch.zeros(1, 100)
    x[0, [40, 60]] = 5.0
    assert list(tokens(x, np.array([0.7]), params(temperature=0.0))) == [40]


def test_cuts_of_equals_keep_the_order_of_ids() -> None:
    x, u = torch.zeros(1, 100), np.linspace(0, 0.999, 50)
    assert set(tokens(x, u, params(top_k=3))) == {0, 1, 2}
    assert set(tokens(x, u, params(top_p=0.1))) == set(range(10))


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_does_not_depend_on_its_company(count: int) -> None:
    x = logits(3001, torch.bfloat16, rows=9)
    u = np.random.default_rng(0).random(9)
    some = [params(**cut) for cut in [*CUTS, {"temperature": 0.5}]]  # type: ignore[arg-type]
    with threads(count):
        together = sample(x, some, u, 0)
        for i, own in enumerate(some):
            alone = sample(x[i : i + 1], [own], u[i : i + 1], 0)
            assert (alone.tokens, alone.logprobs) == ([together.tokens[i]], [together.logprobs[i]])


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_harm_nobody(value: float, cut: dict[str, float]) -> None:
    x = logits(100, torch.float32, rows=2)
    x[0, 3:90] = value
    u = np.array([0.5, 0.5])
    found = sample(x, [params(**cut)] * 2, u, 0).tokens
    assert 0 <= found[0] < 100
    assert found[1] == tokens(x[1:], u[:1], params(**cut))[0]


def test_logprobs_are_before_the_cut_and_at_the_temperature() -> None:
    x = logits(500, torch.float32)
    own = params(temperature=0.7, top_k=3)
    found = sample(x, [own], np.array([0.4]), 5)
    table = torch.log_softmax(x / 0.7, -1)[0]
    assert found.logprobs[0] == pytest.approx(float(table[found.tokens[0]]), abs=1e-5)
    assert found.likeliest is not None
    assert found.likeliest[0][0].tolist() == table.topk(5).indices.tolist()


def test_the_kernel_is_what_is_tested() -> None:
    assert kernel.usable(logits(3, torch.bfloat16))
