"""Budgets and limits: what is refused, what waits, and that the answer says which, and until when."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, cast

import pytest
import tinker
from tinker import types

from tests.harness import MODEL, Raw, Server, datum, wait_for
from tinsmith.cli import main
from tinsmith.service.errors import OverBudget, OverLimit
from tinsmith.service.limits import DEFAULT, Limits, Name, Who, read_value
from tinsmith.store import Store

ORG, OTHER = Who("o", "p", "s", "u", "k"), Who("o2", "p2", "s", "u", "k")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limits(clock: Clock, spent: Decimal = Decimal(0), **values: int | str) -> Limits:
    """Limits of one organization; `name__p` is its project p's."""
    made = Limits(cast(Store, None), lambda place: spent, clock)
    split = {tuple(name.split("__")): Decimal(value) for name, value in values.items()}
    made.set_values({("o", key[1] if len(key) > 1 else "", key[0]): value for key, value in split.items()})
    return made


class TestRates:
    def test_a_minutes_worth_and_then_as_it_fills(self, clock: Clock) -> None:
        some = limits(clock, requests_per_minute=60)
        for _ in range(60):
            some.check_call(ORG)
        with pytest.raises(OverLimit) as refused:
            some.check_call(ORG)
        assert refused.value.retry_after == 1
        fields = refused.value.reached.fields()
        assert {name: fields[name] for name in ("limit", "scope", "used", "allowed")} == {
            "limit": "requests_per_minute",
            "scope": "organization",
            "used": "60",
            "allowed": "60",
        }
        some.check_call(OTHER)  # has none
        clock.now += 1.01
        some.check_call(ORG)
        with pytest.raises(
            OverLimit, match="60 of 60 requests in the last minute; there is room again in 1 s"
        ):
            some.check_call(ORG)
        clock.now += 3600
        for _ in range(60):
            some.check_call(ORG)
        with pytest.raises(OverLimit):
            some.check_call(ORG)

    def test_tokens_are_counted_when_they_are_computed_and_debts_are_paid_back(self, clock: Clock) -> None:
        some = limits(clock, tokens_per_minute=600)
        some.begin_sample(ORG)
        some.used_tokens(ORG, 900)
        with pytest.raises(OverLimit, match="tokens_per_minute of your organization is reached: 900 of 600"):
            some.begin_sample(ORG)
        clock.now += 29
        with pytest.raises(OverLimit):
            some.begin_sample(ORG)
        clock.now += 2
        some.begin_sample(ORG)

    def test_a_projects_limit_holds_beside_the_organizations(self, clock: Clock) -> None:
        some = limits(clock, requests_per_minute=3, requests_per_minute__p=2)
        for _ in range(2):
            some.check_call(ORG)
        with pytest.raises(OverLimit, match="your project p is reached: 2 of 2"):
            some.check_call(ORG)
        elsewhere = Who("o", "q", "s", "u", "k")
        some.check_call(elsewhere)
        with pytest.raises(OverLimit, match="your organization is reached: 3 of 3"):
            some.check_call(elsewhere)

    def test_nothing_allowed_is_nothing(self, clock: Clock) -> None:
        some = limits(clock, requests_per_minute=0)
        with pytest.raises(OverLimit, match="0 of 0 requests in the last minute; nothing is allowed"):
            some.check_call(ORG)

    def test_a_limit_that_is_changed_holds_at_once_and_what_was_used_stays_used(self, clock: Clock) -> None:
        some = limits(clock, requests_per_minute=10)
        for _ in range(10):
            some.check_call(ORG)
        some.set_values({("o", "", "requests_per_minute"): Decimal(12)})
        some.check_call(ORG)
        some.check_call(ORG)
        with pytest.raises(OverLimit, match="12 of 12"):
            some.check_call(ORG)

    def test_a_default_holds_for_whoever_has_none_of_its_own(self, clock: Clock) -> None:
        some = limits(clock)
        some.set_values(
            {
                (DEFAULT, "", "samples_in_flight"): Decimal(1),
                ("o", "", "samples_in_flight"): Decimal(2),
            }
        )
        some.begin_sample(OTHER)
        with pytest.raises(OverLimit):
            some.begin_sample(OTHER)
        some.begin_sample(ORG)
        some.begin_sample(ORG)


