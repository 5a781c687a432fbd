"""Writing down who did what: every administrative act goes into the audit log, in its own transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from tinsmith.store import Connection, audit, orgs
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


_AN_HOUR = 3600.0


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

    def to_json(self) -> dict[str, object]:
        """For commands that are carried out when their sender is long gone."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Actor:
        return cls(values["details"], values["user_id"], values["key_id"])

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
        self._sampled: dict[tuple[str, str], float] = {}  # when it was told, by key and path

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
        actor, org_id = Actor.of(caller), caller.org_id
        self._context.store.write_soon(
            lambda connection: record_read(connection, actor, org_id, path, purpose)
        )

    def was_sampled_from(self, caller: Caller, path: TinkerPath) -> None:
        """Somebody samples from weights without a sampling session: told once an hour for a key."""
        now = time.monotonic()
        for key in [key for key, at in self._sampled.items() if now - at > _AN_HOUR]:
            del self._sampled[key]
        if (key := (caller.key_id, str(path))) not in self._sampled:
            self._sampled[key] = now
            self.was_read(caller, path, "sampling")


def record_read(connection: Connection, actor: Actor, org_id: str, path: TinkerPath, purpose: str) -> None:
    record(connection, actor, org_id, "checkpoint", "read", about_checkpoint(path), {"purpose": purpose})


def read_by(caller: Caller, reader: Caller) -> list[dict[str, object]]:
    """Who reads weights, for commands: the caller, and whoever's key it showed for them, if that is another
    organization's, which is told as well."""
    both = [caller] if reader.org_id == caller.org_id else [caller, reader]
    return [{"org_id": each.org_id, "actor": Actor.of(each).to_json()} for each in both]


def record_reads(
    connection: Connection, by: Sequence[Mapping[str, Any]], path: TinkerPath, purpose: str
) -> None:
    for each in by:
        record_read(connection, Actor.from_json(each["actor"]), each["org_id"], path, purpose)


def record_everywhere(
    connection: Connection, actor: Actor, act: str, how: Mapping[str, object] | None = None
) -> None:
    """Something was done with the data of all organizations: each is told."""
    for org in orgs.every(connection):
        record(connection, actor, org.id, "organization", act, {"organization_name": org.name}, how)


def about_checkpoint(path: TinkerPath) -> dict[str, object]:
    return {"model_id": path.run, "tinker_path": str(path)}
