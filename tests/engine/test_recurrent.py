"""Sequences with a state of their own: company, chunks and lost room change nothing about a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine import test_training
from tests.engine.test_sampler import PLENTY, run, sample
from tests.engine.test_training import sequences, train
from tests.engine.tiny import load, logprobs, make_run, relative, request, tokens
from tests.families import make
from tinsmith.engine import sample_scheduler as module
from tinsmith.engine.exactness import settle
from tinsmith.engine.sampler import Sampler

NAMES = ["Qwen3_5Text", "NemotronH", "KimiLinear", "Gemma2"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("recurrent")

    def get(name: str) -> Path:
        return make(name, root)

    return get


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
class TestRecurrent:
    def test_seven_other_tenants_change_no_bit(
        self, family: Callable[[str], Path], name: str, dtype: torch.dtype
    ) -> None:
        test_training.TestExactness().seven_other_tenants(load(family(name), dtype))

    def test_chunks_of_a_call_give_the_same_outputs_and_the_same_sum(
        self, family: Callable[[str], Path], name: str, dtype: torch.dtype
    ) -> None:
        model, ids = load(family(name), dtype), sequences(2)
        whole, split = make_run(model), make_run(model)
        first = logprobs(train(whole, request(ids)))
        second = [x for part in (ids[:2], ids[2:]) for x in logprobs(train(split, request(part)))]
        for a, b in zip(first, second, strict=True):
            assert relative(a, b) < 1e-6
        assert relative(split.live.gradient, whole.live.gradient) < (1e-6 if dtype is torch.float32 else 1e-2)

    def test_company_and_room_change_no_token_and_no_bit(
        self,
        family: Callable[[str], Path],
        name: str,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = load(family(name), dtype)
        settle([model], 32)
        monkeypatch.setitem(module.PREFILL_ROWS, "cpu", 48)
        weights = make_run(model, 8).weights
        command = sample("me", tokens(140, 1), max_tokens=60, stop=(), seed=5, num_samples=3)
        (alone,) = run(Sampler(model, PLENTY), (command, weights))
        others = [
            (sample(f"o{i}", tokens(20 * i + 5, i), max_tokens=70, stop=(), seed=i), w)
            for i, w in enumerate((None, weights, make_run(model, 4, 9).weights, None))
        ]
        tight = Sampler(model, PLENTY)
        tight.pool.capacity = 9
        put_off: list[object] = []
        real = tight.scheduler.put_off
        monkeypatch.setattr(tight.scheduler, "put_off", lambda s: (put_off.append(s), real(s)))
        beside = run(tight, *others[:2], (command, weights), *others[2:], gap=2)[2]
        assert put_off, "the test wants a sequence that had to make room"
        for a, b in zip(alone.sequences, beside.sequences, strict=True):
            assert a.tokens == b.tokens
            assert a.logprobs == b.logprobs
        assert tight.states is not None
        assert len(tight.states._free) == tight.states.capacity, "a slot was left in use"

    def test_slots_are_waited_for(self, family: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
        model = load(family(name), dtype)
        sampler = Sampler(model, PLENTY)
        assert sampler.states is not None
        sampler.states.capacity = 2
        sampler.states._free = [1, 0]
        command = sample("me", tokens(20, 1), max_tokens=5, stop=(), seed=5, num_samples=5)
        (out,) = run(sampler, (command, None))
        (plenty,) = run(Sampler(model, PLENTY), (command, None))
        assert [s.tokens for s in out.sequences] == [s.tokens for s in plenty.sequences]
