"""Searching for checkpoints: the filters, and where a page begins."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields
from .paths import CheckpointKind
from .session_search import OWNERS, OwnerKind, one_of, read_owners, read_texts, read_time

_KINDS: tuple[CheckpointKind, ...] = ("training", "sampler", "external")


@dataclass(frozen=True, slots=True)
class CheckpointCursor:
    """Behind which checkpoint a page begins."""

    created_at: float
    checkpoint_id: str


@dataclass(frozen=True, slots=True)
class CheckpointSearch:
    """What a checkpoint must be to be found. None, or nothing, does not narrow."""

    project_ids: tuple[str, ...] | None
    user_metadata: dict[str, str]
    kind: CheckpointKind | None
    owner: OwnerKind
    owner_ids: tuple[str, ...]
    base_models: tuple[str, ...] | None
    limit: int
    cursor: CheckpointCursor | None

    @classmethod
    def read(cls, fields: Fields) -> CheckpointSearch:
        owner = fields.optional_child("owner") or Fields({}, "owner")
        whose = one_of(owner, "type", OWNERS, "own")
        return cls(
            project_ids=read_texts(fields, "project_ids") if fields.has("project_ids") else None,
            user_metadata=fields.text_metadata("user_metadata") or {},
            kind=one_of(fields, "checkpoint_type", _KINDS, None) if fields.has("checkpoint_type") else None,
            owner=whose,
            owner_ids=read_owners(owner) if whose == "user" else (),
            base_models=read_texts(fields, "base_models") if fields.has("base_models") else None,
            limit=fields.optional_integer("limit", least=1, most=200) or 50,
            cursor=_cursor(fields.child("cursor")) if fields.has("cursor") else None,
        )


def _cursor(fields: Fields) -> CheckpointCursor:
    return CheckpointCursor(read_time(fields, "last_created_at"), fields.text("last_checkpoint_uuid"))
