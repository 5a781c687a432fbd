"""What another organization has is answered as what there is not: by every route, to the letter.

The routes are the app's own. Each is asked for something of somebody else's, and for what never was.
"""

from __future__ import annotations

import json
import re

import httpx
import pytest
from starlette.routing import Route

from tests.api.probes import NAMELESS, PROBES, Prober, Things, things_of
from tests.harness import Server
from tinsmith.api import anthropic, models, openai
from tinsmith.api.app import _ROUTES
from tinsmith.api.door_operations import DOORS
from tinsmith.api.openapi import path_of
from tinsmith.api.operations import OPERATIONS

MARK = "of-theirs-41c9"


def routes() -> dict[tuple[str, str], Route]:
    """By method and path; of a door's addresses, the one below /v1."""
    found: dict[tuple[str, str], Route] = {}
    for route in (*_ROUTES, *models.ROUTES, *openai.ROUTES, *anthropic.ROUTES):
        path = re.sub(r"^(/services/tinker-prod)?/(oai|anthropic)/api/v1/", "/v1/", route.path)
        for method in (route.methods or set()) - {"HEAD"}:
            same = found.setdefault((method, path.removeprefix("/api/v1/")), route)
            assert same.endpoint is route.endpoint, path
    return found


@pytest.fixture(scope="module")
def theirs(server: Server) -> Things:
    """What an organization has in a project of a few, made by one of its members."""
    server.operate("org", "create", "theirs")
    server.operate("project", "create", MARK, "--org", "theirs")
    for who in ("owner", "viewer", "sampler", "nobody"):
        server.operate("user", "create", who, "--org", "theirs")
        if who != "nobody":
            role = "member" if who == "owner" else who
            server.operate("project", "grant", MARK, role, "--user", who, "--org", "theirs")
    return things_of(server.raw(server.new_key(MARK, "--org", "theirs", "--user", "owner")), MARK, MARK)


def colleague(server: Server, who: str) -> Prober:
    return Prober.of(server.raw(server.new_key(who, "--org", "theirs", "--user", who)))


@pytest.fixture(scope="module")
def strangers(server: Server, theirs: Things) -> dict[str, Prober]:
    """Those who have nothing to do with it: another organization's administrator, and one of the same
    organization without a role in the project."""
    server.operate("org", "create", "elsewhere")
    server.operate("user", "create", "boss", "--org", "elsewhere", "--role", "admin")
    elsewhere = server.new_key("elsewhere", "--org", "elsewhere", "--user", "boss")
    return {"elsewhere": Prober.of(server.raw(elsewhere)), "nobody": colleague(server, "nobody")}


def told(answer: httpx.Response, *known: Things) -> tuple[int, dict[str, str], str]:
    """An answer without ids, and without what no two answers have in common."""
    text = answer.text
    for things in known:
        text = things.hide(text)
    passing = ("date", "x-request-id", "content-length")
    headers = {name: value for name, value in answer.headers.items() if name not in passing}
    return answer.status_code, headers, text


def test_every_route_is_asked() -> None:
    assert set(routes()) == set(PROBES) | set(NAMELESS)
    assert not set(PROBES) & set(NAMELESS)
    for method, path in NAMELESS:
        assert "{" not in path
        operation = (OPERATIONS | DOORS).get((method, path_of(routes()[method, path])))
        if operation is not None:
            assert "x-names" not in f"{operation.body} {operation.query}", path


@pytest.mark.parametrize("route", PROBES, ids=" ".join)
def test_what_is_anothers_is_answered_as_what_never_was(
    theirs: Things, strangers: dict[str, Prober], route: tuple[str, str]
) -> None:
    never = theirs.never()
    for who, prober in strangers.items():
        for what, probe in PROBES[route].items():
            foreign, absent = (told(probe(prober, things), theirs, never) for things in (theirs, never))
            assert foreign == absent, (who, what)
            assert foreign[0] < 500, (who, what)


def without_refusals(answer: httpx.Response) -> str:
    """The audit log tells what its own organization's people were refused, by the names that they gave."""
    told_of = answer.json() if answer.headers["content-type"] == "application/json" else None
    if not isinstance(told_of, dict) or "entries" not in told_of:
        return answer.text
    entries = [each for each in told_of["entries"] if each["event_details"]["outcome"] == "success"]
    assert entries
    return json.dumps(entries)


@pytest.mark.parametrize("route", NAMELESS, ids=" ".join)
def test_what_is_anothers_is_not_told_unasked(
    theirs: Things, strangers: dict[str, Prober], route: tuple[str, str]
) -> None:
    for prober in strangers.values():
        answer = NAMELESS[route](prober)
        assert answer.status_code in (200, 403)
        assert theirs.found_in(without_refusals(answer)) == []


# Who has a role there. By route: the requests that are done, where the rest is a 403 (viewer), or as if
# there were nothing (sampler).

