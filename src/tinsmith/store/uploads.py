"""Weights that are being uploaded, until a checkpoint is made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass

import sqlalchemy as sa

from .scope import Scope
from .tables import uploads


@dataclass(frozen=True, slots=True)
class UploadRow:
    """`path` is that of the checkpoint, once there is one."""

    id: str
    org_id: str
    project_id: str
    user_id: str
    key_id: str
    base_model: str
    lora: dict[str, object]
    folder: str
    created_at: float
    path: str | None = None


def add(connection: sa.Connection, row: UploadRow) -> None:
    values = {name: getattr(row, name) for name in UploadRow.__dataclass_fields__}
    connection.execute(uploads.insert().values({**values, "lora": json.dumps(row.lora)}))


def get(connection: sa.Connection, upload_id: str, scope: Scope) -> UploadRow | None:
    row = connection.execute(
        uploads.select().where(scope.rows(uploads), uploads.c.id == upload_id)
    ).one_or_none()
    return _read(row) if row is not None else None


def finish(connection: sa.Connection, upload_id: str, path: str) -> None:
    connection.execute(uploads.update().where(uploads.c.id == upload_id).values(path=path))


def old(connection: sa.Connection, before: float) -> list[UploadRow]:
    """Some that were begun long ago."""
    query = uploads.select().where(uploads.c.created_at < before).limit(100)
    return [_read(row) for row in connection.execute(query)]


def delete(connection: sa.Connection, upload_id: str) -> None:
    connection.execute(uploads.delete().where(uploads.c.id == upload_id))


def folders(connection: sa.Connection) -> set[str]:
    """Those of uploads that no checkpoint has been made of yet."""
    query = sa.select(uploads.c.folder).where(uploads.c.path.is_(None))
    return {str(key) for key in connection.scalars(query)}


def _read(row: sa.Row[tuple[object, ...]]) -> UploadRow:
    values = dict(row._mapping)
    return UploadRow(**{**values, "lora": json.loads(values["lora"])})
