"""Shares of the device: nobody runs slower than its weight's part of what it would do alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.test_sampler import PLENTY, sample
from tests.engine.tiny import load, request, tokens
from tinsmith.engine import sample_scheduler as module
from tinsmith.engine.commands import (
    AdamParams,
    CreateAdapter,
    EngineConfig,
    ForwardBackward,
    LoraSpec,
    ModelSource,
    OptimStep,
    Reply,
    Share,
)
from tinsmith.engine.engine import Engine
from tinsmith.engine.passes import fill_pass
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.shares import HOLD, Costs, Shares
from tinsmith.engine.training import TrainingJob

Folder = Callable[[str], Path]
A, B = Share("a"), Share("b")


class Machine:
    """A device on which a step of n rows takes base + n * row seconds, and keys that want so many rows."""

    def __init__(self, base: float, row: float, wants: dict[Share, int]) -> None:
        self.now = 0.0
        self.shares = Shares(clock=lambda: self.now)
        self.base, self.row, self.wants = base, row, wants
        self.steps: Counter[str] = Counter()
        for share in wants:
            self.shares.enter(share)

    def alone(self, share: Share) -> float:
        return self.base + self.row * self.wants[share]

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            rows = {s: n for s, n in self.wants.items() if self.shares.may(s.key)}
            assert rows, "the device stands still"
            took = self.base + self.row * sum(rows.values())
            self.now += took
            self.steps.update(s.key for s in rows)
            self.shares.charge(took, {s.key: self.alone(s) for s in rows})

    def speed(self, share: Share) -> float:
        """Of what it would do alone."""
        return self.steps[share.key] * self.alone(share) / self.now


def test_a_steady_key_keeps_half_of_its_speed_beside_a_flood() -> None:
    machine = Machine(0.01, 0.001, {A: 1, B: 255})
    machine.run(60.0)
    assert machine.speed(A) == pytest.approx(0.5, abs=0.02)
    assert machine.speed(B) > 0.5


def test_weights_are_parts() -> None:
    heavy = Share("a", 3.0)
    machine = Machine(0.01, 0.001, {heavy: 1, B: 255})
    machine.run(60.0)
    assert machine.speed(heavy) == pytest.approx(0.75, abs=0.02)
    assert machine.speed(B) > 0.25


def test_where_batching_serves_everybody_nobody_stands_back() -> None:
    """Two keys with few rows each: together they are both faster than half."""
    machine = Machine(0.01, 0.0001, {A: 1, B: 16})
    machine.run(60.0)
    assert machine.steps["a"] == machine.steps["b"]


def test_three_keys_and_no_economy_of_batching() -> None:
    c = Share("c")
    machine = Machine(0.0, 0.001, {A: 10, B: 100, c: 1000})
    machine.run(300.0)
    for share in (A, B, c):
        assert machine.speed(share) == pytest.approx(1 / 3, abs=0.03)


def test_who_comes_back_has_not_saved_up_and_owes_nothing() -> None:
    machine = Machine(0.0, 0.001, {A: 100, B: 100})
    machine.run(5.0)
    machine.shares.leave("a")
    del machine.wants[A]
    machine.run(65.0)
    machine.steps.clear()
    machine.wants[A] = 100
    machine.shares.enter(A)
    machine.run(67.0)
    assert abs(machine.steps["a"] - machine.steps["b"]) <= 2


def test_a_key_that_asks_for_a_little_again_and_again_gets_its_half() -> None:
    """It is away for a moment after each answer, and comes back behind a step of the other's."""
    shares = Shares(clock=lambda: now)
    now, mine, step = 0.0, 0, 0.1
    shares.enter(B)
    for _ in range(100):
        now += step  # the other one's step, during which A comes back
        shares.charge(step, {"b": step})
        shares.enter(A)
        served = False
        while not served:
            keys = [key for key in ("a", "b") if shares.may(key)]
            now += step * len(keys)
            shares.charge(step * len(keys), dict.fromkeys(keys, step))
            served = "a" in keys
        mine += 1
        shares.leave("a")
    assert mine * step / now >= 0.45


