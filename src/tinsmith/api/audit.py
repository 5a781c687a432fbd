"""The audit log."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import Any, get_args

from starlette.responses import Response

from tinsmith.service.audit import AuditRow, EventType
from tinsmith.service.errors import Refused

from .http import Call, json_response, time_text

_EVERY = ("all", *get_args(EventType))


async def entries(call: Call) -> Response:
    """What was done in an organization on one day, in UTC. All of it, unless a page is asked for."""
    query = call.request.query_params
    wanted = query.get("event_type", "all")
    if wanted not in _EVERY:
        raise Refused(f"event_type: must be one of {', '.join(_EVERY)}, not {wanted[:60]!r}")
    limit, offset = call.page(most=100_000) if "limit" in query or "offset" in query else (None, 0)
    event_type: Any = None if wanted == "all" else wanted
    rows, total = await call.service.audit.of_day(
        call.caller, _day(query.get("day")), event_type, limit, offset
    )
    return json_response(
        {
            "entries": [_entry(row) for row in rows],
            "cursor": {
                "offset": offset,
                "limit": limit if limit is not None else total,
                "total_count": total,
            },
        }
    )


def _day(text: str | None) -> date:
    if text is None:
        return datetime.now(UTC).date()
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text) is None:
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise Refused(f"day: must be a date like 2026-01-31, not {text[:60]!r}") from None


def _entry(row: AuditRow) -> dict[str, object]:
    """SDKs before 0.30 read the last three fields of entries about checkpoints."""
    action = row.details.get("action")
    return {
        "timestamp": time_text(row.at),
        "event": row.event,
        "event_details": row.details,
        "model_id": row.details.get("model_id"),
        "tinker_path": row.details.get("tinker_path"),
        "purpose": action.get("purpose") if isinstance(action, dict) else None,
    }
