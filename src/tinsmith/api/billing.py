"""What an organization used, and what it stores."""

from __future__ import annotations

import json
import re
import secrets
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from starlette.responses import Response

from tinsmith.service.billing import Line, Stored
from tinsmith.service.errors import Refused
from tinsmith.service.prices import plain
from tinsmith.wire.urns import user_urn

from .http import Call
from .sessions import _texts

_HOUR = timedelta(hours=1)


async def usage(call: Call) -> Response:
    found = await call.service.billing.usage(
        call.caller, _moment(call, "starting_on"), _moment(call, "ending_before")
    )
    return _exact_json(
        {
            "data": [_event(line) for line in found.lines],
            "sessions": {
                session_id: {"user_metadata": _texts(metadata)}
                for session_id, metadata in found.sessions.items()
            },
            "cost_data_through": None,  # all costs are by the price table, none by an invoice
        }
    )


async def storage(call: Call) -> Response:
    rate, found = await call.service.billing.stored(call.caller, call.request.query_params.get("project_id"))
    return _exact_json(
        {"effective_rate_usd_per_gigabyte_month": rate, "data": [_stored(row) for row in found]}
    )


def _event(line: Line) -> dict[str, object]:
    begin = datetime.fromtimestamp(line.hour, UTC)
    stored = line.kind == "storage"
    return {
        "bucket_start": _time(begin),
        "bucket_end": _time(begin + _HOUR),
        "base_model": line.model,
        "user_id": user_urn(line.user_id),
        "user_name": line.user_name,
        "session_id": line.session_id,
        "project_id": line.project_id,
        "estimated_cost_usd": line.cost,
        "effective_rate_usd_per_million_tokens": None if stored else line.rate,
        "effective_rate_usd_per_gigabyte_month": line.rate if stored else None,
        "event_info": _info(line),
    }


def _info(line: Line) -> dict[str, object]:
    match line.kind:
        case "train":
            return {"type": "training", "token_count": line.quantity}
        case "prefill" | "cached_prefill":
            cached = line.kind == "cached_prefill"
            return {"type": "sampling_prefill", "cached": cached, "token_count": line.quantity}
        case "sample":
            return {"type": "sampling_sample", "token_count": line.quantity}
        case "checkpoint":
            return {"type": "checkpoint", "count": line.quantity}
        case "storage":
            return {"type": "storage", "free": line.cost == 0, "gigabyte_hours": line.gigabyte_hours}


def _stored(row: Stored) -> dict[str, object]:
    return {
        "project_id": row.project_id,
        "org_user_urn": user_urn(row.user_id),
        "user_email": row.user.email if row.user is not None else None,
        "user_name": row.user.name if row.user is not None else None,
        "checkpoint_count": row.checkpoints,
        "size_bytes": row.size_bytes,
        "size_gigabytes": row.gigabytes,
        "estimated_monthly_cost_usd": row.monthly_cost,
    }


def _moment(call: Call, name: str) -> float:
    """A time of the query, in seconds. One without a zone is in UTC."""
    text = call.request.query_params.get(name)
    if text is None:
        raise Refused(f"{name}: is missing; give a time such as 2026-07-13T00:00:00Z")
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Refused(
            f"{name}: must be an RFC 3339 time such as 2026-07-13T00:00:00Z, not {text[:60]!r}"
        ) from None


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _exact_json(content: object) -> Response:
    """JSON whose amounts are written with all of their digits, which no float would hold."""
    mark = secrets.token_hex(8)  # nobody can have written it into a name
    text = json.dumps(
        content,
        separators=(",", ":"),
        ensure_ascii=False,
        default=lambda value: f"{mark}{plain(value)}" if isinstance(value, Decimal) else str(value),
    )
    return Response(re.sub(f'"{mark}([^"]*)"', r"\1", text).encode(), media_type="application/json")
