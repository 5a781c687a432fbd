"""What a client tells of itself: that it began and ended, what it did, and what went wrong in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from .errors import WireError
from .fields import Fields

SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")  # of the SDK, from the least on
MOST_EVENTS = 1000  # of a batch; the SDK sends at most 100
MOST_BYTES = 8192  # of what is kept of an event, as JSON
_PLAIN = ("event", "event_id", "event_session_index", "event_name", "severity", "timestamp")
_TEXTS = ("error_message", "traceback", "duration", "error_type")


@dataclass(frozen=True, slots=True)
class Event:
    """`at` is the client's clock, in seconds since 1970, `place` the event's number in its session.
    `details` is everything else that it has, as a JSON object of at most MOST_BYTES."""

    id: str
    place: int
    at: float
    type: str
    name: str | None
    severity: str
    details: str

    @classmethod
    def read(cls, fields: Fields) -> Event:
        others = {name: value for name, value in fields.values().items() if name not in _PLAIN}
        return cls(
            id=fields.text("event_id", longest=64),
            place=fields.integer("event_session_index", least=0),
            at=_moment(fields),
            type=fields.text("event", longest=64),
            name=fields.optional_text("event_name", longest=256),
            severity=fields.text("severity", longest=16),
            details=_kept(fields, others),
        )


@dataclass(frozen=True, slots=True)
class TelemetryBatch:
    """`session_id` need not be one of the server's: a client without a session makes one up."""

    session_id: str
    process: str | None
    sdk_version: str
    platform: str
    events: tuple[Event, ...]

    @classmethod
    def read(cls, fields: Fields) -> TelemetryBatch:
        events = fields.array("events")
        if not events:
            return cls("", None, "", "", ())
        if len(events) > MOST_EVENTS:
            raise fields.error("events", f"has {len(events)} events; at most {MOST_EVENTS} are allowed")
        return cls(
            session_id=fields.text("session_id", longest=128),
            process=fields.optional_text("process_uuid", longest=64),
            sdk_version=fields.optional_text("sdk_version", longest=64) or "",
            platform=fields.optional_text("platform", longest=64) or "",
            events=tuple(Event.read(Fields(value, f"events[{i}]")) for i, value in enumerate(events)),
        )


def _moment(fields: Fields) -> float:
    text = fields.text("timestamp", longest=64)
    try:
        when = datetime.fromisoformat(text)
        seconds = (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError):
        raise fields.error("timestamp", f"must be an ISO 8601 time, not {text!a}") from None
    return seconds


def _kept(fields: Fields, details: Mapping[str, object]) -> str:
    """As JSON. Of what is too long for being kept both ends of its texts are, and how long it was."""
    try:
        text = _json(details)
    except RecursionError:
        raise WireError(fields.where, "is nested too deeply") from None
    size, most = len(text), MOST_BYTES // 2
    while len(text) > MOST_BYTES:
        texts = {name: details[name] for name in _TEXTS if isinstance(details.get(name), str)}
        short = {name: _both_ends(str(value), most) for name, value in texts.items()}
        text = _json({**short, "shortened_from_bytes": size})
        most //= 2
    return text


def _both_ends(text: str, most: int) -> str:
    """The beginning and the end of a text: a traceback's last lines say the most."""
    return text if len(text) <= most else f"{text[: most // 4]}\n...\n{text[-most * 3 // 4 :]}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