class Client:
    """A device on which one key's flood of 128 rows never ends, and another key asks for `steps` steps of
    four rows, and for as much again a moment after it has them. A step takes 1.4 ms, and 0.085 ms a row."""

    GAP = 0.007  # seconds between an answer and the next request
    LIMIT = 0.008  # seconds of a step

    def __init__(self, weight: float, steps: int) -> None:
        self.now, self.steps, self.costs = 0.0, steps, Costs()
        self.shares = Shares(clock=lambda: self.now)
        self.share = Share("a", weight)
        self.flood = 0  # rows of it
        self.shares.enter(B)

    @property
    def alone(self) -> float:
        return self.steps * (0.0014 + 4 * 0.000085)

    def run(self, requests: int) -> list[float]:
        """Seconds of each request."""
        found: list[float] = []
        left, due = 0, 0.05
        while len(found) < requests:
            if not left and self.now >= due:
                self.shares.enter(self.share)
                left = self.steps
            wanted = {"a": 4 if left else 0, "b": 128}
            wanted = {key: rows for key, rows in wanted.items() if rows and self.shares.may(key)}
            rows = self.shares.parts(self.costs.within(self.LIMIT), wanted)
            whole = sum(rows.values())
            took = 0.0014 + 0.000085 * whole
            self.now += took
            self.costs.observe(whole, took)
            self.flood += rows.get("b", 0)
            self.shares.charge(took, {k: self.costs.estimate(n, whole, took) for k, n in rows.items()})
            if "a" in rows:
                left -= 1
                if not left:
                    found.append(self.now - due)
                    self.shares.leave("a")
                    due = self.now + self.GAP
        return found


@pytest.mark.parametrize("steps", [1, 3, 10, 33])
@pytest.mark.parametrize("weight", [1, 3])
def test_requests_of_any_length_are_no_slower_than_their_share(weight: int, steps: int) -> None:
    """But for one step that had begun when they came, which later ones are made up for."""
    client = Client(weight, steps)
    took = client.run(60)[10:]
    bound = (weight + 1) / weight * client.alone
    assert sum(took) / len(took) <= max(bound, client.alone + client.LIMIT / 2)
    assert max(took) <= bound + client.LIMIT


@pytest.mark.parametrize("weight", [1, 3])
def test_the_flood_has_its_own_part_meanwhile(weight: int) -> None:
    client = Client(weight, 33)
    client.run(60)
    alone = 128 / (0.0014 + 128 * 0.000085)
    assert client.flood / client.now >= 0.9 * alone / (weight + 1)


def test_what_is_owed_for_a_step_is_taken_from_who_had_it() -> None:
    """So that many short requests cannot make the one who asks, or the other, owed more and more."""
    client = Client(1, 2)
    client.run(200)
    assert abs(sum(account.lacks for account in client.shares._accounts.values())) < 0.05


def test_nobody_is_owed_a_step_that_was_over_before_the_other_came() -> None:
    shares = Shares(clock=lambda: 0.0)
    shares.enter(B)
    shares.charge(1.0, {"b": 1.0})
    shares.leave("b")
    shares.enter(B)
    shares.enter(A)
    assert shares.may("a")
    assert shares.may("b")


def test_what_was_gained_is_not_saved_up() -> None:
    """Two keys that ran together for long, to the gain of both, are even afterwards."""
    shares = Shares(clock=lambda: 0.0)
    shares.enter(A)
    shares.enter(B)
    for _ in range(1000):
        shares.charge(0.01, {"a": 0.01, "b": 0.01})
    shares.charge(0.01, {"b": 0.01})
    assert shares.may("a")
    assert not shares.may("b")


class TestWaiting:
    """For a key that is about to come back, before a pass is begun that it would stand behind."""

    def came_again(self, gap: float, *, waits: bool = True) -> tuple[Shares, list[float]]:
        """A key that asked ten times, each time so long after its answer, beside one that always has work."""
        now = [0.0]
        shares = Shares(clock=lambda: now[0])
        shares.enter(B)
        for _ in range(10):
            shares.enter(A, waits=waits)
            now[0] += 0.1
            shares.charge(0.1, {"b": 0.1})  # so that it lacks time
            shares.leave("a")
            now[0] += gap
        now[0] -= gap
        return shares, now

    def test_who_comes_back_at_once_is_waited_for_a_little_longer_than_that(self) -> None:
        shares, now = self.came_again(0.010)
        assert 0.010 <= shares.expects() <= HOLD
        now[0] += 0.025
        assert shares.expects() <= 0

    def test_who_takes_its_time_is_not(self) -> None:
        assert self.came_again(0.050)[0].expects() == 0

    def test_nor_who_could_be_served_within_the_pass(self) -> None:
        assert self.came_again(0.010, waits=False)[0].expects() == 0

    def test_nor_at_the_cost_of_who_lacks_time(self) -> None:
        shares, _ = self.came_again(0.010)
        shares.idle(60.0)
        assert shares.expects() == 0

    def test_what_the_device_stood_still_is_owed_to_those_who_had_work(self) -> None:
        shares, _ = self.came_again(0.010)
        shares.idle(60.0)
        shares.enter(A)
        assert shares.may("b")
        assert not shares.may("a")


