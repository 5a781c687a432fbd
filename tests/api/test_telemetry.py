"""What clients tell of themselves: kept for the operator, within bounds, and told apart by organization."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
import tinker

from tests.harness import Raw, Server, wait_for
from tinsmith.wire.telemetry import MOST_BYTES, MOST_EVENTS


def event(place: int = 0, **more: object) -> dict[str, object]:
    return {
        "event": "GENERIC_EVENT",
        "event_name": "something",
        "event_id": uuid.uuid4().hex,
        "event_session_index": place,
        "severity": "INFO",
        "timestamp": "2026-01-02T03:04:05+00:00",
        **more,
    }


def batch(*events: object, session: str = "sessionless-1") -> dict[str, object]:
    return {"session_id": session, "sdk_version": "0.38.0", "platform": "Linux", "events": list(events)}


def told(server: Server, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(server.operate("telemetry", "list", "--json", *options))
    return found


def kept(server: Server, session: str, number: int, *options: str) -> list[dict[str, Any]]:
    """A session's events, once there are so many of them: they are written a moment after the answer."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = told(server, "--session", session, *options)
        return len(found) >= number

    wait_for(there, 10.0, f"{number} events of {session}")
    assert len(found) == number
    return found


def test_what_the_sdk_tells_of_itself_is_kept(server: Server) -> None:
    with server.sdk() as client:
        session = client.holder.get_session_id()
        with pytest.raises(tinker.NotFoundError):
            client.create_lora_training_client(base_model="no/such").result()
    rows = kept(server, session, 3)
    assert [(row["place"], row["type"]) for row in rows] == [
        (0, "SESSION_START"),
        (1, "GENERIC_EVENT"),
        (2, "SESSION_END"),
    ]
    assert (rows[1]["event"], rows[1]["severity"]) == ("user_error", "WARNING")
    assert rows[1]["details"]["event_data"]["error_type"] == "NotFoundError"
    assert {row["sdk_version"] for row in rows} == {tinker.__version__}
    assert [row["place"] for row in told(server, "--session", session, "--severity", "WARNING")] == [1]
    counts = {row["session_id"]: row for row in json.loads(server.operate("telemetry", "sessions", "--json"))}
    assert (counts[session]["events"], counts[session]["errors"]) == (3, 0)
    assert "error_type=NotFoundError" in server.operate("telemetry", "list", "--session", session)


def test_a_batch_that_is_sent_again_is_kept_once(server: Server, raw: Raw) -> None:
    session = f"sessionless-{uuid.uuid4()}"
    first, second = event(0), event(1, event_data={"x": [1, {"y": None}], "text": "\ud800 \0 \x1b[2J"})
    for events in ([first], [first, second], [first, second]):
        assert raw.post("telemetry", content=json.dumps(batch(*events, session=session)).encode()).json() == {
            "status": "accepted"
        }
    assert [row["event_id"] for row in kept(server, session, 2)] == [first["event_id"], second["event_id"]]
    assert kept(server, session, 2)[1]["details"] == {"event_data": second["event_data"]}
    assert "\x1b" not in server.operate("telemetry", "list", "--session", session)


def test_an_organization_cannot_speak_for_the_session_of_another(server: Server, raw: Raw) -> None:
    ours, stranger = raw.session(), server.raw(server.new_key("a stranger who telephones"))
    for who in (raw, stranger):
        assert who.ok("telemetry", batch(event(), session=ours)) == {"status": "accepted"}
        assert who.ok("telemetry", batch(event(), session="sessionless-both")) == {"status": "accepted"}
    rows = kept(server, "sessionless-both", 2)
    assert len({row["org"] for row in rows}) == 2
    (row,) = kept(server, ours, 1)
    for org in {row["org"] for row in rows}:
        own = [each["session_id"] for each in told(server, "--org", org, "--limit", "100000")]
        assert own.count("sessionless-both") == 1
        assert own.count(ours) == (1 if org == row["org"] else 0)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "events: is missing"),
        (batch(3), "events[0]: must be a JSON object"),
        (batch(event(), {}), "events[1].event_id: is missing"),
        (batch(event(timestamp="yesterday")), "events[0].timestamp: must be an ISO 8601 time"),
        (batch(event(timestamp="0001-01-01T00:00:00+23:59")), "events[0].timestamp: must be an ISO 8601"),
        (batch(event(severity="")), "events[0].severity: must be a text"),
        (batch(event(event_session_index=-1)), "events[0].event_session_index: must be an integer"),
        (batch(event(event_id="x" * 65)), "events[0].event_id: has 65 characters"),
        ({**batch(event()), "session_id": None}, "session_id: is missing"),
        (batch(*[event()] * (MOST_EVENTS + 1)), f"events: has {MOST_EVENTS + 1} events"),
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused_by_name(raw: Raw, body: object, problem: str) -> None:
    answer = raw.post("telemetry", body)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(problem)


def test_a_long_text_is_shortened_to_its_two_ends(server: Server, raw: Raw) -> None:
    session = f"sessionless-{uuid.uuid4()}"
    traceback = "first" + "\u6771" * 50_000 + "last"
    raw.ok("telemetry", batch(event(traceback=traceback, event_data={"x": "y" * 9000}), session=session))
    (row,) = kept(server, session, 1)
    details = row["details"]
    assert details["shortened_from_bytes"] > 6 * 50_000
    assert details["traceback"].startswith("first")
    assert details["traceback"].endswith("last")
    assert 1000 < len(json.dumps(details)) < MOST_BYTES


def test_events_nested_too_deeply_are_refused(raw: Raw) -> None:
    for depth in range(930, 1010, 8):
        body = json.dumps(batch(event(event_data=None))).replace("null", '{"x":' * depth + "1" + "}" * depth)
        assert raw.post("telemetry", content=body.encode()).status_code in (200, 400), depth
