"""Data folders of earlier versions: every row is still there, and has got what it lacked."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import tinsmith.store
from tinsmith.store import Store, keys, people, projects, runs, sessions
from tinsmith.store.scope import SERVER


def _make(folder: Path, revision: str, statements: str) -> None:
    """A database as the version with `revision` left it."""
    config = Config()
    config.set_main_option("script_location", str(Path(tinsmith.store.__file__).parent / "migrations"))
    engine = sa.create_engine(Store.local_url(folder))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    with sqlite3.connect(folder / "tinsmith.db") as database:
        database.executescript(statements)
    database.close()


BEFORE_USERS = """
insert into organizations (id, name, created_at) values 
    ('o1', 'acme', 1), ('o2', 'other', 2), ('o3', 'empty', 3);
insert into api_keys (id, org_id, name, prefix, hash, admin, created_at, last_used_at, revoked_at) values
    ('k1', 'o1', 'ann', 'tml-a', 'h1', 0, 5, null, null),
    ('k2', 'o1', 'bob', 'tml-b', 'h2', 0, 6, null, null),
    ('k3', 'o1', 'ann', 'tml-c', 'h3', 0, 7, null, 8), ('k4', 'o2', 'ann', 'tml-d', 'h4', 1, 8, null, null);
insert into sessions (id, org_id, key_id, created_at, tags, sdk_version, project_id) values
    ('s1', 'o1', 'k1', 10, '[]', 'x', null), ('s2', 'o1', 'k2', 11, '[]', 'x', 'papers'),
    ('s3', 'o1', 'k2', 12, '[]', 'x', 'Default'), ('s4', 'o2', 'k4', 13, '[]', 'x', 'papers');
insert into runs (id, org_id, session_id, model_seq_id, created_at, last_request_at, state, base_model, lora,
    fingerprint, dtype, versions) values
    ('s1:train:0', 'o1', 's1', 0, 10, 10, 'live', 'm', '{}', 'f', 'fp32', '{}'),
    ('s4:train:0', 'o2', 's4', 0, 10, 10, 'live', 'm', '{}', 'f', 'fp32', '{}');
insert into commands (run_id, seq_id, request_id, kind, body, encoding, arrived_at, status) values
    ('s1:train:0', 1, 's1:train:0:1', 'optim_step', x'7b7d', 'identity', 1, 'queued');
insert into checkpoints (id, org_id, run_id, kind, name, seq_id, folder, created_at) values
    ('c1', 'o1', 's1:train:0', 'training', 'n', 1, 'checkpoints/c1', 1);
insert into sampling_sessions (id, org_id, session_id, created_at, base_model, ephemeral, clones) values
    ('s1:sample:0', 'o1', 's1', 1, 'm', 0, 0);
"""


def test_who_had_only_organizations_and_keys_gets_users_and_projects(tmp_path: Path) -> None:
    _make(tmp_path, "0001", BEFORE_USERS)
    store = Store.open(Store.local_url(tmp_path))
    rows = {row.id: row for row in store.write_now(keys.every)}
    assert [(rows[id_].number, rows[id_].user_name, rows[id_].role) for id_ in ("k1", "k2", "k3", "k4")] == [
        (1, "ann", "admin"), (2, "bob", "member"), (3, "ann", "admin"), (4, "ann", "admin"),
    ]  # fmt: skip
    assert rows["k1"].user_id == rows["k3"].user_id != rows["k4"].user_id
    by_org = {org: store.write_now(lambda c, org=org: projects.of_org(c, org)) for org in ("o1", "o2", "o3")}
    assert {org: len(rows) for org, rows in by_org.items()} == {"o1": 3, "o2": 2, "o3": 1}
    assert all([row.name for row in rows if row.is_default] == ["Default"] for rows in by_org.values())
    assert store.write_now(lambda c: people.members(c, "o3")) == []

    def project_of(connection: sa.Connection, session: str) -> tuple[str, str]:
        row = sessions.get(connection, session, SERVER)
        assert row is not None
        project = projects.find(connection, row.org_id, row.project_id)
        assert project is not None
        return project.org_id, project.name

    assert store.write_now(lambda c: project_of(c, "s1")) == ("o1", "Default")
    assert store.write_now(lambda c: project_of(c, "s2")) == ("o1", "papers")
    assert store.write_now(lambda c: project_of(c, "s3"))[1].startswith("Default ")
    assert store.write_now(lambda c: project_of(c, "s4")) == ("o2", "papers")
    run = store.write_now(lambda c: runs.get(c, "s1:train:0", SERVER))
    assert run is not None
    (default,) = [row for row in by_org["o1"] if row.is_default]
    assert (run.user_id, run.project_id) == (rows["k1"].user_id, default.id)
    store.close()
    with sqlite3.connect(tmp_path / "tinsmith.db") as database:
        counts = [
            database.execute(f"select count(*) from {table}").fetchone()[0]
            for table in ("sessions", "runs", "commands", "checkpoints", "sampling_sessions")
        ]
        assert counts == [4, 2, 1, 1, 1]
        assert database.execute("select org_id, body from commands").fetchone() == ("o1", b"{}")
        assert database.execute("pragma foreign_key_check").fetchall() == []
