"""tinsmith org, user, team, project, keys and audit: on a data folder, as an operator has them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tinsmith.cli import main


class Office:
    """The operator's commands on one data folder."""

    def __init__(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data = data
        self.capsys = capsys

    def __call__(self, *words: str) -> str:
        code = main([*words, "--data", str(self.data)])
        out, err = self.capsys.readouterr()
        assert code == 0, err
        return out

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))

    def fails(self, *words: str) -> str:
        """One line that says why."""
        assert main([*words, "--data", str(self.data)]) == 1
        out, err = self.capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return str(err)

    def audit(self, *words: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = self.json("audit", *words)
        return events


@pytest.fixture
def office(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Office:
    return Office(tmp_path, capsys)


def test_an_organization_is_made_renamed_disabled_and_deleted(office: Office) -> None:
    org = office.json("org", "create", "lab")
    assert "already" in office.fails("org", "create", "lab")
    assert office.json("org", "list") == [org]
    assert office.json("org", "rename", "lab", "laboratory")["name"] == "laboratory"
    assert office.json("org", "disable", org["id"])["state"] == "disabled"
    assert office.json("org", "enable", "laboratory")["state"] == "enabled"
    assert office.json("org", "show", "laboratory")["projects"] == ["Default"]
    assert "--yes" in office.fails("org", "delete", "laboratory")
    assert "deleted laboratory" in office("org", "delete", "laboratory", "--yes")
    assert office.json("org", "list") == []
    assert "no organization 'laboratory'" in office.fails("org", "show", "laboratory")
    office("org", "create", "laboratory")  # the name is free again


def test_users_have_roles_and_can_belong_to_several_organizations(office: Office) -> None:
    office("org", "create", "lab")
    user = office.json("user", "create", "ada@example.org", "--name", "Ada", "--role", "admin")
    assert (user["name"], user["email"], user["role"]) == ("Ada", "ada@example.org", "admin")
    assert "already" in office.fails("user", "create", "ada@example.org")
    office("org", "create", "other")
    assert "--org" in office.fails("user", "list")
    again = office.json("user", "create", "ada@example.org", "--org", "other")
    assert (again["id"], again["role"]) == (user["id"], "member")
    assert office.json("user", "role", "Ada", "billing-admin", "--org", "other")["role"] == "billing-admin"
    assert office.json("user", "show", "Ada", "--org", "lab")["projects"] == ["Default (admin)"]
    assert office.json("user", "disable", "Ada", "--org", "lab")["state"] == "disabled"
    assert office.json("user", "list", "--org", "other")[0]["state"] == "disabled"
    office("user", "enable", "ada@example.org", "--org", "lab")
    office("user", "delete", "Ada", "--org", "lab", "--yes")
    assert office.json("user", "list", "--org", "lab") == []
    assert [row["id"] for row in office.json("user", "list", "--org", "other")] == [user["id"]]
    office("user", "delete", "Ada", "--org", "other", "--yes")
    anew = office.json("user", "create", "ada@example.org", "--org", "lab")
    assert anew["id"] != user["id"]


def test_a_key_is_its_users_and_goes_with_it(office: Office) -> None:
    office("org", "create", "lab")
    office("user", "create", "ada@example.org")
    key = office.json("keys", "create", "laptop", "--org", "lab", "--user", "ada@example.org")
    assert (key["org"], key["user"], key["state"]) == ("lab", "ada@example.org", "valid")
    assert re.fullmatch(r"tml-[\w-]{43}", key["key"])
    assert office.json("user", "show", "ada@example.org")["keys"] == ["laptop"]
    assert "no user 'bob'" in office.fails("keys", "create", "x", "--org", "lab", "--user", "bob")
    office("user", "delete", "ada@example.org", "--yes")
    (row,) = office.json("keys", "list")
    assert (row["state"], row["user"]) == ("revoked", "ada")


def test_projects_have_roles_for_users_teams_and_everyone(office: Office) -> None:
    office("org", "create", "lab")
    project = office.json("project", "create", "papers")
    assert (project["everyone"], project["state"]) == (None, "open")
    for user in ("ann", "bob"):
        office("user", "create", user)
    office("team", "create", "readers")
    office("team", "add", "readers", "bob")
    assert "already" in office.fails("team", "add", "readers", "bob")
    office("project", "grant", "papers", "member", "--user", "ann")
    office("project", "grant", "papers", "viewer", "--team", "readers")
    shown = office.json("project", "show", "papers")
    assert (shown["users"], shown["teams"]) == (["ann (member)"], ["readers (viewer)"])
    assert office.json("user", "show", "bob")["projects"] == ["Default (member)", "papers (viewer)"]
    office("project", "grant", "papers", "sampler", "--everyone")
    assert office.json("user", "show", "bob")["projects"][1] == "papers (sampler, viewer)"
    office("project", "revoke", "papers", "--team", "readers")
    assert "no role" in office.fails("project", "revoke", "papers", "--team", "readers")
    office("project", "revoke", "papers", "--everyone")
    assert office.json("user", "show", "bob")["projects"] == ["Default (member)"]
    assert office.json("team", "list") == [
        {"id": office.json("team", "list")[0]["id"], "name": "readers", "users": ["bob"]}
    ]
    office("team", "remove", "readers", "bob")
    office("team", "delete", "readers")
    assert office.json("team", "list") == []


def test_projects_are_renamed_archived_and_deleted_but_for_the_default_one(office: Office) -> None:
    office("org", "create", "lab")
    office("project", "create", "papers", "--everyone", "member")
    assert office.json("project", "rename", "papers", "articles")["name"] == "articles"
    assert office.json("project", "archive", "articles")["state"] == "archived"
    assert office.json("project", "unarchive", "articles")["state"] == "open"
    for act in (["archive"], ["delete", "--yes"]):
        assert "default" in office.fails("project", act[0], "Default", *act[1:])
    assert "--yes" in office.fails("project", "delete", "articles")
    office("project", "delete", "articles", "--yes")
    assert [row["name"] for row in office.json("project", "list")] == ["Default"]
    office("project", "create", "articles")


def test_keys_have_scopes_a_project_and_an_end(office: Office) -> None:
    office("org", "create", "lab")
    project = office.json("project", "create", "papers")
    key = office.json(
        "keys", "create", "ci", "--org", "lab", "--scope", "read", "--scope", "sample",
        "--project", "papers", "--expires", "30d", "--note", "for the robot",
    )  # fmt: skip
    assert key["scopes"] == ["read", "sample"]
    assert (key["project_id"], key["note"]) == (project["id"], "for the robot")
    assert key["expires_at"][:10] == time.strftime("%Y-%m-%d", time.gmtime(time.time() + 30 * 86400))
    assert "before" in office.fails("keys", "create", "x", "--org", "lab", "--expires", "2020-01-01")
    assert "no project" in office.fails("keys", "create", "x", "--org", "lab", "--project", "books")
    rotated = office.json("keys", "rotate", "ci", "--overlap", "24h")
    assert rotated["key"] != key["key"]
    assert (rotated["scopes"], rotated["project_id"]) == (key["scopes"], key["project_id"])
    assert "2 valid keys" in office.fails("keys", "revoke", "ci")
    office("keys", "revoke", str(key["number"]))
    office("keys", "revoke", rotated["key"])
    assert [row["state"] for row in office.json("keys", "list", "--org", "lab")] == ["revoked", "revoked"]
    for wrong in (["--scope", "everything"], ["--expires", "soon"]):
        with pytest.raises(SystemExit):
            office("keys", "create", "x", *wrong)


def test_every_act_is_in_the_audit_log_with_who_did_it(office: Office) -> None:
    office("org", "create", "lab")
    office("user", "create", "ada@example.org")
    office("user", "role", "ada@example.org", "admin")
    office("project", "create", "papers")
    office("project", "grant", "papers", "member", "--user", "ada@example.org")
    office("team", "create", "readers")
    office("team", "add", "readers", "ada@example.org")
    key = office.json("keys", "create", "laptop", "--org", "lab", "--user", "ada@example.org")
    office("keys", "rotate", "laptop")
    office("keys", "revoke", "laptop")
    office("project", "archive", "papers")
    office("org", "disable", "lab")
    log = office.audit()
    assert [entry["event"] for entry in log] == [
        "organization_create", "user_create", "user_role_set", "project_create", "project_grant_set",
        "team_create", "team_member_add", "api_key_create", "api_key_rotate", "api_key_revoke",
        "project_archive", "organization_disable",
    ]  # fmt: skip
    for entry in log:
        assert entry["outcome"] == "success"
        assert entry["event_details"]["actor"]["type"] == "operator"
        assert abs(time.time() - _seconds(entry["timestamp"])) < 60
    grant = log[4]["event_details"]
    assert grant["project_name"] == "papers"
    assert grant["action"]["type"] == "grant_set"
    assert (grant["action"]["principal_type"], grant["action"]["project_role"]) == ("user", "project_member")
    assert {entry["event"] for entry in office.audit("--type", "teams")} == {"team_create", "team_member_add"}
    assert office.audit("--day", "2020-01-01") == []
    assert key["key"] not in json.dumps(log)
    table = office("audit")
    assert re.search(r"project_grant_set +\S+ \(operator\) +papers +success", table)


def test_nothing_of_the_audit_log_can_be_changed(office: Office) -> None:
    import sqlite3

    office("org", "create", "lab")
    with sqlite3.connect(office.data / "tinsmith.db") as database:
        for statement in ("update audit_log set event = 'x'", "delete from audit_log"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                database.execute(statement)


@pytest.mark.parametrize("name", ["", " ", "x" * 257, "a\nb", "a\x7fb", "a\x9bb", "\u202eab"])
def test_a_name_that_is_none_is_refused(office: Office, name: str) -> None:
    assert "name" in office.fails("org", "create", name)
    assert office.json("org", "list") == []


@pytest.mark.parametrize(
    "words", [("org", "create", "\udcff"), ("org", "show", "a\udcff"), ("usage", "--org", "\udcff")]
)
def test_bytes_that_are_no_text_are_refused(
    office: Office, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        office(*words)
    assert ended.value.code == 2
    assert "\\udcff' is not valid UTF-8" in capsys.readouterr().err


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()