EVERY = None
VIEWER: dict[str, set[str] | None] = {
    "POST telemetry": EVERY,  # is the caller's own, whatever session it names
    "POST sessions/search": EVERY,
    "GET sessions/{session_id}": EVERY,
    "GET sessions/{session_id}/trace_export": EVERY,
    "POST get_info": EVERY,
    "POST forward_backward": {"loss"},  # its own run: the loss is not one of its session
    "POST load_weights": {
        "state",
        "state with its optimizer",
        "weights",
        "external",
        "new from state",
        "new from state with its optimizer",
        "new from weights",
    },
    "POST create_sampling_session": {"weights", "state", "external"},
    "GET samplers/{sampler_id}": EVERY,
    "POST asample": {"weights", "state"},
    "POST retrieve_future": EVERY,
    "POST retrieve_futures": {"requests"},
    "POST cancel_future": {"pass_", "loss"},  # nothing happens
    "POST weights_info": EVERY,
    "POST copy_weights": {"source"},
    "GET training_runs": EVERY,
    "GET training_runs/{run_id}": EVERY,
    "GET training_runs/{run_id}/checkpoints": EVERY,
    "POST checkpoints/search": EVERY,
    "GET training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls": {"external_weights"},
    "GET training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive": EVERY,
    "GET /v1/models/{model:anything}": EVERY,
    "POST /v1/completions": EVERY,
    "POST /v1/chat/completions": EVERY,
    "POST /v1/messages": EVERY,
    "POST /v1/messages/count_tokens": EVERY,
}
SAMPLER: dict[str, set[str] | None] = {
    "POST create_session": EVERY,
    "POST create_sampling_session": {"weights"},
    "POST asample": {"weights"},
    "POST external_weights_upload_start": EVERY,
    "POST copy_weights": {"project", "project's name"},
    "GET /v1/models/{model:anything}": {"weights", "both"},
    "POST /v1/completions": {"a path", "both", "streamed"},
    "POST /v1/chat/completions": {"a path", "both"},
    "POST /v1/messages": {"a path", "both"},
    "POST /v1/messages/count_tokens": {"a path", "both"},
}
PUBLISHED: dict[str, set[str] | None] = {
    **{
        route: VIEWER[route]
        for route in ("POST load_weights", "POST create_sampling_session", "POST asample")
    },
    "POST weights_info": EVERY,
    "POST copy_weights": {"source", "source into a session"},
    "POST checkpoints/search": {"metadata"},  # the copy, which is one's own
    "GET training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls": {"external_weights"},
    "GET training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive": EVERY,
    "GET /v1/models/{model:anything}": EVERY,
    "POST /v1/completions": EVERY,
    "POST /v1/chat/completions": EVERY,
    "POST /v1/messages": EVERY,
    "POST /v1/messages/count_tokens": EVERY,
}  # fmt: skip


def listed(table: dict[str, set[str] | None], route: tuple[str, str], what: str) -> bool:
    found = table.get(" ".join(route), set())
    return found is EVERY or what in found


def differing(
    prober: Prober, theirs: Things, table: dict[str, set[str] | None]
) -> list[tuple[tuple[str, str], str, object]]:
    """Requests that are answered as if there were nothing and are listed, or the other way round."""
    never, found = theirs.never(), []
    for route, probes in PROBES.items():
        for what, probe in probes.items():
            seen, absent = (told(probe(prober, things), theirs, never) for things in (theirs, never))
            if (seen != absent) != listed(table, route, what):
                found.append((route, what, seen))
    return found


def test_a_sampler_finds_what_can_be_sampled_from(server: Server, theirs: Things) -> None:
    assert differing(colleague(server, "sampler"), theirs, SAMPLER) == []


def test_a_viewer_sees_it_and_uses_it_elsewhere(server: Server, theirs: Things) -> None:
    viewer = colleague(server, "viewer")
    wrong = []
    for route, probes in PROBES.items():
        for what, probe in probes.items():
            answer = probe(viewer, theirs)
            wanted = 200 if listed(VIEWER, route, what) else 403
            if route[1].endswith("external_weights_urls") and what != "external_weights":
                wanted = 400  # says its path
            if route[1].endswith("/archive"):
                wanted = 302
            if answer.status_code != wanted:
                wrong.append((*route, what, answer.status_code, answer.text[:120]))
    assert not wrong


def test_nothing_of_it_has_changed(server: Server, theirs: Things) -> None:
    """Behind all of the above."""
    raw = server.raw(theirs.key)
    assert raw.get(f"sessions/{theirs.session}").json()["status"] == {"type": "active"}
    rows = raw.get(f"training_runs/{theirs.run}/checkpoints").json()["checkpoints"]
    kinds = ("weights", "sampler_weights", "external_weights")
    assert [row["checkpoint_id"] for row in rows] == [f"{kind}/{MARK}" for kind in kinds]
    assert "protobuf" in raw.result(raw.forward_backward(theirs.run, 5))


def test_what_is_published_is_read_by_its_path_and_listed_nowhere(
    server: Server, theirs: Things, strangers: dict[str, Prober]
) -> None:
    raw, prober = server.raw(theirs.key), strangers["elsewhere"]
    for kind in ("weights", "sampler_weights", "external_weights"):
        assert raw.post(f"training_runs/{theirs.run}/checkpoints/{kind}/{MARK}/publish").status_code == 200
    assert differing(prober, theirs, PUBLISHED) == []
    uses = {("GET", "audit"), ("GET", "sessions"), ("GET", "checkpoints")}  # of it, of one's own
    for route in set(NAMELESS) - uses:
        assert theirs.found_in(NAMELESS[route](prober).text) == []
    for path in ("sessions", "training_runs", "checkpoints"):
        listed_ids = prober.raw.get(path, params={"limit": 1000}).text
        assert theirs.run not in listed_ids
        assert theirs.session not in listed_ids
