"""What each role may do in a project, what a key's scopes leave of it, what an organization's roles add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest
import tinker

from tests.harness import MODEL, Raw, Server, detail, wait_for

ORG = "roles"
PEOPLE = ("admin", "member", "sampler", "viewer", "nobody")


@dataclass
class Secret:
    """A project that is not everybody's, with a session, a run and checkpoints that its owner made."""

    session: str
    run: str
    state: str
    weights: str
    sampler: str


@pytest.fixture(scope="module")
def keys(server: Server) -> dict[str, str]:
    """A key for everybody: by role in the project `secret`, and of the organization's roles."""
    server.operate("org", "create", ORG)
    server.operate("project", "create", "secret", "--org", ORG)
    made = {}
    for who in (*PEOPLE, "owner"):
        server.operate("user", "create", who, "--org", ORG)
        if who != "nobody":
            role = "member" if who == "owner" else who
            server.operate("project", "grant", "secret", role, "--user", who, "--org", ORG)
        made[who] = server.new_key(f"of {who}", "--org", ORG, "--user", who)
    for who, role in (("boss", "admin"), ("treasurer", "billing-admin")):
        server.operate("user", "create", who, "--org", ORG, "--role", role)
        made[who] = server.new_key(f"of {who}", "--org", ORG, "--user", who)
    return made


