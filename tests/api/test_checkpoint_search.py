"""Searching for checkpoints, as SDK 0.39 does."""

from __future__ import annotations

from typing import Any

import pytest
from tinker import types

from tests.harness import MODEL, Raw, Server, detail

NOTES = {"stage": "one", "odd": 'a"b\\c%_', "ключ": "значение"}


@pytest.fixture(scope="module")
def mine(server: Server) -> list[str]:
    """An organization's key first, then its checkpoints' paths in the order of their making."""
    key = server.new_key("a-searcher")
    raw = server.raw(key)
    run = raw.run(raw.session())
    paths = [
        raw.result(raw.save(run, 1, "a", user_metadata=NOTES))["path"],
        raw.result(raw.save(run, 2, "b", user_metadata={"stage": "ONE"}))["path"],
    ]
    for seq_id, call, name in ((3, "save_weights_for_sampler", "c"), (4, "save_weights_external", "d")):
        body = {"model_id": run, "seq_id": seq_id, "path": name}
        paths.append(raw.result(raw.ok(call, body)["request_id"])["path"])
    return [key, *paths]


@pytest.fixture
def mine_raw(server: Server, mine: list[str]) -> Raw:
    return server.raw(mine[0])


def search(raw: Raw, **wanted: object) -> dict[str, Any]:
    answer = raw.ok("checkpoints/search", wanted)
    for item in answer["checkpoints"]:
        types.Checkpoint.model_validate(item)
        assert item["base_model"] == MODEL
    return answer


def paths(answer: dict[str, Any]) -> list[str]:
    return [item["tinker_path"] for item in answer["checkpoints"]]


def test_everything_of_ones_own_newest_first(mine_raw: Raw, mine: list[str]) -> None:
    answer = search(mine_raw)
    assert paths(answer) == mine[:0:-1]
    assert answer["next_cursor"] is None
    assert paths(search(mine_raw, owner={"type": "accessible"})) == mine[:0:-1]


def test_pages_follow_each_other_without_gap_or_repetition(mine_raw: Raw, mine: list[str]) -> None:
    found: list[str] = []
    cursor = None
    for _ in range(4):
        answer = search(mine_raw, limit=1, **({"cursor": cursor} if cursor else {}))
        found += paths(answer)
        cursor = answer["next_cursor"]
    assert found == mine[:0:-1]
    assert cursor is None


def test_filters_narrow_and_are_exact(mine_raw: Raw, mine: list[str]) -> None:
    _, a, b, c, d = mine
    for kind, expected in (("training", [b, a]), ("sampler", [c]), ("external", [d])):
        assert paths(search(mine_raw, checkpoint_type=kind)) == expected
    assert paths(search(mine_raw, user_metadata={"stage": "one"})) == [a]
    assert paths(search(mine_raw, user_metadata={"stage": "ONE"})) == [b]
    assert paths(search(mine_raw, user_metadata=NOTES)) == [a]
    for nothing in ({"stage": "on"}, {"stag": "one"}, {"stage": "one", "more": "x"}, {"%": "%"}):
        assert paths(search(mine_raw, user_metadata=nothing)) == []
    assert len(paths(search(mine_raw, base_models=[MODEL, "another/one"]))) == 4
    assert paths(search(mine_raw, base_models=["another/one"])) == []
    assert paths(search(mine_raw, base_models=[])) == []
    nobody = {"type": "user", "owner_urns": ["tml:organization_user:nobody"]}
    assert paths(search(mine_raw, owner=nobody)) == []


def test_what_others_have_is_not_found(server: Server, mine: list[str]) -> None:
    assert (
        paths(search(server.raw(server.new_key("a-searching-stranger")), owner={"type": "accessible"})) == []
    )


@pytest.mark.parametrize(
    ("wanted", "status", "says"),
    [
        ({"limit": 0}, 400, "limit"),
        ({"limit": 201}, 400, "limit"),
        ({"checkpoint_type": "weights"}, 400, "checkpoint_type: must be one of training, sampler, external"),
        ({"owner": {"type": "all"}}, 400, "owner.type"),
        ({"owner": {"type": "user"}}, 400, "owner_urns"),
        ({"owner": {"type": "user", "owner_urns": ["x"]}}, 400, "owner_urns[0]"),
        ({"base_models": "x"}, 400, "base_models"),
        ({"user_metadata": {"a": 1}}, 400, "user_metadata.a"),
        ({"cursor": {"last_created_at": "now", "last_checkpoint_uuid": "x"}}, 400, "last_created_at"),
        ({"cursor": {"last_created_at": "2026-01-01T00:00:00Z"}}, 400, "last_checkpoint_uuid"),
        ({"project_ids": ["nowhere"]}, 404, "project_ids[0]"),
    ],
)
def test_wrong_filters_are_named(mine_raw: Raw, wanted: dict[str, object], status: int, says: str) -> None:
    answer = mine_raw.post("checkpoints/search", wanted)
    assert (answer.status_code, says in detail(answer)) == (status, True), answer.text
