"""The audit log, as the SDK's admin client and its old REST client read it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import tinker
from tinker.types import AuditLogEntry

from tests.harness import Raw, Server, detail


@pytest.fixture(scope="module")
def org(server: Server) -> str:
    """An organization with an administrator and a member, who have done something."""
    server.operate("org", "create", "audited")
    server.operate("user", "create", "boss@example.org", "--org", "audited", "--role", "admin")
    server.operate("user", "create", "clerk@example.org", "--org", "audited")
    server.operate("project", "create", "papers", "--org", "audited")
    server.operate("project", "grant", "papers", "member", "--user", "clerk@example.org", "--org", "audited")
    return "audited"


@pytest.fixture(scope="module")
def boss(server: Server, org: str) -> str:
    return server.new_key("of boss", "--org", org, "--user", "boss@example.org")


@pytest.fixture(scope="module")
def clerk(server: Server, org: str) -> str:
    return server.new_key("of clerk", "--org", org, "--user", "clerk@example.org")


@pytest.fixture(scope="module")
def checkpoint(server: Server, clerk: str) -> str:
    """A checkpoint to which everything has happened."""
    raw = server.raw(clerk)
    run = raw.run(raw.session())
    path = str(raw.result(raw.save(run, 1, "c"))["path"])
    load = {"session_id": raw.session(), "model_seq_id": 0, "path": path, "optimizer": False}
    assert "error" not in raw.result(raw.ok("load_weights", load)["request_id"])
    below = f"training_runs/{run}/checkpoints/weights/c"
    assert raw.post(f"{below}/publish").status_code == 200
    assert raw.http.delete(f"{below}/publish").status_code == 200
    assert raw.http.put(f"{below}/ttl", json={"ttl_seconds": 7200}).status_code == 200
    assert raw.http.delete(below).status_code == 200
    return path


def entries(server: Server, key: str, **asked: object) -> list[AuditLogEntry]:
    client = tinker.AdminClient(base_url=server.url, api_key=key)
    return client.get_audit_log(**asked).result().entries  # type: ignore[arg-type]


def test_the_admin_client_reads_what_was_done(server: Server, boss: str, checkpoint: str) -> None:
    log = entries(server, boss)
    assert [entry.timestamp for entry in log] == sorted(entry.timestamp for entry in log)
    events = [entry.event for entry in log]
    for event in (
        "organization_create",
        "user_create",
        "project_create",
        "project_grant_set",
        "api_key_create",
    ):
        assert event in events
    (grant,) = [entry for entry in log if entry.event == "project_grant_set"]
    assert grant.event_details["project_name"] == "papers"
    assert grant.model_id is None
    with pytest.warns(FutureWarning):
        old = tinker.RestClient(base_url=server.url, api_key=boss).get_audit_log()
    assert old.result().entries == log


def test_what_happened_to_a_checkpoint_names_it_and_who_did_it(
    server: Server, boss: str, clerk: str, checkpoint: str
) -> None:
    about = entries(server, boss, event_type="checkpoints")
    log = [entry for entry in about if entry.tinker_path == checkpoint]
    acts = [entry.event.removeprefix("checkpoint_") for entry in log]
    assert acts == ["read", "publish", "unpublish", "ttl_set", "delete"]
    assert (log[0].purpose, log[0].model_id) == ("training", checkpoint.split("/")[2])
    who = tinker.RestClient(base_url=server.url, api_key=clerk).whoami().result()
    for entry in log:
        actor = entry.event_details["actor"]
        assert isinstance(actor, dict)
        assert (actor["urn"], actor["email"]) == (who.user_urn, "clerk@example.org")
        assert actor["key_id"]
        assert entry.event_details["outcome"] == "success"
    assert log[3].event_details["action"] == {"type": "ttl_set", "ttl_seconds": 7200}


def test_moves_copies_and_replacements_are_in_it(server: Server, org: str, boss: str, clerk: str) -> None:
    raw = server.raw(clerk)
    session = raw.session()
    run = raw.run(session)
    path = raw.result(raw.save(run, 1, "d"))["path"]
    assert raw.result(raw.save(run, 2, "d", overwrite=True))["path"] == path
    assert raw.http.put(f"sessions/{session}/project", json={"project_id": "papers"}).status_code == 200
    copy = raw.ok("copy_weights", {"source_path": path, "destination_project_id": "papers"})["tinker_path"]
    # Another organization, with a key of this one: both are told.
    stranger = server.new_key("reads with a key")
    other = {"source_path": path, "destination_project_id": "Default", "weights_access_token": clerk}
    assert server.raw(stranger).post("copy_weights", other).status_code == 200
    load = {"model_seq_id": 0, "path": path, "optimizer": False, "weights_access_token": clerk}
    theirs = server.raw(stranger)
    loaded = theirs.ok("load_weights", {"session_id": theirs.session(), **load})
    assert "error" not in theirs.result(loaded["request_id"])
    log = entries(server, boss)
    about = {p: [e.event for e in log if e.tinker_path == p] for p in (path, copy)}
    assert about[path] == ["checkpoint_overwrite", "checkpoint_read", "checkpoint_read"]
    assert [e.purpose for e in log if e.tinker_path == path][1:] == ["copy", "training"]
    assert about[copy] == ["checkpoint_copy"]
    assert [e.event_details["session_id"] for e in log if e.event == "session_move"] == [session]


def test_samples_from_weights_are_told_once_and_what_is_not_there_is_not(
    server: Server, boss: str, clerk: str
) -> None:
    raw = server.raw(clerk)
    run = raw.run(raw.session())
    save = {"model_id": run, "seq_id": 1, "path": "e"}
    path = raw.result(raw.ok("save_weights_for_sampler", save)["request_id"])["path"]
    sample = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}, "model_path": path}
    for _ in range(3):
        raw.result(raw.ok("asample", {**sample, "sampling_params": {"max_tokens": 1}})["request_id"])
    missing = path.replace("/e", "/none")
    assert raw.post("asample", {**sample, "model_path": missing}).status_code == 404
    load = {"session_id": raw.session(), "model_seq_id": 0, "path": missing}
    assert "error" in raw.result(raw.ok("load_weights", load)["request_id"])
    log = entries(server, boss, event_type="checkpoints")
    assert [(e.event, e.purpose) for e in log if e.tinker_path == path] == [("checkpoint_read", "sampling")]
    assert not [e for e in log if e.tinker_path == missing]


def test_what_an_operator_takes_away_is_in_it(server: Server, boss: str, tmp_path: Path) -> None:
    server.operate("backup", "--out", str(tmp_path / "copy"))
    (entry,) = [entry for entry in entries(server, boss) if entry.event == "organization_backup"]
    actor = entry.event_details["actor"]
    assert isinstance(actor, dict)
    assert actor["type"] == "operator"


def test_events_can_be_asked_for_by_type_and_day(server: Server, boss: str, checkpoint: str) -> None:
    everything = entries(server, boss)
    parts = {
        kind: entries(server, boss, event_type=kind)
        for kind in ("organizations", "teams", "projects", "checkpoints")
    }
    assert parts["teams"] == []
    assert sorted(e.timestamp for part in parts.values() for e in part) == [e.timestamp for e in everything]
    today = datetime.now(UTC).date()
    assert entries(server, boss, day=today) == everything
    assert entries(server, boss, day=today - timedelta(days=1)) == []
    assert entries(server, boss, day=date(1970, 1, 1)) == []


def test_pages_can_be_asked_for(server: Server, boss: str, checkpoint: str) -> None:
    raw = server.raw(boss)
    whole = raw.get("audit").json()
    assert whole["cursor"] == {
        "offset": 0,
        "limit": len(whole["entries"]),
        "total_count": len(whole["entries"]),
    }
    page = raw.get("audit", params={"limit": 2, "offset": 1}).json()
    assert page["entries"] == whole["entries"][1:3]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": len(whole["entries"])}


@pytest.mark.parametrize(
    "query", [{"event_type": "secrets"}, {"day": "yesterday"}, {"day": "2026-13-01"}, {"day": "20260101"},
              {"day": "2026-W01-1"}, {"limit": "many"}],
)  # fmt: skip
def test_a_wrong_question_is_a_400_that_names_what_is_wrong(
    server: Server, boss: str, query: dict[str, str]
) -> None:
    answer = server.raw(boss).get("audit", params=query)
    assert (answer.status_code, detail(answer).startswith(next(iter(query)))) == (400, True)


def test_the_log_is_for_administrators_and_says_who_else_asked(
    server: Server, org: str, boss: str, clerk: str
) -> None:
    with pytest.raises(tinker.PermissionDeniedError, match="the organization's role admin"):
        entries(server, clerk)
    (denied,) = [entry for entry in entries(server, boss) if entry.event_details["outcome"] == "denied"]
    actor = denied.event_details["actor"]
    assert isinstance(actor, dict)
    assert (denied.event, actor["email"]) == ("organization_audit_read", "clerk@example.org")
    narrow = server.new_key("narrow", "--org", org, "--user", "boss@example.org", "--scope", "train")
    assert server.raw(narrow).get("audit").status_code == 403
    auditor = server.new_key("auditor", "--org", org, "--user", "boss@example.org", "--scope", "audit")
    assert server.raw(auditor).get("audit").status_code == 200
    assert server.raw(auditor).get("training_runs").json()["training_runs"] == []


def test_no_other_organization_is_in_it(server: Server, raw: Raw, boss: str, checkpoint: str) -> None:
    urns = {entry.event_details["organization_urn"] for entry in entries(server, boss)}
    assert len(urns) == 1
    assert urns.isdisjoint(e["event_details"]["organization_urn"] for e in raw.get("audit").json()["entries"])
