"""Which blobs the database refers to: everything else in the blob store is left over."""

from __future__ import annotations

import sqlalchemy as sa

from . import checkpoints, commands, runs, samplers, uploads


def blobs(connection: sa.Connection) -> set[str]:
    """All keys that some row of some table names."""
    return (
        commands.blob_keys(connection)
        | checkpoints.folders(connection)
        | runs.snapshots(connection)
        | uploads.folders(connection)
        | samplers.own_files(connection)
    )