@pytest.fixture(scope="module")
def secret(server: Server, keys: dict[str, str]) -> Secret:
    raw = server.raw(keys["owner"])
    session = session_in(raw, "secret").json()["session_id"]
    run = raw.run(session)
    state = raw.result(raw.save(run, 1, "s"))["path"]
    save = {"model_id": run, "seq_id": 2, "path": "w"}
    weights = raw.result(raw.ok("save_weights_for_sampler", save)["request_id"])["path"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": weights}
    sampler = raw.ok("create_sampling_session", sampling)["sampling_session_id"]
    return Secret(session, run, state, weights, sampler)


def session_in(raw: Raw, project: str | None) -> httpx.Response:
    return raw.post("create_session", {"tags": [], "sdk_version": "x", "project_id": project})


def statuses(raw: Raw, secret: Secret) -> dict[str, int]:
    """What a caller is answered who wants to do everything in the project."""
    elsewhere = raw.session()
    optim = {"model_id": secret.run, "seq_id": 10**6, "adam_params": {}}
    run_path = f"training_runs/{secret.run}"
    asked: dict[str, httpx.Response] = {
        "see the run": raw.get(run_path),
        "see the session": raw.get(f"sessions/{secret.session}"),
        "list a run's checkpoints": raw.get(f"{run_path}/checkpoints"),
        "know how it was made": raw.post("weights_info", {"tinker_path": secret.state}),
        "open a session": session_in(raw, "secret"),
        "sample from its weights": raw.post(
            "create_sampling_session",
            {"session_id": elsewhere, "sampling_session_seq_id": 0, "model_path": secret.weights},
        ),
        "sample from its state": raw.post(
            "create_sampling_session",
            {"session_id": elsewhere, "sampling_session_seq_id": 1, "model_path": secret.state},
        ),
        "see another's sampler": raw.get(f"samplers/{secret.sampler}"),
        "make a run in its session": raw.post(
            "create_model",
            {
                "session_id": secret.session,
                "model_seq_id": 0,
                "base_model": MODEL,
                "lora_config": {"rank": 4},
            },
        ),
        "train its run": raw.post("optim_step", optim),
        "give a checkpoint an end": raw.http.put(f"{run_path}/checkpoints/weights/s/ttl", json={}),
        "publish": raw.post(f"{run_path}/checkpoints/weights/s/publish"),
        "unpublish": raw.http.delete(f"{run_path}/checkpoints/weights/s/publish"),
    }
    for answer in asked.values():
        if answer.status_code != 200:
            assert detail(answer)
    return {what: answer.status_code for what, answer in asked.items()}


EVERYTHING = 200
HIDDEN, SEEN = 404, 403
EXPECTED: dict[str, dict[str, int]] = {
    "viewer": {
        "open a session": SEEN, "make a run in its session": SEEN, "train its run": SEEN,
        "give a checkpoint an end": SEEN, "publish": SEEN, "unpublish": SEEN,
    },
    "sampler": {
        "see the run": HIDDEN, "see the session": HIDDEN, "list a run's checkpoints": HIDDEN,
        "know how it was made": HIDDEN, "sample from its state": HIDDEN, "see another's sampler": HIDDEN,
        "make a run in its session": HIDDEN, "train its run": HIDDEN, "give a checkpoint an end": HIDDEN,
        "publish": HIDDEN, "unpublish": HIDDEN,
    },
}  # fmt: skip


@pytest.mark.parametrize("who", ["admin", "member", "boss", "owner"])
def test_who_works_in_a_project_may_do_everything_there(
    server: Server, keys: dict[str, str], secret: Secret, who: str
) -> None:
    assert set(statuses(server.raw(keys[who]), secret).values()) == {EVERYTHING}


@pytest.mark.parametrize("who", ["viewer", "sampler"])
def test_who_looks_or_samples_may_do_that_alone(
    server: Server, keys: dict[str, str], secret: Secret, who: str
) -> None:
    found = statuses(server.raw(keys[who]), secret)
    assert found == {what: EXPECTED[who].get(what, EVERYTHING) for what in found}


@pytest.mark.parametrize("who", ["nobody", "treasurer"])
def test_a_project_is_not_there_for_who_has_no_role_in_it(
    server: Server, keys: dict[str, str], secret: Secret, who: str
) -> None:
    raw = server.raw(keys[who])
    assert set(statuses(raw, secret).values()) == {HIDDEN}
    never = session_in(raw, "never")
    assert detail(session_in(raw, "secret")) == detail(never).replace("never", "secret")
    assert secret.run not in raw.get("training_runs", params={"access_scope": "accessible"}).text
    assert secret.run not in raw.get("checkpoints", params={"access_scope": "accessible"}).text
    assert secret.session not in raw.get("sessions", params={"access_scope": "accessible"}).text


def test_a_sampler_sees_its_own_work_and_can_sample(
    server: Server, keys: dict[str, str], secret: Secret
) -> None:
    raw = server.raw(keys["sampler"])
    mine = session_in(raw, "secret").json()["session_id"]
    sampling = {"session_id": mine, "sampling_session_seq_id": 0, "model_path": secret.weights}
    sampler = raw.ok("create_sampling_session", sampling)["sampling_session_id"]
    sample = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 2},
    }
    assert "protobuf" in raw.result(raw.ok("asample", sample)["request_id"])
    assert raw.get(f"sessions/{mine}").status_code == 200
    assert raw.get("sessions").json()["sessions"].count(mine) == 1
    create = {"session_id": mine, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 4}}
    assert raw.post("create_model", create).status_code == 403
    load = {"session_id": raw.session(), "model_seq_id": 0, "path": secret.state, "optimizer": False}
    assert "no checkpoint" in raw.result(raw.ok("load_weights", load)["request_id"])["error"]


def test_a_viewer_uses_what_it_sees_elsewhere(server: Server, keys: dict[str, str], secret: Secret) -> None:
    raw = server.raw(keys["viewer"])
    load = {"session_id": raw.session(), "model_seq_id": 0, "path": secret.state, "optimizer": False}
    assert "error" not in raw.result(raw.ok("load_weights", load)["request_id"])