def test_parts_of_a_step_are_by_weight_and_leave_nothing_unused() -> None:
    shares = Shares()
    for share in (Share("a", 3.0), B, Share("c")):
        shares.enter(share)
    assert shares.parts(80, {"a": 100, "b": 100}) == {"a": 60, "b": 20}
    assert shares.parts(80, {"a": 4, "b": 100, "c": 100}) == {"a": 4, "b": 38, "c": 38}
    assert shares.parts(1, {"a": 9, "b": 9}) == {"a": 1, "b": 1}


def test_a_single_key_is_never_held_back() -> None:
    shares = Shares(clock=lambda: 0.0)
    for _ in range(3):
        shares.enter(A)
        shares.charge(1.0, {"a": 0.1})
        assert shares.may("a")
    assert not shares.several
    assert not shares.contended


def test_costs_are_as_measured_and_at_least_in_proportion() -> None:
    costs = Costs()
    assert costs.estimate(1, 10, 1.0) == pytest.approx(0.1)
    costs.observe(1, 0.3)
    assert costs.estimate(1, 10, 1.0) == pytest.approx(0.3)
    assert costs.estimate(1, 2, 0.2) == pytest.approx(0.2)  # never more than the whole step


def test_costs_between_two_sizes_lie_between_them() -> None:
    costs = Costs()
    costs.observe(16, 0.002)
    costs.observe(64, 0.008)
    assert costs.seconds(40) == pytest.approx(0.005)
    assert costs.seconds(128) == pytest.approx(0.016)


def test_a_disturbed_first_step_does_not_keep_steps_small() -> None:
    costs = Costs()
    costs.observe(20, 0.5)
    costs.observe(4, 0.002)
    rows = 0
    for _ in range(20):
        rows = costs.within(0.008)
        costs.observe(rows, 0.0014 + 0.000085 * rows)
    assert 60 <= rows <= 100


def test_where_many_rows_take_as_long_as_few_steps_are_not_kept_small() -> None:
    costs = Costs()
    for rows in (1, 16, 256):
        costs.observe(rows, 0.02 + 1e-5 * rows)
    assert costs.within(0.008) >= 256


