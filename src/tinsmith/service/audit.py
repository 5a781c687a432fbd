"""Writing down who did what: every administrative act goes into the audit log, in its own transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from tinsmith.store import Connection, audit
from tinsmith.store.audit import AuditRow as AuditRow
from tinsmith.store.audit import EventType as EventType
from tinsmith.store.audit import Outcome
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.urns import org_urn, user_urn

from .caller import Caller
from .context import Context

# What the SDK can ask for, by what an act was about.
_EVENT_TYPES: dict[str, EventType] = {
    "organization": "organizations",
    "user": "organizations",
    "api_key": "organizations",
    "team": "teams",
    "project": "projects",
    "session": "projects",
    "checkpoint": "checkpoints",
}


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it."""

    details: dict[str, object]
    user_id: str | None = None
    key_id: str | None = None

    @classmethod
    def of(cls, caller: Caller) -> Actor:
        whose = {
            "type": "user",
            "urn": user_urn(caller.user_id),
            "email": caller.user_email or caller.user_name,
        }
        return cls({**whose, "key_id": caller.key_id}, caller.user_id, caller.key_id)

    @classmethod
    def operator(cls, login: str) -> Actor:
        """Whoever works on the server's own machine, under that name."""
        return cls({"type": "operator", "name": login})


def record(
    connection: Connection,
    actor: Actor,
    org_id: str,
    resource: str,
    act: str,
    about: Mapping[str, object],
    how: Mapping[str, object] | None = None,
    outcome: Outcome = "success",
) -> None:
    """Write an act down: `about` names what it was done to, `how` what was set."""
    audit.add(
        connection,
        AuditRow(
            org_id=org_id,
            at=time.time(),
            event_type=_EVENT_TYPES[resource],
            event=f"{resource}_{act}",
            outcome=outcome,
            user_id=actor.user_id,
            key_id=actor.key_id,
            details={
                "organization_urn": org_urn(org_id),
                "actor": actor.details,
                "resource": resource,
                **about,
                "action": {"type": act, **(how or {})},
                "outcome": outcome,
            },
        ),
    )


class AuditLog:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def of_day(
        self, caller: Caller, day: date, event_type: EventType | None, limit: int | None, offset: int
    ) -> tuple[list[AuditRow], int]:
        """The entries of one day, from midnight to midnight UTC, and how many there are."""
        caller.require_org("audit")
        since = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
        until = since + timedelta(days=1).total_seconds()
        return await self._context.store.read(
            lambda connection: audit.page(connection, caller.org_id, since, until, event_type, limit, offset)
        )

    async def denied(
        self, caller: Caller, resource: str, act: str, why: str, about: Mapping[str, object]
    ) -> None:
        """Somebody wanted to do what it may not."""

        def work(connection: Connection) -> None:
            how: dict[str, object] = {"reason": why}
            record(connection, Actor.of(caller), caller.org_id, resource, act, about, how, "denied")

        await self._context.write(work)

    def was_read(self, caller: Caller, path: TinkerPath, purpose: str) -> None:
        """Somebody uses a checkpoint's weights. Written when there is time: it changes nothing."""
        self._context.store.write_soon(
            lambda connection: record(
                connection,
                Actor.of(caller),
                caller.org_id,
                "checkpoint",
                "read",
                about_checkpoint(path),
                {"purpose": purpose},
            )
        )


def about_checkpoint(path: TinkerPath) -> dict[str, object]:
    return {"model_id": path.run, "tinker_path": str(path)}
