"""Every statement on tenants' rows is held within a scope, and every scope leaves out what it must."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import sqlalchemy as sa

import tinsmith
from tinsmith.store import (
    Store,
    checkpoints,
    commands,
    people,
    projects,
    runs,
    samplers,
    sessions,
    traces,
)
from tinsmith.store.checkpoints import CheckpointRow
from tinsmith.store.commands import CommandRow
from tinsmith.store.runs import RunRow
from tinsmith.store.samplers import SamplingSessionRow
from tinsmith.store.scope import SERVER, Scope
from tinsmith.store.sessions import SessionRow
from tinsmith.store.traces import TraceChunk
from tinsmith.wire.paths import TinkerPath

from .rows import make_key

SOURCE = Path(tinsmith.__file__).parent

TENANTS = {
    "sessions",
    "runs",
    "commands",
    "checkpoints",
    "sampling_sessions",
    "session_metadata",
    "usage",
    "storage_spans",
    "limits",
    "trace_chunks",
    "uploads",
    "telemetry",
}

# Statements that take no scope: they change one row by the id that a scoped lookup gave, or they are
# the server's housekeeping over everybody's rows, whose answers reach no caller.
UNSCOPED = {
    "sessions.finish", "sessions.failed", "sessions.move",
    "runs.add", "runs.set_state", "runs.set_snapshot", "runs.drop_snapshots", "runs.snapshots", "runs.touch",
    "runs.set_turn", "runs.set_lost", "commands.body", "commands.is_settled", "commands.set_loaded",
    "commands.begin_again",
    "commands.add", "commands.finish", "commands.fetched", "commands.drop_results",
    "commands.drop_replayable_bodies", "commands.blob_keys",
    "checkpoints.add", "checkpoints.delete", "checkpoints.set_expiry", "checkpoints.set_published",
    "checkpoints.folders", "checkpoints.is_there", "checkpoints.shares_folder",
    "samplers.next_clone", "samplers.set_folder", "samplers.own_files",
    "uploads.finish", "uploads.old", "uploads.delete", "uploads.folders",
    "traces.keep_newest", "traces.drop_old",
    "telemetry.add", "telemetry.count", "telemetry.keep_newest", "telemetry.drop_old",
    # Rows are held within the scope by the table of usage; what they are joined with are their own parents.
    "ledger.rows", "ledger.sums", "ledger.spans",
    "ledger.add", "ledger.begin_span", "ledger.end_span", "limits.drop",
    "orgs.delete", "projects.delete",
}  # fmt: skip


def tables_in(part: ast.AST, built: dict[str, set[str]]) -> set[str]:
    """The tenants' tables whose rows a piece of code reads, changes or deletes."""
    found: set[str] = set()
    for node in ast.walk(part):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in TENANTS:
            found |= {node.value.id} if node.attr in ("select", "update", "delete", "c", "alias") else set()
        elif isinstance(node, ast.Name):
            found |= built.get(node.id, set())
    return found


def test_every_statement_on_tenants_rows_is_within_a_scope_or_named_here() -> None:
    unscoped: set[str] = set()
    for file in sorted((SOURCE / "store").glob("*.py")):
        tree = ast.parse(file.read_text())
        built: dict[str, set[str]] = {}  # statements, and parts of some, that the module has built once
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                built[node.targets[0].id] = tables_in(node.value, built)
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            text = ast.unparse(function)
            runs_it = "connection." in text
            if runs_it and any(f"scope.rows({table})" not in text for table in tables_in(function, built)):
                unscoped.add(f"{file.stem}.{function.name}")
    assert unscoped == UNSCOPED