class TestSampling:
    def test_a_limited_step_takes_those_first_that_have_waited_longest(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY, Shares())
        sampler._costs.observe(16, 0.008)
        for i in range(24):
            sampler.shares.enter(B)
            sampler.add(sample(f"b{i}", tokens(8, i), max_tokens=30, stop=(), share=B), None, lambda _: None)
        sampler.step()  # by itself nobody is limited
        assert [len(s.output) for s in sampler.running] == [1] * 24
        for _ in range(3):
            plan = sampler.scheduler.plan(512, 16)
            assert len(plan) == 16
            sampler._advance(plan)
        assert [len(s.output) for s in sampler.running] == [3] * 24

    def flooded(self, folder: Folder, flood: int, share: Share = A) -> tuple[Sampler, list[Reply]]:
        """A sampler with many samples of one key, on which another one comes in last."""
        shares = Shares()
        sampler = Sampler(load(folder("qwen3")), PLENTY, shares)
        for i in range(flood):
            shares.enter(B)
            command = sample(f"b{i}", tokens(20, i), max_tokens=200, stop=(), share=B)
            sampler.add(command, None, lambda _: shares.leave("b"))
        sampler.step()
        replies: list[Reply] = []
        shares.enter(share)
        sampler.add(sample("a", tokens(20, 1000), max_tokens=8, stop=(), share=share), None, replies.append)
        return sampler, replies

    def test_a_full_house_makes_way_for_another_key(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "RUNNING", 8)
        sampler, replies = self.flooded(folder, 12)
        assert len(sampler.running) == 8
        steps = 0
        while not replies:
            sampler.step()
            steps += 1
        assert steps <= 2 * 8
        assert [s.key for s in sampler.running].count("b") == 8 or len(sampler.waiting)

    def test_a_full_cache_makes_way_for_another_key(self, folder: Folder) -> None:
        shares = Shares()
        sampler = Sampler(load(folder("qwen3")), 0, shares)
        sampler.pool.capacity = 12
        for i in range(8):
            shares.enter(B)
            command = sample(f"b{i}", tokens(60, i), max_tokens=60, stop=(), share=B)
            sampler.add(command, None, lambda _: shares.leave("b"))
        for _ in range(3):
            sampler.step()
        shares.enter(A)
        replies: list[Reply] = []
        sampler.add(sample("a", tokens(100, 9), max_tokens=4, stop=(), share=A), None, replies.append)
        steps = 0
        while not replies:
            sampler.step()
            steps += 1
        assert steps < 20

    def test_long_prompts_of_another_key_do_not_take_all_of_the_prefill(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(module.PREFILL_ROWS, "cpu", 64)
        shares = Shares()
        sampler = Sampler(load(folder("qwen3")), PLENTY, shares)
        for i in range(4):
            shares.enter(B)
            sampler.add(sample(f"b{i}", tokens(400, i), stop=(), share=B), None, lambda _: None)
        sampler.step()
        shares.enter(A)
        replies: list[Reply] = []
        sampler.add(sample("a", tokens(64, 9), max_tokens=1, stop=(), share=A), None, replies.append)
        steps = 0
        while not replies:
            sampler.step()
            steps += 1
        assert steps <= 4

    def test_company_of_other_keys_changes_no_result(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone, replies = self.flooded(folder, 0)
        while not replies:
            alone.step()
        monkeypatch.setattr(module, "RUNNING", 4)
        crowded, others = self.flooded(folder, 10)
        while not others:
            crowded.step()
        assert replies[0].payload == others[0].payload  # type: ignore[union-attr]


class TestTraining:
    @pytest.fixture
    def even(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody lacks anything: what the decoding of a request takes here is not what is asked."""
        monkeypatch.setattr(Shares, "charge", lambda *_: None)

    def engine(self, folder: Folder, tmp_path: Path) -> Engine:
        source = ModelSource("m", str(folder("qwen3")))
        return Engine(EngineConfig((source,), str(tmp_path), device="cpu", dtype="fp32", memory=1 << 30))

    def fill(self, engine: Engine) -> list[tuple[TrainingJob, int]]:
        return fill_pass(engine.runs, engine.residents.turn, engine.shares, 512, engine.budget.passes)

    def submit(self, engine: Engine, run: str, share: Share, requests: int, length: int) -> list[Reply]:
        replies: list[Reply] = []
        engine.submit(CreateAdapter(run, "m", LoraSpec(4, 1), share), lambda _: None)
        body = request([tokens(length, 3)])
        for seq_id in range(1, requests + 1):
            engine.submit(ForwardBackward(run, seq_id, body, share=share), replies.append)
        return replies

    @pytest.mark.usefixtures("even")
    def test_a_flood_of_many_runs_has_half_of_a_pass_and_no_more(
        self, folder: Folder, tmp_path: Path
    ) -> None:
        engine = self.engine(folder, tmp_path)
        for i in range(6):
            self.submit(engine, f"b{i}", B, 2, 64)
        self.submit(engine, "a", A, 2, 64)
        engine._carry_out(math.inf)
        rows = Counter[str]()
        for job, index in self.fill(engine):
            rows[job.key] += job.cuts[index].rows
        assert rows == {"a": 128, "b": 128}

    @pytest.mark.usefixtures("even")
    def test_weights_count_in_a_pass(self, folder: Folder, tmp_path: Path) -> None:
        engine = self.engine(folder, tmp_path)
        heavy = Share("b", 2.0)
        for i in range(6):
            self.submit(engine, f"b{i}", heavy, 2, 64)
        self.submit(engine, "a", A, 1, 64)
        engine._carry_out(math.inf)
        keys = Counter(job.key for job, _ in self.fill(engine))
        assert keys == {"a": 1, "b": 2}

    def test_everything_is_answered_and_the_books_are_even(self, folder: Folder, tmp_path: Path) -> None:
        engine = self.engine(folder, tmp_path)
        answers = [self.submit(engine, f"b{i}", B, 3, 40) for i in range(4)]
        answers.append(self.submit(engine, "a", A, 3, 40))
        done: list[Reply] = []
        engine.submit(OptimStep("a", 4, AdamParams()), done.append)
        engine.submit(ForwardBackward("a", 5, b"nonsense", share=A), done.append)
        engine.submit(ForwardBackward("none", 1, b""), done.append)
        engine.submit(sample("s", [], share=A), done.append)  # refused at once
        for _ in range(200):
            if not engine.step():
                break
        assert [len(replies) for replies in answers] == [3] * 5
        assert len(done) == 4
        assert not engine.shares._active