class TestAtOnce:
    def test_samples_in_flight(self, clock: Clock) -> None:
        some = limits(clock, samples_in_flight=2)
        some.begin_sample(ORG)
        some.begin_sample(ORG)
        with pytest.raises(
            OverLimit, match="2 of 2 samples in flight; there is room as soon as one"
        ) as refused:
            some.begin_sample(ORG)
        assert refused.value.reached.resets_at() is None
        assert refused.value.retry_after == 1
        some.end_sample(ORG)
        some.begin_sample(ORG)

    def test_a_run_that_is_too_many_waits_and_the_one_that_waited_longest_goes_first(
        self, clock: Clock
    ) -> None:
        some = limits(clock, concurrent_runs=1)

        def may(run: str, who: Who = ORG) -> bool:
            return some.pass_training(who, run, tokens=False) is None

        assert may("a")
        assert may("a")
        reached = some.pass_training(ORG, "b", tokens=False)
        assert str(reached).startswith(
            "limit concurrent_runs of your organization is reached: 1 of 1 training runs at a time; there is"
        )
        assert not may("c")
        assert may("x", OTHER)
        some.leave("a")
        assert not may("c")  # b has waited longer
        assert may("b")
        assert not may("c")
        some.leave("b")
        assert may("c")
        some.leave("never was there")

    def test_who_waits_for_its_project_does_not_hold_up_the_others(self, clock: Clock) -> None:
        some = limits(clock, concurrent_runs=2, concurrent_runs__p=1)
        elsewhere = Who("o", "q", "s", "u", "k")
        assert some.pass_training(ORG, "a", tokens=False) is None
        assert some.pass_training(ORG, "b", tokens=False) is not None
        assert some.pass_training(elsewhere, "c", tokens=False) is None

    def test_a_run_that_moves_counts_in_its_new_project_at_once(self, clock: Clock) -> None:
        some = limits(clock, concurrent_runs__p=1, concurrent_runs__q=1)
        elsewhere = Who("o", "q", "s", "u", "k")
        assert some.pass_training(ORG, "a", tokens=False) is None
        assert some.pass_training(ORG, "b", tokens=False) is not None
        some.moved("a", "q")
        assert some.pass_training(ORG, "b", tokens=False) is None
        assert some.pass_training(elsewhere, "c", tokens=False) is not None

    def test_none_at_a_time_is_nothing(self, clock: Clock) -> None:
        with pytest.raises(OverLimit, match="0 of 0 samples in flight; nothing is allowed"):
            limits(clock, samples_in_flight=0).begin_sample(ORG)

    def test_storage(self, clock: Clock) -> None:
        some = limits(clock, storage_gb="0.5", storage_gb__p="0.1")
        assert some.over_storage(ORG, {"p": 99_999_999, "q": 10**8}) is None
        assert str(some.over_storage(ORG, {"p": 10**8})).startswith(
            "limit storage_gb of your project p is reached: 0.1 of 0.1 GB stored; delete checkpoints"
        )
        assert some.over_storage(ORG, {"q": 5 * 10**8}) is not None


def test_a_budget_is_refused_with_the_first_of_next_month(clock: Clock) -> None:
    some = limits(clock, Decimal("12.5"), monthly_spend_usd="12.5")
    with pytest.raises(
        OverBudget, match=r"12.5 of 12.5 dollars spent this month; there is room again"
    ) as refused:
        some.check_spend(ORG)
    resets = refused.value.reached.resets_at()
    assert resets is not None
    assert resets.endswith("-01T00:00:00Z")
    limits(clock, Decimal("12.499999"), monthly_spend_usd="12.5").check_spend(ORG)