def test_a_role_of_a_team_or_of_everyone_counts_like_ones_own(server: Server, keys: dict[str, str]) -> None:
    raw = server.raw(keys["nobody"])
    server.operate("project", "create", "shared", "--org", ORG)
    assert session_in(raw, "shared").status_code == 404
    server.operate("team", "create", "crew", "--org", ORG)
    server.operate("team", "add", "crew", "nobody", "--org", ORG)
    server.operate("project", "grant", "shared", "sampler", "--team", "crew", "--org", ORG)
    _soon(lambda: session_in(raw, "shared").status_code == 200)
    server.operate("project", "revoke", "shared", "--team", "crew", "--org", ORG)
    _soon(lambda: session_in(raw, "shared").status_code == 404)
    server.operate("project", "grant", "shared", "member", "--everyone", "--org", ORG)
    _soon(lambda: session_in(raw, "shared").status_code == 200)
    run = raw.run(session_in(raw, "shared").json()["session_id"])
    server.operate("project", "archive", "shared", "--org", ORG)
    _soon(lambda: session_in(raw, "shared").status_code == 403)
    assert raw.get(f"training_runs/{run}").status_code == 200
    assert raw.post("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}}).status_code == 403


def _soon(condition: Callable[[], object]) -> None:
    wait_for(condition, 10.0, "the roles to be looked up anew")


def test_a_scope_narrows_a_key(server: Server, keys: dict[str, str], secret: Secret) -> None:
    def scoped(*scopes: str) -> Raw:
        flags = [word for scope in scopes for word in ("--scope", scope)]
        return server.raw(server.new_key("scoped", "--org", ORG, "--user", "member", *flags))

    reads, trains, samples = scoped("read"), scoped("train"), scoped("sample")
    optim = {"model_id": secret.run, "seq_id": 10**6, "adam_params": {}}
    refused = session_in(reads, None)
    assert (refused.status_code, "limited to read" in detail(refused)) == (403, True)
    assert reads.get(f"training_runs/{secret.run}").status_code == 200
    assert reads.post("optim_step", optim).status_code == 403
    assert set(statuses(trains, secret).values()) == {EVERYTHING}
    assert set(statuses(scoped("read", "train"), secret).values()) == {EVERYTHING}
    found = statuses(samples, secret)
    assert found == {what: EXPECTED["sampler"].get(what, EVERYTHING) for what in found}


def test_a_key_of_one_project_is_good_for_that_alone(
    server: Server, keys: dict[str, str], secret: Secret
) -> None:
    raw = server.raw(server.new_key("bound", "--org", ORG, "--user", "boss", "--project", "secret"))
    session = session_in(raw, None).json()["session_id"]
    assert server.raw(keys["owner"]).get(f"sessions/{session}").status_code == 200
    assert server.raw(keys["nobody"]).get(f"sessions/{session}").status_code == 404
    assert session_in(raw, "Default").status_code == 404
    other = server.raw(keys["boss"])
    run = other.run(other.session())
    assert raw.get(f"training_runs/{run}").status_code == 404
    assert raw.get("audit").status_code == 403


def test_billing_is_for_those_who_pay_and_the_log_for_those_who_answer(
    server: Server, keys: dict[str, str]
) -> None:
    for who in keys:
        client = tinker.AdminClient(base_url=server.url, api_key=keys[who])
        if who in ("boss", "treasurer"):
            client.get_current_checkpoint_storage_usage().result()
        else:
            with pytest.raises(tinker.PermissionDeniedError, match="billing-admin"):
                client.get_current_checkpoint_storage_usage().result()
        if who == "boss":
            client.get_audit_log().result()
        else:
            with pytest.raises(tinker.PermissionDeniedError, match="role admin"):
                client.get_audit_log().result()


@pytest.mark.parametrize("what", ["user", "org"])
def test_who_is_disabled_is_out_until_enabled_again(server: Server, what: str) -> None:
    org = f"disabled-{what}"
    raw = server.raw(server.new_key("someone", "--org", org))
    assert raw.get("sessions").status_code == 200
    words = ["user", "{}", "someone", "--org", org] if what == "user" else ["org", "{}", org]
    server.operate(*(word.format("disable") for word in words))
    _soon(lambda: raw.get("sessions").status_code == 401)
    server.operate(*(word.format("enable") for word in words))
    _soon(lambda: raw.get("sessions").status_code == 200)


def test_a_deleted_organizations_checkpoints_are_swept(server: Server) -> None:
    raw = server.raw(server.new_key("gone", "--org", "gone"))
    run = raw.run(raw.session())
    path = raw.result(raw.save(run, 1, "c"))["path"]
    raw.post(f"training_runs/{run}/checkpoints/weights/c/publish")
    stranger = server.raw(server.new_key("stranger", "--org", "stranger"))
    assert stranger.post("weights_info", {"tinker_path": path}).status_code == 200
    server.operate("org", "delete", "gone", "--yes")
    _soon(lambda: raw.get("sessions").status_code == 401)
    assert stranger.post("weights_info", {"tinker_path": path}).status_code == 404
