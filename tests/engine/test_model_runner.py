"""A step that is taken again in place gives what a step that is built anew gives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.test_sampler import PLENTY, run, sample
from tests.engine.tiny import load, make_run, tokens
from tinsmith.engine.kernels import linear
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model_runner import ModelRunner, Step
from tinsmith.engine.sampler import Sampler

Folder = Callable[[str], Path]
pytestmark = pytest.mark.skipif(
    not linear.usable(torch.device("cpu"), torch.bfloat16), reason="no compiler, or no bf16 instructions here"
)


@pytest.mark.parametrize("pages", [PLENTY, None], ids=["plenty", "tight"])
def test_a_step_in_place_has_the_bits_of_one_built_anew(
    folder: Folder, pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that come and go, begin pages, outgrow their places, make room and come back; adapters in
    turns, so that rows do not stand in the order in which sequences run."""
    model = load(folder("qwen3"), torch.bfloat16)
    weights = [make_run(model, 8, seed=1).weights, None, make_run(model, 4, seed=2).weights]
    work = [
        (sample("long", tokens(60, 1), max_tokens=330, stop=(), seed=1, num_samples=2), weights[0]),
        (sample("greedy", tokens(5, 2), max_tokens=90, stop=(), temperature=0.0), weights[1]),
        (sample("cut", tokens(70, 3), max_tokens=140, stop=(), top_k=9, temperature=0.8), weights[2]),
        (sample("shown", tokens(33, 4), max_tokens=40, stop=(), top_p=0.9, topk_sample=3), weights[0]),
    ]
    room = pages or 12 * PagePool(model, 0).page_bytes
    real, taken = ModelRunner._again, {"in place": 0, "anew": 0}

    def again(self: ModelRunner, *args: object) -> Step | None:
        step = real(self, *args)  # type: ignore[arg-type]
        taken["anew" if step is None else "in place"] += 1
        return step

    monkeypatch.setattr(ModelRunner, "_again", again)
    sampler = Sampler(model, room)
    ours = run(sampler, *work, gap=7)
    assert (sampler.metrics.put_off > 0) is (pages is None), "the test wants sequences that make room"
    assert taken["in place"] > 200
    assert taken["anew"] > 8
    monkeypatch.setattr(ModelRunner, "_again", lambda *_: None)
    for mine, anew in zip(ours, run(Sampler(model, PLENTY), *work), strict=True):
        for a, b in zip(mine.sequences, anew.sequences, strict=True):
            assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)


def test_what_has_ended_is_held_by_nobody(folder: Folder) -> None:
    """An adapter that is released gives its memory back at once, not with the next request."""
    model = load(folder("qwen3"), torch.bfloat16)
    sampler = Sampler(model, PLENTY)
    for ends_by in ("itself", "a cancel"):
        weights = make_run(model, 8).weights
        held = weakref.ref(weights)
        sampler.add(sample("x", tokens(9, 1), max_tokens=20, stop=()), weights, lambda _: None)
        for _ in range(5):
            sampler.step()
        assert sampler.running
        if ends_by == "a cancel":
            sampler.cancel("x")
        while sampler.step():
            pass
        sampler.release(weights)
        del weights
        gc.collect()
        assert held() is None, f"after it ended by {ends_by}"