def test_a_share_tells_nothing_of_whose_it_is(clock: Clock) -> None:
    some = limits(clock, weight=3)
    assert some.share("o").weight == 3.0
    assert some.share("o2").weight == 1.0
    assert some.share("o").key != some.share("o2").key
    assert "o" not in (some.share("o").key, some.share("o2").key)


def test_whoever_waits_is_woken_by_a_change(clock: Clock) -> None:
    some = limits(clock, concurrent_runs=0)

    async def wait() -> float:
        started = time.monotonic()
        asyncio.get_running_loop().call_later(0.05, some.set_values, {})
        await some.change(30.0)
        return time.monotonic() - started

    assert asyncio.run(wait()) < 5.0


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("monthly_spend", "1", "'monthly_spend' is no limit; known are: monthly_spend_usd"),
        ("monthly_spend_usd", "much", "must be a number, not 'much'"),
        ("monthly_spend_usd", "-1", "must be from 0"),
        ("monthly_spend_usd", "nan", "must be from 0"),
        ("monthly_spend_usd", "0.0000000000001", "more than 12 places"),
        ("concurrent_runs", "1.5", "must be a whole number"),
        ("weight", "0", "must be from 0.001 to 1000"),
        ("weight", "nan", "must be from 0.001 to 1000"),
        ("storage_gb", "9" * 5000, "must be from 0 to 10.15, not 9{40}$"),
    ],
)
def test_a_value_that_is_wrong_says_what_would_be_right(name: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_value(name, text)


def test_a_limit_of_minus_nothing_is_nothing() -> None:
    assert str(read_value("concurrent_runs", "-0")) == "0"


# Against a real server


class Operator:
    """`tinsmith limits` on a server's data folder; what it sets holds within seconds."""

    def __init__(self, server: Server, org: str) -> None:
        self.server = server
        self.org = org
        self.key = server.new_key(org)

    def run(self, *words: str) -> None:
        assert main(["limits", *words, "--org", self.org, "--data", str(self.server.data)]) == 0

    @contextlib.contextmanager
    def limit(self, name: Name, value: int | str) -> Iterator[None]:
        self.run("set", name, str(value))
        time.sleep(1.3)
        yield
        self.run("unset", name)

    @property
    def raw(self) -> Raw:
        return self.server.raw(self.key)


@pytest.fixture(scope="module")
def server(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tiny_model, tmp_path_factory.mktemp("limited") / "data", "--poll-hold", "1")
    yield made.start()
    made.end()


def sampler(raw: Raw) -> str:
    body = {"session_id": raw.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    return str(raw.ok("create_sampling_session", body)["sampling_session_id"])


def sample(sampler: str, seq_id: int, max_tokens: int = 2) -> dict[str, object]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "num_samples": 1,
        "sampling_params": {"max_tokens": max_tokens, "stop": [], "seed": 1},
    }


def test_samples_and_calls_over_a_limit_are_a_429_that_says_everything(server: Server) -> None:
    operator = Operator(server, "fast")
    raw, other = operator.raw, server.raw()
    mine = sampler(raw)
    with operator.limit("requests_per_minute", 3):
        for seq_id in range(3):
            assert raw.post("asample", sample(mine, seq_id)).status_code == 200
        for refused in (raw.post("asample", sample(mine, 3)), raw.get("training_runs")):
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["Retry-After"]) <= 20
            assert refused.headers["X-Tinker-Sampling-Backpressure"] == "1"
            told = refused.json()
            assert told["limit"] == "requests_per_minute"
            assert (told["used"], told["allowed"], told["scope"]) == ("3", "3", "organization")
            assert told["resets_at"] in told["detail"]
        # What was sent before has its answer all the same, and asking for results is free.
        again = raw.post("asample", sample(mine, 2))
        assert again.status_code == 200
        for _ in range(10):
            assert raw.retrieve(again.json()["request_id"]).status_code == 200
        assert other.get("training_runs").status_code == 200