def test_the_api_and_whatever_knows_a_caller_asks_within_the_callers_scope() -> None:
    """`SERVER` is for what nobody asked for, and for what belongs to a row that was found within the
    caller's scope; the command line is the operator's, who sees everything. Whoever needs it elsewhere
    adds it here."""
    allowed = {
        "service/catalog.py": {"_views", "sweep"},
        "service/copies.py": {"copy"},  # of a checkpoint that the caller may read
        "service/external.py": {"archived", "file"},  # whoever has a signed URL is nobody in particular
        "service/limit_administration.py": {"_every"},  # the operator
        "service/limits.py": {"_look"},
        "service/metering.py": {"_accrue", "start"},
        # Of a run that is there: what its log says, and which checkpoints it has.
        "service/recovery.py": {"fail_open"},
        "service/replay.py": {"plan", "remedy"},
        # Of a sampling session as below: the run that has published its weights.
        "service/runs.py": {"take_up", "_revivable", "_revive"},
        # Of a sampling session that was found within the caller's scope: whether its weights are there.
        "service/samplers.py": {"_release_unnamed", "put_away", "why_gone"},
        "service/sessions.py": {"end_of", "look_for_ends", "take_up"},
        "service/uploads.py": {"put"},  # as above
        # A load that has been begun goes on with the checkpoint that was allowed to it then.
        "service/steps.py": {"_claim", "_publish_ephemeral", "find_checkpoint", "get_checkpoint"},
        "store/samplers.py": {"add"},
    }
    found: dict[str, set[str]] = {}
    for file in sorted(file for file in SOURCE.rglob("*.py") if "cli" not in file.parts):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and any(
                isinstance(node, ast.Name) and node.id == "SERVER" for node in ast.walk(function)
            ):
                found.setdefault(str(file.relative_to(SOURCE)), set()).add(function.name)
    assert {name: functions - {"look"} for name, functions in found.items()} == allowed


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(Store.local_url(tmp_path))


def _fill(connection: sa.Connection, org: str) -> Scope:
    """An organization with a run and all that belongs to it, in its default project and in another one;
    ids begin with the organization's name. Answers the scope of everything in it."""
    key = make_key(connection, org)
    default = projects.find(connection, key.org_id, None)
    other = projects.add(connection, key.org_id, "other", 1.0)
    assert default is not None
    someone = people.add(connection, key.org_id, "someone", None, "member", 1.0)
    assert someone is not None
    for project, user in ((default.id, key.user_id), (other.id, key.user_id), (other.id, someone.id)):
        name = f"{org}-{project}-{user}"
        whose = (key.org_id, project, user)
        sessions.add(connection, SessionRow(name, *whose, key.id, 1.0, None, None, None, [], None, "x", None))
        run = RunRow(f"{name}:train:0", *whose, name, 0, 1.0, 1.0, "live", "m", {}, None, "f", "fp32", {})
        runs.add(connection, run)
        command = CommandRow(key.org_id, run.id, 1, f"{run.id}:1", "optim_step", b"", None, "identity", 1.0)
        commands.add(connection, command)
        checkpoint = CheckpointRow(
            name, key.org_id, run.id, "sampler", "n", 1, f"f/{name}", 1, 1.0, 5.0, None
        )
        checkpoints.add(connection, checkpoint)
        sampler = SamplingSessionRow(
            f"{name}:sample:0", key.org_id, name, 1.0, "m", None, "s", None, True, 0, run.id, 1
        )
        samplers.add(connection, sampler)
        traces.add(connection, TraceChunk(key.org_id, name, 1.0, 1, b"x"))
    return Scope(key.org_id, key.user_id, None)


