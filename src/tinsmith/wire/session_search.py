"""Searching for sessions: the filters, and where a page begins."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from .errors import WireError
from .fields import Fields
from .urns import user_of_urn

StatusKind = Literal["active", "cancelled", "failed", "client_finished"]
OwnerKind = Literal["own", "accessible", "user"]
FinishReason = Literal["success", "errored", "interrupted"]

_STATUSES: tuple[StatusKind, ...] = ("active", "cancelled", "failed", "client_finished")
OWNERS: tuple[OwnerKind, ...] = ("own", "accessible", "user")
_REASONS: tuple[FinishReason, ...] = ("success", "errored", "interrupted")
_MOST_OWNERS = 10

T = TypeVar("T", bound=str)


@dataclass(frozen=True, slots=True)
class StatusFilter:
    kind: StatusKind
    reasons: tuple[FinishReason, ...] = _REASONS  # of client_finished alone


@dataclass(frozen=True, slots=True)
class SessionCursor:
    """Behind which session a page begins."""

    created_at: float
    session_id: str


@dataclass(frozen=True, slots=True)
class SessionSearch:
    """What a session must be to be found. None, or nothing, does not narrow."""

    session_id: str | None
    display_name: tuple[str, ...]  # words, casefolded
    project_ids: tuple[str, ...] | None
    user_metadata: dict[str, str]
    owner: OwnerKind
    owner_ids: tuple[str, ...]
    statuses: tuple[StatusFilter, ...] | None
    limit: int
    cursor: SessionCursor | None

    @classmethod
    def read(cls, fields: Fields) -> SessionSearch:
        owner = fields.optional_child("owner") or Fields({}, "owner")
        kind = one_of(owner, "type", OWNERS, "own")
        name = fields.optional_text("display_name")
        return cls(
            session_id=fields.optional_text("session_id"),
            display_name=tuple(name.casefold().split()) if name is not None else (),
            project_ids=read_texts(fields, "project_ids") if fields.has("project_ids") else None,
            user_metadata=fields.text_metadata("user_metadata") or {},
            owner=kind,
            owner_ids=read_owners(owner) if kind == "user" else (),
            statuses=_statuses(fields) if fields.has("statuses") else None,
            limit=fields.optional_integer("limit", least=1, most=200) or 50,
            cursor=_cursor(fields.child("cursor")) if fields.has("cursor") else None,
        )


def _statuses(fields: Fields) -> tuple[StatusFilter, ...]:
    found: list[StatusFilter] = []
    for index, item in enumerate(_not_empty(fields, "statuses")):
        query = Fields(item, f"statuses[{index}]")
        kind = one_of(query, "type", _STATUSES, None)
        reasons = _REASONS
        if kind == "client_finished" and query.has("reasons"):
            given = _not_empty(query, "reasons")
            reasons = tuple(reason for reason in _REASONS if reason in given)
            if unknown := [reason for reason in given if reason not in _REASONS]:
                raise query.error("reasons", f"must be of {', '.join(_REASONS)}, not {unknown[0]!r}")
        found.append(StatusFilter(kind, reasons))
    return tuple(found)


def read_owners(fields: Fields) -> tuple[str, ...]:
    urns = read_texts(fields, "owner_urns")
    if not 1 <= len(urns) <= _MOST_OWNERS:
        raise fields.error("owner_urns", f"must be a list of 1 to {_MOST_OWNERS} URNs of users")
    ids = [user_of_urn(urn) for urn in urns]
    for index, id_ in enumerate(ids):
        if id_ is None:
            raise fields.error(
                f"owner_urns[{index}]", f"must look like tml:organization_user:ID, not {urns[index][:60]!r}"
            )
    return tuple(id_ for id_ in ids if id_ is not None)


def _cursor(fields: Fields) -> SessionCursor:
    return SessionCursor(read_time(fields, "last_created_at"), fields.text("last_session_id"))


def read_time(fields: Fields, name: str) -> float:
    """Seconds since 1970."""
    text = fields.text(name)
    try:
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise fields.error(name, f"must be an ISO 8601 time, not {text[:60]!r}") from None


def one_of(fields: Fields, name: str, known: tuple[T, ...], default: T | None) -> T:
    value = fields.raw(name)
    for each in known:
        if value == each or (value is None and each == default):
            return each
    raise fields.error(name, f"must be one of {', '.join(known)}, not {str(value)[:60]!r}")


def _not_empty(fields: Fields, name: str) -> list[object]:
    items = fields.array(name)
    if not items:
        raise fields.error(name, "is an empty list; leave it out to match all")
    return items


def read_texts(fields: Fields, name: str) -> tuple[str, ...]:
    items = fields.array(name)
    if not all(isinstance(item, str) and item and len(item) <= 1024 for item in items):
        raise WireError(f"{fields.where}.{name}" if fields.where else name, "must be a list of texts")
    return tuple(str(item) for item in items)
