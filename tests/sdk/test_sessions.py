"""Sessions as the SDK looks for them: searching, what became of them, moving them between projects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable

import pytest
import tinker
from tinker.types import (
    AccessibleSearchOwner,
    ActiveSessionStatusQuery,
    CancelledSessionStatusQuery,
    ClientFinishedSessionStatusQuery,
    FailedSessionStatusQuery,
    OwnSearchOwner,
    SessionSearchRequest,
    UserSearchOwner,
)

from tests.harness import KEY, MODEL, Raw, Server, datum, detail, operate, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning")


@pytest.fixture(scope="module")
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=KEY)


def found(rest: tinker.RestClient, **filters: object) -> list[str]:
    request = SessionSearchRequest(**filters)  # type: ignore[arg-type]
    return [each.session_id for each in rest.search_sessions(request).result(timeout=10).sessions]


def named(raw: Raw, name: str | None, **metadata: str) -> str:
    body = {"tags": [], "sdk_version": "x", "display_name": name, "user_metadata": metadata}
    return str(raw.ok("create_session", body)["session_id"])


def finish(raw: Raw, session: str, reason: str, text: str | None = None) -> None:
    raw.ok(f"sessions/{session}/finish", {"reason": {"type": reason}, "detail": text})


def status(rest: tinker.RestClient, session: str) -> dict[str, object] | None:
    (summary,) = rest.search_sessions(SessionSearchRequest(session_id=session)).result().sessions
    return summary.status.model_dump() if summary.status is not None else None


def test_a_session_is_found_by_name_id_and_metadata(server: Server, rest: tinker.RestClient) -> None:
    raw, mark = server.raw(), uuid.uuid4().hex
    first = named(raw, f"Nightly Évaluation {mark}", team="blue", purpose=mark)
    second = named(raw, f"100%_sure {mark}", team="red", purpose=mark)
    nameless = named(raw, None, purpose=mark)
    assert found(rest, display_name=f"évaluation {mark}") == [first]
    assert found(rest, display_name=f"{mark.upper()} night") == [first]
    assert found(rest, display_name=f"0%_s {mark}") == [second]
    assert found(rest, display_name=f"0__s {mark}") == []
    assert found(rest, user_metadata={"purpose": mark}) == [nameless, second, first]
    assert found(rest, user_metadata={"purpose": mark, "team": "red"}) == [second]
    assert found(rest, user_metadata={"purpose": mark, "team": "re"}) == []
    assert found(rest, session_id=first) == [first]
    assert found(rest, session_id=first, display_name=f"sure {mark}") == [second, first]
    assert found(rest, session_id=first, user_metadata={"team": "red"}) == []
    assert found(rest, session_id="none") == []


def test_pages_follow_each_other_without_holes(server: Server, rest: tinker.RestClient) -> None:
    raw, mark = server.raw(), uuid.uuid4().hex
    made = [named(raw, mark) for _ in range(7)]
    request, seen, pages = SessionSearchRequest(display_name=mark, limit=3), [], 0
    while True:
        page = rest.search_sessions(request).result()
        seen += [each.session_id for each in page.sessions]
        pages += 1
        if page.next_cursor is None:
            break
        request = request.model_copy(update={"cursor": page.next_cursor})
    assert seen == made[::-1]
    assert pages == 3


def test_a_summary_says_what_a_session_holds(server: Server, rest: tinker.RestClient) -> None:
    mark = uuid.uuid4().hex
    with tinker.ServiceClient(
        base_url=server.url, api_key=KEY, display_name=mark, user_metadata={"a": "b"}
    ) as client:
        training = client.create_lora_training_client(MODEL, rank=4).result()
        training.save_state("one").result()
        training.save_weights_for_sampler("two").result()
        (summary,) = rest.search_sessions(SessionSearchRequest(display_name=mark)).result().sessions
        assert summary.session_id == client.holder.get_session_id()
        assert (summary.checkpoints_count, summary.display_name) == (2, mark)
        listed = rest.list_checkpoints(training.model_id).result().checkpoints
        assert summary.checkpoint_storage_bytes == sum(each.size_bytes or 0 for each in listed)
        assert summary.user_metadata == {"a": "b"}
        assert abs(summary.created_at.timestamp() - time.time()) < 60
        assert summary.owner.startswith("tml:organization_user:")
        assert summary.project_id
        assert summary.status is not None
        assert summary.status.type == "active"


@pytest.mark.parametrize("reason", ["success", "errored", "interrupted"])
def test_what_a_client_says_at_its_end_is_its_sessions_status(
    server: Server, rest: tinker.RestClient, reason: str
) -> None:
    raw = server.raw()
    session = named(raw, None)
    assert status(rest, session) == {"type": "active"}
    finish(raw, session, reason, "because")
    finish(raw, session, "success", "the first one stays")
    assert status(rest, session) == {
        "type": "client_finished", "reason": {"type": reason}, "detail": "because",
    }  # fmt: skip


def test_an_error_at_the_end_is_told_with_the_failure_behind_it(
    server: Server, rest: tinker.RestClient
) -> None:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    session = client.holder.get_session_id()
    training = client.create_lora_training_client(MODEL, rank=4).result()
    with pytest.raises(tinker.RequestFailedError):
        training.forward_backward([datum()], "no_such_loss").result()  # type: ignore[arg-type]
    client.close("errored").result()
    told = status(rest, session)
    assert told is not None
    assert (told["type"], told["category"]) == ("failed", "user")
    assert told["reason"] == {
        "type": "request", "request_id": f"{session}:train:0:1", "request_type": "forward_backward",
    }  # fmt: skip
    assert "no_such_loss" in str(told["message"])


def test_a_run_that_cannot_be_created_is_named(server: Server, rest: tinker.RestClient) -> None:
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    session = client.holder.get_session_id()
    with pytest.raises(tinker.RequestFailedError):
        client.create_lora_training_client(MODEL, rank=10_000).result()
    client.close("errored").result()
    told = status(rest, session)
    assert told is not None
    assert told["reason"] == {"type": "training_run", "training_run_id": f"{session}:train:0"}


def test_a_refusal_that_the_client_gets_over_is_no_failure(server: Server, rest: tinker.RestClient) -> None:
    with server.sdk() as client:
        session = client.holder.get_session_id()
        training = client.create_lora_training_client(MODEL, rank=4).result()
        with pytest.raises(tinker.RequestFailedError):
            training.forward_backward([datum()], "no_such_loss").result()  # type: ignore[arg-type]
        assert status(rest, session) == {"type": "active"}
    assert status(rest, session) == {
        "type": "client_finished", "reason": {"type": "success"}, "detail": None,
    }  # fmt: skip


def test_sessions_are_found_by_what_became_of_them(server: Server, rest: tinker.RestClient) -> None:
    raw, mark = server.raw(), uuid.uuid4().hex
    active, done, erred, failed = (named(raw, mark) for _ in range(4))
    finish(raw, done, "success")
    finish(raw, erred, "errored")
    run = raw.run(failed)
    raw.result(raw.optim(run, 1, learning_rate=-1.0))
    finish(raw, failed, "errored")
    every = [failed, erred, done, active]
    for statuses, expected in (
        ([ActiveSessionStatusQuery()], [active]),
        ([FailedSessionStatusQuery()], [failed]),
        ([ClientFinishedSessionStatusQuery()], [erred, done]),
        ([ClientFinishedSessionStatusQuery(reasons=["success"])], [done]),
        ([ClientFinishedSessionStatusQuery(reasons=["interrupted"])], []),
        ([ActiveSessionStatusQuery(), FailedSessionStatusQuery()], [failed, active]),
        ([CancelledSessionStatusQuery()], []),
        (None, every),
    ):
        assert found(rest, display_name=mark, statuses=statuses) == expected


def test_a_run_whose_state_is_lost_fails_its_session_and_silence_is_not_called_active(
    make_server: Callable[..., Server],
) -> None:
    server = make_server("--heartbeat-timeout", "3").start()
    raw, rest = server.raw(), tinker.RestClient(base_url=server.url, api_key=KEY)
    session, silent = named(raw, None), named(raw, None)
    run, other = raw.run(session), raw.run(silent)
    path = raw.result(raw.save(other, 1, "n"))["path"]
    load = {"model_id": run, "seq_id": 1, "path": path, "optimizer": True}
    raw.result(raw.ok("load_weights", load)["request_id"])
    # What was loaded is gone, so that the log does not give the state back.
    assert raw.http.delete(f"training_runs/{other}/checkpoints/weights/n").status_code == 200
    server.kill_engine()
    assert "is lost" in raw.result(raw.optim(run, 2))["error"]

    def lost() -> bool:
        raw.ok("session_heartbeat", {"session_id": session})
        told = status(rest, session)
        return told is not None and told["type"] == "failed"

    wait_for(lost, what="the session to be failed")
    told = status(rest, session)
    assert told is not None
    assert (told["category"], told["reason"]) == (
        "internal", {"type": "training_run", "training_run_id": run},
    )  # fmt: skip
    wait_for(lambda: status(rest, silent) is None, what="the other one to be forgotten")


def test_whose_sessions_are_searched(server: Server, rest: tinker.RestClient) -> None:
    mark = uuid.uuid4().hex
    team = [server.raw(server.new_key(f"{mark}-{i}", "--org", mark)) for i in range(2)]
    mine, theirs = (named(raw, mark) for raw in team)
    clients = [tinker.RestClient(base_url=server.url, api_key=raw.http.headers["x-api-key"]) for raw in team]
    first, second = clients
    assert found(first, display_name=mark) == [mine]
    assert found(first, display_name=mark, owner=OwnSearchOwner()) == [mine]
    assert found(first, display_name=mark, owner=AccessibleSearchOwner()) == [theirs, mine]
    (summary,) = second.search_sessions(SessionSearchRequest(display_name=mark)).result().sessions
    by_urn = UserSearchOwner(owner_urns=[summary.owner])
    assert found(first, display_name=mark, owner=by_urn) == [theirs]
    # Another organization finds nothing, whatever it asks for.
    for owner in (AccessibleSearchOwner(), by_urn):
        assert found(rest, display_name=mark, owner=owner) == []
        assert found(rest, session_id=mine, owner=owner) == []


def test_the_operator_cancels_a_session(server: Server) -> None:
    mark = uuid.uuid4().hex
    key = server.new_key(mark, "--org", mark)
    raw, rest = server.raw(key), tinker.RestClient(base_url=server.url, api_key=key)
    session, other = named(raw, mark), named(raw, mark)
    run, spared = raw.run(session), raw.run(other)
    path = raw.result(raw.save(run, 1, "kept"))["path"]
    waiting = raw.optim(run, 3)  # for the request with seq_id 2
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = raw.ok("create_sampling_session", body)["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
    body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {}}
    words = ("session", "cancel", session, "--org", mark)
    assert "cancelled" in server.operate(*words, "--reason", "over its budget")
    assert operate([*words, "--data", str(server.data)]) == 1  # it has ended already
    assert "over its budget" in server.operate("session", "list", "--org", mark)
    # Its work ends, and says why.
    why = "was cancelled by the operator (over its budget)"
    assert f"the session of this training run {why}" in raw.result(waiting)["error"]
    assert f"the session of {sampler} {why}" in detail(raw.post("asample", body))
    assert why in raw.result(raw.optim(run, 4))["error"]
    for route, more in (
        ("session_heartbeat", {}),
        ("create_model", {"model_seq_id": 1, "base_model": MODEL, "lora_config": {"rank": 4}}),
    ):
        gone = raw.post(route, {"session_id": session, **more})
        assert gone.status_code == 410
        assert f"the session {session} {why}" in detail(gone)
    raw.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}})  # its client leaves late
    assert status(rest, session) == {"type": "cancelled", "detail": "over its budget"}
    assert found(rest, display_name=mark, statuses=[CancelledSessionStatusQuery()]) == [session]
    assert found(rest, display_name=mark, statuses=[ClientFinishedSessionStatusQuery()]) == []
    # What it saved is there, and others go on.
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    assert "error" not in raw.result(raw.optim(spared, 1))
    log = json.loads(server.operate("audit", "--org", mark, "--json"))
    assert [each["event_details"]["session_id"] for each in log if each["event"] == "session_cancel"] == [
        session
    ]


def test_a_session_moves_with_its_runs(server: Server) -> None:
    mark = uuid.uuid4().hex
    key = server.new_key(mark, "--org", mark)
    server.new_project(mark, "archive")
    raw, rest = server.raw(key), tinker.RestClient(base_url=server.url, api_key=key)
    session = named(raw, None)
    run = raw.run(session)
    path = raw.result(raw.save(run, 1, "kept"))["path"]
    home = raw.get(f"sessions/{session}").json()["project_id"]
    assert rest.list_training_runs(project_id="archive").result().training_runs == []
    rest.assign_session_project(session, "archive").result(timeout=10)
    rest.assign_session_project(session, "archive").result(timeout=10)
    (moved,) = rest.list_training_runs(project_id="archive").result().training_runs
    assert moved.training_run_id == run
    assert rest.list_training_runs(project_id=home).result().training_runs == []
    archive = raw.get(f"sessions/{session}").json()["project_id"]
    assert archive != home
    assert found(rest, project_ids=[archive]) == [session]
    assert found(rest, project_ids=[home]) == []
    assert "error" not in raw.result(raw.optim(run, 2))
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    with pytest.raises(tinker.PermissionDeniedError, match="no-such-project"):
        rest.assign_session_project(session, "no-such-project").result(timeout=10)
    with pytest.raises(tinker.NotFoundError, match="no session"):
        rest.assign_session_project("none", "archive").result(timeout=10)
    assert raw.http.put(f"sessions/{session}/project", json={}).status_code == 400
    stranger = server.raw(server.new_key(f"{mark}-stranger"))
    assert stranger.http.put(f"sessions/{session}/project", json={"project_id": "x"}).status_code == 404


def test_lists_are_narrowed_as_asked(server: Server) -> None:
    mark = uuid.uuid4().hex
    team = [server.raw(server.new_key(f"{mark}-{i}", "--org", mark)) for i in range(2)]
    sessions = [raw.session() for raw in team]
    runs = [raw.run(session) for raw, session in zip(team, sessions, strict=True)]
    first = tinker.RestClient(base_url=server.url, api_key=team[0].http.headers["x-api-key"])
    for scope, count in (("owned", 1), ("accessible", 2)):
        listed = first.list_training_runs(access_scope=scope).result()  # type: ignore[arg-type]
        assert [each.training_run_id for each in listed.training_runs] == runs[:count][::-1]
        assert listed.cursor.total_count == count
        assert first.list_sessions(access_scope=scope).result().sessions == sessions[:count][::-1]  # type: ignore[arg-type]
    # By its id, whatever may be seen is found.
    assert first.get_training_run(runs[1]).result().training_run_id == runs[1]
    for path in ("training_runs", "sessions"):
        answer = team[0].get(path, params={"access_scope": "everybody's"})
        assert (answer.status_code, "access_scope" in detail(answer)) == (400, True)
    assert team[0].get("training_runs", params={"project_id": "none"}).status_code == 404


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"session_id": 5}, "session_id"),
        ({"display_name": ""}, "display_name"),
        ({"display_name": "\ud800"}, "display_name"),
        ({"project_ids": "x"}, "project_ids"),
        ({"project_ids": [1]}, "project_ids"),
        ({"project_ids": ["none"]}, "project_ids[0]"),
        ({"user_metadata": {"a": 1}}, "user_metadata.a"),
        ({"owner": {"type": "nobody"}}, "owner.type"),
        ({"owner": {"type": "user"}}, "owner.owner_urns"),
        ({"owner": {"type": "user", "owner_urns": []}}, "owner.owner_urns"),
        ({"owner": {"type": "user", "owner_urns": ["ann"]}}, "owner.owner_urns[0]"),
        ({"statuses": []}, "statuses"),
        ({"statuses": ["active"]}, "statuses[0]"),
        ({"statuses": [{"type": "gone"}]}, "statuses[0].type"),
        ({"statuses": [{"type": "client_finished", "reasons": ["x"]}]}, "statuses[0].reasons"),
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"cursor": {"last_session_id": "x"}}, "cursor.last_created_at"),
        ({"cursor": {"last_created_at": "yesterday", "last_session_id": "x"}}, "cursor.last_created_at"),
    ],
)
def test_a_filter_that_is_none_is_refused_by_name(raw: Raw, change: dict[str, object], says: str) -> None:
    answer = raw.http.post("sessions/search", content=json_ascii(change))
    assert answer.status_code in (400, 404)
    assert detail(answer).startswith(says)


def json_ascii(value: object) -> bytes:
    """As httpx would send it, lone surrogates included."""
    import json

    return json.dumps(value).encode()


@pytest.mark.parametrize("text", ["nul\0", "\ud800"])
def test_texts_that_no_database_takes_are_refused_by_name(raw: Raw, text: str) -> None:
    for field, value in (
        ("display_name", text),
        ("user_metadata", {"a": text}),
        ("user_metadata", {text: "a"}),
    ):
        body = {"tags": [], "sdk_version": "x", field: value}
        answer = raw.http.post("create_session", content=json_ascii(body))
        assert (answer.status_code, detail(answer).startswith(field)) == (400, True)
    session = raw.session()
    raw.http.post(
        f"sessions/{session}/finish", content=json_ascii({"reason": {"type": "success"}, "detail": text})
    ).raise_for_status()
