"""Usage and its cost, as the SDK and its program get them."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import tinker
from tinker import types

from tests.harness import MODEL, Raw, Server, datum, detail
from tests.sdk.test_cli import Program

MILLION = 1_000_000


@dataclass
class Work:
    """What an organization has done, counted by itself."""

    key: str
    session: str
    sizes: list[int]
    since: datetime
    tokens: Counter[str]


@pytest.fixture(scope="module")
def work(server: Server) -> Work:
    key = server.new_key("counted")
    tokens: Counter[str] = Counter()
    since = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with tinker.ServiceClient(
        base_url=server.url, api_key=key, user_metadata={"experiment": "seven"}
    ) as client:
        training = client.create_lora_training_client(base_model=MODEL, rank=4)
        batch = [datum(8), datum(20), datum(5)]
        training.forward_backward(batch, "cross_entropy").result()
        training.forward(batch[:1], "cross_entropy").result()
        training.optim_step(types.AdamParams()).result()
        tokens["training"] += 8 + 20 + 5 + 8
        training.save_state("kept").result()
        sampler = training.save_weights_and_get_sampling_client()
        prompt = types.ModelInput.from_ints(list(range(150)))
        for cached in (0, 128):
            answer = sampler.sample(prompt, 3, types.SamplingParams(max_tokens=7, stop=[], seed=1)).result()
            assert (answer.prompt_cache_hit_tokens or 0) == cached
            tokens["sampling_prefill"] += 150 - cached
            tokens["sampling_prefill cached"] += cached
            tokens["sampling_sample"] += sum(len(s.tokens) for s in answer.sequences)
        rest = client.create_rest_client()
        sizes = [row.size_bytes for row in rest.list_user_checkpoints().result().checkpoints]
        session = client.holder.get_session_id()
    return Work(key, session, sizes, since, tokens)


def usage(server: Server, work: Work) -> types.BillingUsageResponse:
    client = tinker.AdminClient(base_url=server.url, api_key=work.key)
    return client.get_billing_usage(work.since, work.since + timedelta(hours=2)).result()


def test_every_token_is_in_the_usage_that_the_sdk_gets(server: Server, work: Work) -> None:
    found = usage(server, work)
    counted: Counter[str] = Counter()
    for event in found.data:
        assert event.bucket_end - event.bucket_start == timedelta(hours=1)
        assert event.user_name == "counted"
        assert event.user_id
        assert event.project_id
        match event.event_info:
            case types.StorageBillingEvent() as info:
                assert event.session_id is None
                assert info.gigabyte_hours > 0
                assert not info.free
            case types.CheckpointBillingEvent() as info:
                assert (event.session_id, info.count) == (work.session, 1)
            case types.SamplingPrefillBillingEvent() as info:
                counted["sampling_prefill" + " cached" * info.cached] += info.token_count
            case info:
                counted[info.type] += info.token_count
        assert event.base_model == MODEL
    assert counted == work.tokens
    assert found.sessions == {work.session: types.BillingUsageSession(user_metadata={"experiment": "seven"})}
    assert found.cost_data_through is None


def test_costs_are_rates_times_quantities_to_the_last_digit(server: Server, work: Work) -> None:
    window = {
        "starting_on": work.since.isoformat(),
        "ending_before": (work.since + timedelta(hours=2)).isoformat(),
    }
    answer = server.raw(work.key).get("billing/usage/events", params=window)
    found = json.loads(answer.text, parse_float=Decimal)["data"]
    rates = {}
    for event in found:
        info, cost = event["event_info"], event["estimated_cost_usd"]
        if info["type"] == "storage":
            rate = event["effective_rate_usd_per_gigabyte_month"]
            assert rate == Decimal("0.1")
            exact = rate * info["gigabyte_hours"] / 720
            assert abs(cost - exact) < Decimal("1e-12") * len(work.sizes)
        elif info["type"] == "checkpoint":
            assert cost is None
        else:
            rate = event["effective_rate_usd_per_million_tokens"]
            assert cost == rate * info["token_count"] / MILLION
            rates[info["type"], info.get("cached")] = rate
    # A model of that size is priced by the rule for what is not listed: at its lower bound.
    assert rates == {
        ("training", None): Decimal("0.03"),
        ("sampling_prefill", False): Decimal("0.03"),
        ("sampling_prefill", True): Decimal("0.006"),
        ("sampling_sample", None): Decimal("0.03"),
    }


def test_what_is_stored_now(server: Server, work: Work) -> None:
    client = tinker.AdminClient(base_url=server.url, api_key=work.key)
    found = client.get_current_checkpoint_storage_usage().result()
    assert found.effective_rate_usd_per_gigabyte_month == 0.1
    (row,) = found.data
    assert (row.checkpoint_count, row.size_bytes) == (len(work.sizes), sum(work.sizes))
    assert row.size_gigabytes == pytest.approx(sum(work.sizes) / 1e9)
    assert row.estimated_monthly_cost_usd == pytest.approx(sum(work.sizes) / 1e10, abs=1e-12)
    assert row.user_name == "counted"
    assert client.get_current_checkpoint_storage_usage(row.project_id).result() == found
    with pytest.raises(tinker.NotFoundError, match="project_id: there is no project"):
        client.get_current_checkpoint_storage_usage("nowhere").result()


@pytest.fixture(scope="module")
def program(server: Server, work: Work) -> Iterator[Program]:
    with ThreadPoolExecutor(2) as pool:
        yield Program(server, pool, key=work.key)


def test_the_program_shows_usage(program: Program, work: Work) -> None:
    window = [f"{moment:%Y-%m-%dT%H:00:00Z}" for moment in (work.since, work.since + timedelta(hours=2))]
    told = program.both("billing", "usage", *window)
    assert "hourly usage row(s)" in told.table
    trained = [row for row in told.json["data"] if row["event_info"]["type"] == "training"]
    assert [row["event_info"]["token_count"] for row in trained] == [work.tokens["training"]]
    assert told.json["sessions"] == {work.session: {"user_metadata": {"experiment": "seven"}}}
    rows = list(csv.DictReader(io.StringIO(program.ok("billing", "usage", *window, "--csv", "-"))))
    sampled = sum(int(row["token_count"]) for row in rows if row["type"] == "sampling_sample")
    assert sampled == work.tokens["sampling_sample"]


def test_the_program_shows_storage(program: Program, work: Work) -> None:
    told = program.both("billing", "checkpoint-storage")
    assert str(sum(work.sizes)) in told.table
    assert told.json["data"][0]["size_bytes"] == sum(work.sizes)
    assert "no project" in program.fails("billing", "checkpoint-storage", "--project-id", "nowhere")


@pytest.mark.parametrize(
    ("window", "says"),
    [
        ({}, "starting_on: is missing"),
        ({"starting_on": "soon"}, "starting_on: must be an RFC 3339 time"),
        ({"starting_on": "2026-01-01T00:00:00Z"}, "ending_before: is missing"),
        (
            {"starting_on": "2026-01-01T00:30:00Z", "ending_before": "2026-01-02T00:00:00Z"},
            "starting_on: must be a full hour",
        ),
        (
            {"starting_on": "2026-01-02T00:00:00Z", "ending_before": "2026-01-01T00:00:00Z"},
            "ending_before: must be after",
        ),
        (
            {"starting_on": "2026-01-02T00:00:00Z", "ending_before": "2026-01-20T00:00:00Z"},
            "ending_before: must be at most 14 days",
        ),
        (
            {"starting_on": "2999-01-02T00:00:00Z", "ending_before": "2999-01-03T00:00:00Z"},
            "starting_on: must not be in the future",
        ),
    ],
)
def test_a_window_that_is_wrong_is_a_400_that_names_its_end(
    raw: Raw, window: dict[str, str], says: str
) -> None:
    answer = raw.get("billing/usage/events", params=window)
    assert answer.status_code == 400
    assert says in detail(answer)


def test_another_organization_sees_its_own_usage_alone(server: Server, work: Work) -> None:
    key = server.new_key("idle")
    found = usage(server, Work(key, "", [], work.since, Counter()))
    assert found.data == []
    assert found.sessions == {}
    client = tinker.AdminClient(base_url=server.url, api_key=key)
    assert client.get_current_checkpoint_storage_usage().result().data == []