def test_the_sdk_waits_out_a_limit_on_samples(server: Server) -> None:
    operator = Operator(server, "patient")
    with operator.limit("samples_in_flight", 1), server.sdk(operator.key) as client:
        sampling = client.create_sampling_client(base_model=MODEL)
        params = types.SamplingParams(max_tokens=20, stop=[], seed=1)
        prompt = types.ModelInput.from_ints([1, 2, 3])
        futures = [sampling.sample(prompt, 1, params) for _ in range(3)]
        assert [len(f.result(timeout=60).sequences[0].tokens) for f in futures] == [20, 20, 20]


def test_a_spent_budget_is_a_402_for_new_work_and_saving_goes_on(server: Server) -> None:
    operator = Operator(server, "spender")
    raw = operator.raw
    run = raw.run(raw.session())
    mine = sampler(raw)
    first = raw.forward_backward(run, 1)
    assert "protobuf" in raw.result(first)
    with operator.limit("monthly_spend_usd", "0.0000001"):
        for refused in (raw.send_forward_backward(run, 2), raw.post("asample", sample(mine, 1))):
            assert refused.status_code == 402
            told = refused.json()
            assert (told["limit"], told["used"]) == ("monthly_spend_usd", "0.00000024")
            assert "there is room again" in told["detail"]
        # Nothing was logged, what was sent before has its answer, and what is trained can be saved.
        assert raw.forward_backward(run, 1) == first
        assert "path" in raw.result(raw.save(run, 2, "kept"))
        assert raw.get("training_runs").status_code == 200
    wait_for(lambda: raw.send_forward_backward(run, 3).status_code == 200, what="the budget to be lifted")


def test_a_call_whose_other_chunks_were_taken_is_not_cut_in_two_by_a_budget(server: Server) -> None:
    operator = Operator(server, "halfway")
    raw = operator.raw
    run = raw.run(raw.session())
    assert "protobuf" in raw.result(raw.forward_backward(run, 1))
    later = raw.forward_backward(run, 3)
    with operator.limit("monthly_spend_usd", 0):
        earlier = raw.forward_backward(run, 2)
        assert "protobuf" in raw.result(earlier)
        assert "protobuf" in raw.result(later)
        assert raw.send_forward_backward(run, 4).status_code == 402


def test_the_sdk_pauses_on_a_spent_budget_and_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    operator = Operator(server, "pauses")
    with server.sdk(operator.key) as client:
        training = client.create_lora_training_client(base_model=MODEL, rank=4)
        training.forward_backward([datum()], "cross_entropy").result()
        operator.run("set", "monthly_spend_usd", "0.0000001")
        time.sleep(1.3)
        with caplog.at_level(logging.WARNING):
            future = training.forward_backward([datum()], "cross_entropy")
            wait_for(lambda: "paused due to billing status" in caplog.text, what="the SDK to pause")
        assert "monthly_spend_usd" in caplog.text
        operator.run("unset", "monthly_spend_usd")
        assert future.result(timeout=60).metrics["loss:sum"] > 0


def test_training_waits_for_a_rate_and_says_why(server: Server) -> None:
    operator = Operator(server, "steady")
    raw = operator.raw
    run = raw.run(raw.session())
    with operator.limit("tokens_per_minute", 60):
        assert "protobuf" in raw.result(raw.forward_backward(run, 1, None))
        big = raw.forward_backward(run, 2)
        assert "protobuf" in raw.result(big)
        # 16 tokens so far. A request of 100 goes on, and is paid back before the next.
        from tests.harness import training_body

        assert "protobuf" in raw.result(raw.forward_backward(run, 3, training_body(run, 3, (50, 50))))
        waiting = raw.forward_backward(run, 4)
        answer = raw.retrieve(waiting)
        assert answer.status_code == 408
        told = answer.json()
        assert told["type"] == "try_again"
        assert told["queue_state"] == "paused_rate_limit"
        assert "limit tokens_per_minute of your organization is reached: 1" in told["queue_state_reason"]
        assert "of 60 tokens in the last minute; there is room again in" in told["queue_state_reason"]
    assert "protobuf" in raw.result(waiting)  # the limit was lifted


