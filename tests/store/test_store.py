"""The database: migrations, the writing thread, the log."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tinsmith.store import Store, checkpoints, commands, projects, runs, sessions, traces
from tinsmith.store.checkpoints import CheckpointRow, Replaced
from tinsmith.store.commands import CommandRow
from tinsmith.store.database import migrate
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER
from tinsmith.store.sessions import SessionRow
from tinsmith.store.tables import metadata
from tinsmith.store.traces import TraceChunk
from tinsmith.wire.paths import TinkerPath

from .rows import make_key

BIG = 2**62


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(Store.local_url(tmp_path))
    yield store
    store.close()


@pytest.fixture
def run(store: Store) -> RunRow:
    def write(connection: sa.Connection) -> RunRow:
        key = make_key(connection, "o")
        project = projects.find(connection, key.org_id, None)
        assert project is not None
        whose = (key.org_id, project.id, key.user_id)
        session = SessionRow("s", *whose, key.id, 1.0, None, None, None, ["t"], {"a": 1}, "x", None)
        sessions.add(connection, session)
        row = RunRow("s:train:0", *whose, "s", 0, 1.0, 1.0, "live", "m", {"rank": 4}, None, "f", "fp32", {})
        assert runs.add(connection, row)
        assert not runs.add(connection, replace(row, base_model="other"))
        return row

    return store.write_now(write)


def _command(run: RunRow, seq_id: int, **more: object) -> CommandRow:
    fields: dict[str, object] = {
        "org_id": run.org_id,
        "run_id": run.id,
        "seq_id": seq_id,
        "request_id": f"{run.id}:{seq_id}",
        "kind": "optim_step",
        "body": b"{}",
        "body_key": None,
        "encoding": "identity",
        "arrived_at": 1.0,
        **more,
    }
    return CommandRow(**fields)  # type: ignore[arg-type]


def test_the_migrations_lead_to_the_tables_as_they_are(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.begin() as connection:
        migrate(connection)
        migrate(connection)  # again
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_sqlite_is_set_up_to_survive_a_power_cut(store: Store, tmp_path: Path) -> None:
    def pragmas(connection: sa.Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return [connection.exec_driver_sql(f"pragma {name}").scalar() for name in names]

    assert store.write_now(pragmas) == ["wal", 2, 1]


def test_ids_are_64_bits_wide(store: Store, run: RunRow) -> None:
    store.write_now(lambda connection: commands.add(connection, _command(run, BIG)))
    (row,) = store.write_now(lambda connection: commands.log_of_run(connection, run.id, SERVER))
    assert row.seq_id == BIG


def test_a_place_in_a_run_is_given_once(store: Store, run: RunRow) -> None:
    assert store.write_now(lambda connection: commands.add(connection, _command(run, 1))) is None
    other = _command(run, 1, request_id="other", kind="save_weights")
    assert store.write_now(lambda connection: commands.add(connection, other)) == f"{run.id}:1"
    (row,) = store.write_now(lambda connection: commands.log_of_run(connection, run.id, SERVER))
    assert row.kind == "optim_step"


def test_rows_need_what_they_refer_to(store: Store, run: RunRow) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        store.write_now(
            lambda connection: commands.add(connection, replace(_command(run, 1), run_id="nobody"))
        )


def test_a_failed_write_takes_no_other_along(store: Store, run: RunRow) -> None:
    def fail(connection: sa.Connection) -> None:
        commands.add(connection, _command(run, 99))
        raise RuntimeError("no")

    async def write() -> list[object]:
        work = [store.write(lambda c, seq=seq: commands.add(c, _command(run, seq))) for seq in range(20)]
        return await asyncio.gather(*work[:10], store.write(fail), *work[10:], return_exceptions=True)

    results = asyncio.run(write())
    assert [type(result) for result in results].count(RuntimeError) == 1
    seqs = [
        row.seq_id
        for row in store.write_now(lambda connection: commands.log_of_run(connection, run.id, SERVER))
    ]
    assert seqs == list(range(20))


def test_many_writes_share_a_commit(store: Store, run: RunRow) -> None:
    commits = 0

    def count(_connection: object) -> None:
        nonlocal commits
        commits += 1

    sa.event.listen(store._engine, "commit", count)

    async def write() -> None:
        await asyncio.gather(
            *(store.write(lambda c, seq=seq: commands.add(c, _command(run, seq))) for seq in range(200))
        )

    asyncio.run(write())
    assert commits < 50


def test_a_write_is_on_the_disk_before_it_is_told(store: Store, run: RunRow, tmp_path: Path) -> None:
    store.write_now(lambda connection: commands.add(connection, _command(run, 1)))
    other = sqlite3.connect(tmp_path / "tinsmith.db")
    assert other.execute("select count(*) from commands").fetchone() == (1,)
    other.close()


def test_reads_see_what_was_written_and_do_not_wait_for_writes(store: Store, run: RunRow) -> None:
    async def both() -> float:
        slow = asyncio.ensure_future(store.write(lambda connection: time.sleep(0.5)))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        row = await store.read(lambda connection: runs.get(connection, run.id, SERVER))
        assert row == run
        waited = time.monotonic() - started
        await slow
        return waited

    assert asyncio.run(both()) < 0.3


def test_a_closed_store_refuses(tmp_path: Path) -> None:
    store = Store.open(Store.local_url(tmp_path))
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.write_now(lambda connection: None)


def test_an_outcome_is_written_once(store: Store, run: RunRow) -> None:
    def write(connection: sa.Connection) -> CommandRow | None:
        commands.add(connection, _command(run, 1))
        commands.finish(
            connection, f"{run.id}:1", now=2.0, result=b"{}", result_type="json", usage={"train": 3}
        )
        commands.finish(connection, f"{run.id}:1", now=3.0, error="late", category="user")
        return commands.by_request(connection, f"{run.id}:1", SERVER)

    row = store.write_now(write)
    assert row is not None
    assert (row.status, row.result, row.error, row.finished_at) == ("done", b"{}", None, 2.0)


def test_results_go_after_they_were_fetched_and_not_before(store: Store, run: RunRow) -> None:
    def write(connection: sa.Connection) -> list[list[str]]:
        for seq_id in (1, 2):
            commands.add(connection, _command(run, seq_id))
            commands.finish(
                connection, f"{run.id}:{seq_id}", now=2.0, result_key=f"results/{seq_id}", result_type="json"
            )
        commands.fetched(connection, [f"{run.id}:1"], 10.0)
        commands.fetched(connection, [f"{run.id}:1"], 50.0)
        return [commands.drop_results(connection, before) for before in (10.0, 11.0, 11.0)]

    assert store.write_now(write) == [[], ["results/1"], []]
    assert store.write_now(commands.blob_keys) == {"results/2"}


def test_bodies_stay_until_no_replay_needs_them(store: Store, run: RunRow) -> None:
    def log(
        connection: sa.Connection, seq_id: int, kind: str, key: str | None, error: str | None = None
    ) -> None:
        commands.add(connection, _command(run, seq_id, kind=kind, body=None, body_key=key))
        commands.finish(
            connection, f"{run.id}:{seq_id}", now=1.0, result=b"", result_type="json", error=error
        )

    def write(connection: sa.Connection) -> list[str]:
        log(connection, 1, "forward_backward", "bodies/1")
        log(connection, 2, "optim_step", None)
        log(connection, 3, "forward_backward", "bodies/3")  # its gradients are in no checkpoint
        log(connection, 4, "save_weights", None)
        log(connection, 5, "forward_backward", "bodies/5", "wrong")
        log(connection, 6, "forward", "bodies/6")
        log(connection, 7, "forward_backward", "bodies/7")
        commands.add(connection, _command(run, 8, kind="forward_backward", body=None, body_key="bodies/8"))
        checkpoints.add(connection, _checkpoint(run, "passing", seq_id=4, name="passing", expires_at=9.0))
        return commands.drop_replayable_bodies(connection)

    assert store.write_now(write) == ["bodies/5", "bodies/6"]
    store.write_now(lambda connection: checkpoints.add(connection, _checkpoint(run, "c", seq_id=4)))
    assert store.write_now(commands.drop_replayable_bodies) == ["bodies/1"]
    assert store.write_now(lambda connection: runs.set_snapshot(connection, run.id, "snapshots/a", 3)) is None
    assert store.write_now(commands.drop_replayable_bodies) == ["bodies/3"]
    earlier = store.write_now(lambda connection: runs.set_snapshot(connection, run.id, "snapshots/b", 4))
    assert earlier == "snapshots/a"
    store.write_now(lambda connection: sessions.finish(connection, "s", "success", None, 9.0))
    assert store.write_now(commands.drop_replayable_bodies) == ["bodies/7"]


def test_a_command_is_settled_once_its_outcome_is_written_down(store: Store, run: RunRow) -> None:
    def look(connection: sa.Connection) -> list[bool]:
        commands.add(connection, _command(run, 1))
        commands.add(connection, _command(run, 2))
        commands.finish(connection, f"{run.id}:1", now=1.0, error="no")
        return [commands.is_settled(connection, run.id, seq_id) for seq_id in (1, 2)]

    assert store.write_now(look) == [True, False]


def _checkpoint(run: RunRow, id_: str, **more: object) -> CheckpointRow:
    fields: dict[str, object] = {
        "id": id_,
        "org_id": run.org_id,
        "run_id": run.id,
        "kind": "training",
        "name": "n",
        "seq_id": 1,
        "folder": f"checkpoints/{id_}",
        "size_bytes": 5,
        "created_at": 1.0,
        "expires_at": None,
        "user_metadata": {"a": "b"},
        **more,
    }
    return CheckpointRow(**fields)  # type: ignore[arg-type]


def test_one_name_may_be_both_a_state_and_a_sampler_and_overwriting_answers_the_old_one(
    store: Store, run: RunRow
) -> None:
    def write(connection: sa.Connection) -> list[Replaced | None]:
        return [
            checkpoints.add(connection, _checkpoint(run, "a")),
            checkpoints.add(connection, _checkpoint(run, "b", kind="sampler")),
            checkpoints.add(connection, _checkpoint(run, "c", seq_id=2)),
        ]

    assert store.write_now(write) == [None, None, Replaced("a", "checkpoints/a")]
    path = TinkerPath(run.id, "training", "n")
    found = store.write_now(lambda connection: checkpoints.find(connection, path, SERVER, 2.0))
    assert found == _checkpoint(run, "c", seq_id=2)
    assert store.write_now(checkpoints.folders) == {"checkpoints/b", "checkpoints/c"}


def test_an_expired_checkpoint_is_found_no_more(store: Store, run: RunRow) -> None:
    store.write_now(lambda connection: checkpoints.add(connection, _checkpoint(run, "a", expires_at=10.0)))
    path = TinkerPath(run.id, "training", "n")
    look = [
        store.write_now(lambda connection, now=now: checkpoints.find(connection, path, SERVER, now))
        for now in (9.0, 10.0)
    ]
    assert [found is not None for found in look] == [True, False]
    assert [
        row.id for row in store.write_now(lambda connection: checkpoints.expired(connection, SERVER, 10.0))
    ] == ["a"]


def test_times_of_requests_stay_within_their_bounds(store: Store, run: RunRow) -> None:
    def chunk(written_at: float, size: int) -> TraceChunk:
        return TraceChunk(run.org_id, run.session_id, written_at, 100, bytes([int(written_at)]) * size)

    def left() -> list[int]:
        chunks = store.write_now(lambda connection: traces.of_session(connection, run.session_id, SERVER))
        return [each[0] for each in chunks]

    for at in range(1, 8):
        store.write_now(lambda connection, at=at: traces.add(connection, chunk(at, 10)))
    assert left() == [1, 2, 3, 4, 5, 6, 7]
    assert store.write_now(lambda connection: traces.keep_newest(connection, run.session_id, 550)) == 500
    assert left() == [3, 4, 5, 6, 7]
    store.write_now(lambda connection: traces.drop_old(connection, 4.0, 10**6))
    assert left() == [4, 5, 6, 7]
    store.write_now(lambda connection: traces.drop_old(connection, 0.0, 25))
    assert left() == [6, 7]
    store.write_now(lambda connection: traces.drop_old(connection, 0.0, 0))
    assert left() == []
