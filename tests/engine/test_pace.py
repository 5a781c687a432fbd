"""Pieces of work that others wait for are as large as the device does in their time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.engine.test_sampler import PLENTY, sample
from tests.engine.tiny import load, tokens
from tinsmith.engine.pace import FIRST_ROWS, LEAST_ROWS, PIECE_SECONDS, Pace
from tinsmith.engine.sampler import Sampler


def test_pieces_follow_what_is_measured() -> None:
    pace = Pace()
    assert pace.rows(8192) == FIRST_ROWS
    pace.observe(4000, 1.0)
    assert pace.rows(8192) == LEAST_ROWS, "never so few that the device idles"
    for _ in range(30):
        pace.observe(4096, 4096 / 100_000)
    assert abs(pace.rows(8192) - 100_000 * PIECE_SECONDS) < 10
    assert pace.rows(1024) == 1024


def test_small_pieces_say_nothing() -> None:
    pace = Pace()
    pace.observe(3, 1.0)
    assert pace.rows(8192) == FIRST_ROWS


def test_prefill_beside_those_who_decode_is_cut_on_a_gpu(folder: Callable[[str], Path]) -> None:
    sampler = Sampler(load(folder("qwen3")), PLENTY)
    sampler.add(sample("decoding", tokens(20, 1), max_tokens=9, stop=()), None, lambda _: None)
    sampler.step()
    sampler.runner.decoder = object()  # type: ignore[assignment]
    sampler._pace.rows = lambda most: min(most, 100)  # type: ignore[method-assign]
    sampler.add(sample("long", tokens(400, 2), max_tokens=1, stop=()), None, lambda _: None)
    sampler.scheduler.admit()
    assert [count for _, count in sampler.scheduler.plan(sampler._prefill_rows())] == [1, 100]