def test_a_run_too_many_waits_until_another_session_ends(server: Server) -> None:
    operator = Operator(server, "crowded")
    raw = operator.raw
    with operator.limit("concurrent_runs", 1):
        sessions = [raw.session(), raw.session()]
        first = raw.run(sessions[0])
        body = {
            "session_id": sessions[1],
            "model_seq_id": 0,
            "base_model": MODEL,
            "lora_config": {"rank": 4, "seed": 1},
        }
        second = raw.ok("create_model", body)
        answer = raw.retrieve(second["request_id"])
        assert answer.status_code == 408
        assert answer.json()["queue_state"] == "paused_rate_limit"
        assert "limit concurrent_runs" in answer.json()["queue_state_reason"]
        assert "1 of 1 training runs" in answer.json()["queue_state_reason"]
        assert "protobuf" in raw.result(raw.forward_backward(first, 1))  # the first one is not held up
        raw.ok(f"sessions/{sessions[0]}/finish", {"reason": {"type": "completed"}})
        assert raw.result(second["request_id"])["model_id"] == second["model_id"]


def test_what_waits_for_a_limit_outlives_a_stop(make_server: Callable[..., Server]) -> None:
    server = make_server("--poll-hold", "1").start()
    operator = Operator(server, "waits")
    raw = operator.raw
    run = raw.run(raw.session())
    assert "protobuf" in raw.result(raw.forward_backward(run, 1))
    with operator.limit("requests_per_minute", 0):
        waiting = raw.forward_backward(run, 2)
        assert raw.retrieve(waiting).json()["queue_state"] == "paused_rate_limit"
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 20
    server.start()
    assert "protobuf" in raw.result(waiting)


def test_a_session_that_finishes_does_not_wait_for_a_limit(server: Server) -> None:
    operator = Operator(server, "leaves")
    raw = operator.raw
    session = raw.session()
    run = raw.run(session)
    with operator.limit("requests_per_minute", 0):
        waiting = raw.forward_backward(run, 1)
        finisher = threading.Thread(
            target=raw.ok, args=(f"sessions/{session}/finish", {"reason": {"type": "completed"}})
        )
        finisher.start()
        finisher.join(10.0)
        assert not finisher.is_alive()
        assert "session of this training run has finished" in raw.result(waiting)["error"]


def test_a_full_store_takes_no_more_checkpoints_until_there_is_room(server: Server) -> None:
    operator = Operator(server, "hoarder")
    raw = operator.raw
    run = raw.run(raw.session())
    assert "path" in raw.result(raw.save(run, 1, "first"))
    with operator.limit("storage_gb", "0.000001"):
        told = raw.result(raw.save(run, 2, "second"))
        assert told["category"] == "user"
        assert "limit storage_gb of your organization is reached" in told["error"]
        assert "delete checkpoints" in told["error"]
        assert raw.http.delete(f"training_runs/{run}/checkpoints/weights/first").status_code == 200
        assert "path" in raw.result(raw.save(run, 3, "second"))


def test_limits_are_set_shown_and_audited(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    operator = Operator(server, "audited")
    operator.run("set", "storage_gb", "2", "--project", "Default")
    operator.run("set", "weight", "3")
    capsys.readouterr()
    operator.run("show")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown] == [
        ["LIMIT", "VALUE", "PROJECT", "USED", "DEFAULT"],
        ["storage_gb", "2", "Default", "0", "no"],
        ["weight", "3", "-", "-", "no"],
    ]
    operator.run("unset", "weight")
    client = tinker.AdminClient(base_url=server.url, api_key=operator.key)
    entries = client.get_audit_log().result().entries
    acts = [(entry.event, cast(Any, entry.event_details).get("limit")) for entry in entries]
    assert [act for act in acts if act[1]] == [
        ("organization_set_limit", "storage_gb"),
        ("organization_set_limit", "weight"),
        ("organization_unset_limit", "weight"),
    ]