def _seen(connection: sa.Connection, scope: Scope, every: list[str]) -> dict[str, list[str]]:
    """By which way of asking which of the `every` named objects are found within a scope."""
    seen = {
        "session": [n for n in every if sessions.get(connection, n, scope)],
        "sessions": [row.id for row in sessions.page(connection, scope, 99, 0)],
        "unfinished": [row.id for row in sessions.unfinished(connection, scope)],
        "members": [n for n in every if sessions.members(connection, n, scope) != ([], [])],
        "run": [n for n in every if runs.get(connection, f"{n}:train:0", scope)],
        "runs": [row.session_id for row in runs.page(connection, scope, 99, 0)[0]],
        "command": [n for n in every if commands.by_request(connection, f"{n}:train:0:1", scope)],
        "commands": [n for n in every if commands.log_of_run(connection, f"{n}:train:0", scope)],
        "queued": [id_.partition(":")[0] for id_ in commands.runs_with_queued(connection, scope)],
        "checkpoint": [
            n for n in every
            if checkpoints.find(connection, TinkerPath(f"{n}:train:0", "sampler", "n"), scope, 2.0)
        ],
        "by id": [n for n in every if checkpoints.get(connection, n, scope, 2.0)],
        "newest": [n for n in every if checkpoints.newest(connection, f"{n}:train:0", "sampler", scope, 2.0)],
        "of_run": [n for n in every if checkpoints.of_run(connection, f"{n}:train:0", scope, 2.0)],
        "checkpoints": [row.id for row in checkpoints.page(connection, scope, 99, 0, 2.0)[0]],
        "expired": [row.id for row in checkpoints.expired(connection, scope, 9.0)],
        "sampler": [n for n in every if samplers.get(connection, f"{n}:sample:0", scope)],
        "unnamed": [n for n in every if samplers.published_by(connection, f"{n}:train:0", scope, 1)],
        "trace": [n for n in every if traces.of_session(connection, n, scope)],
        "ephemeral": [n for n in every if samplers.ephemeral_of(connection, n, scope)],
    }  # fmt: skip
    assert runs.page(connection, scope, 1, 0)[1] == len(seen["runs"])
    assert checkpoints.page(connection, scope, 1, 0, 2.0)[1] == len(seen["checkpoints"])
    return seen


def test_no_way_of_asking_leads_out_of_the_scope(store: Store) -> None:
    def look(connection: sa.Connection) -> None:
        ours, theirs = _fill(connection, "ours"), _fill(connection, "theirs")
        every = [row.id for row in sessions.page(connection, SERVER, 99, 0)]
        mine = [name for name in every if name.startswith("ours")]
        other = projects.find(connection, ours.org_id, "other")
        assert other is not None
        in_other = [name for name in mine if other.id in name]
        my_own_there = [name for name in in_other if name.endswith(ours.user_id)]
        assert (len(every), len(mine), len(in_other), len(my_own_there)) == (6, 3, 2, 1)
        only_own = Scope(ours.org_id, ours.user_id, frozenset(), frozenset({other.id}))
        nothing = Scope(ours.org_id, ours.user_id, frozenset())
        stranger = Scope(theirs.org_id, ours.user_id, None)
        for scope, expected in (
            (SERVER, every),
            (ours, mine),
            (stranger, [name for name in every if name not in mine]),
            (ours.within(other.id), in_other),
            (Scope(ours.org_id, ours.user_id, frozenset({other.id})), in_other),
            (only_own, my_own_there),
            (ours.mine().within(other.id), my_own_there),
            (nothing, []),
            (Scope("no such organization", ours.user_id, None), []),
        ):
            for way, names in _seen(connection, scope, every).items():
                assert sorted(names) == sorted(expected), (way, scope)
            if scope is not SERVER:
                assert Scope.from_json(scope.to_json()) == scope
            rows = [row for row in sessions.page(connection, SERVER, 99, 0) if scope.sees(row)]
            assert sorted(row.id for row in rows) == sorted(expected)

    store.write_now(look)
    store.close()


def test_a_published_checkpoint_is_found_by_its_path_alone(store: Store) -> None:
    def look(connection: sa.Connection) -> None:
        ours, theirs = _fill(connection, "ours"), _fill(connection, "theirs")
        (row, *_) = checkpoints.page(connection, theirs, 99, 0, 2.0)[0]
        checkpoints.set_published(connection, row.id, 1.5)
        assert checkpoints.find(connection, row.path, ours, 2.0) is None
        found = checkpoints.find(connection, row.path, ours, 2.0, published=True)
        assert found is not None
        assert found.id == row.id
        assert row.id not in [each.id for each in checkpoints.page(connection, ours, 99, 0, 2.0)[0]]
        assert checkpoints.of_run(connection, row.run_id, ours, 2.0) == []

    store.write_now(look)
    store.close()
