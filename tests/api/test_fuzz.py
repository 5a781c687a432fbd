"""Every operation, as every role, with whatever its schemas allow and what they do not: never a 5xx, never
anything of another organization, and nothing of anybody's is worse for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.fuzzing import Fuzzer, Ids, make_world
from tests.harness import Raw, Server

OURS, THEIRS = "of-ours-5b1d", "of-theirs-7f3a"
ROLES = ("admin", "member", "viewer", "sampler", "nobody")


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that holds no poll, so that waiting for what never comes costs nothing."""
    server = Server(tiny_model, tmp_path_factory.mktemp("fuzz") / "data", "--poll-hold", "0.1")
    yield server.start()
    server.end()


@pytest.fixture(scope="module")
def keys(server: Server) -> dict[str, str]:
    """A key of every role in our project, and one of somebody who has nothing to do with it."""
    server.operate("org", "create", "ours")
    server.operate("project", "create", OURS, "--org", "ours")
    made = {}
    for role in ROLES:
        of_org = "admin" if role == "admin" else "member"
        server.operate("user", "create", role, "--org", "ours", "--role", of_org)
        if role not in ("admin", "nobody"):
            server.operate("project", "grant", OURS, role, "--user", role, "--org", "ours")
        made[role] = server.new_key(role, "--org", "ours", "--user", role)
    server.operate("org", "create", "theirs")
    server.operate("user", "create", f"{THEIRS}@example.org", "--org", "theirs", "--role", "admin")
    server.operate("project", "create", THEIRS, "--org", "theirs")
    made["them"] = server.new_key(THEIRS, "--org", "theirs", "--user", f"{THEIRS}@example.org")
    return made


@pytest.fixture(scope="module")
def worlds(server: Server, keys: dict[str, str]) -> tuple[Ids, Ids]:
    """What we have, and what they have."""
    ours = make_world(server.raw(keys["member"]), OURS, OURS)
    return ours, make_world(server.raw(keys["them"]), THEIRS, THEIRS)


def everything(raw: Raw, ids: Ids) -> dict[str, Any]:
    """What an organization sees of its own."""
    (run,), (session,), (sampler,) = ids["run"], ids["session"], ids["sampler"]
    asked = [
        f"training_runs/{run}", f"training_runs/{run}/checkpoints", "training_runs", "checkpoints",
        f"sessions/{session}", "sessions", f"samplers/{sampler}", "auth/apikey/me",
    ]  # fmt: skip
    return {path: raw.get(path).json() for path in asked}


def attack(server: Server, keys: dict[str, str], worlds: tuple[Ids, Ids], role: str, examples: int) -> None:
    ours, theirs = worlds
    them = server.raw(keys["them"])
    before = everything(them, theirs)
    fuzzer = Fuzzer(server, keys[role], ours, theirs, THEIRS)
    problems = fuzzer.run(examples)
    assert not problems, "\n".join(str(problem) for problem in problems)
    assert everything(them, theirs) == before
    assert "Traceback" not in server.log()
    # Both of us can still work.
    for raw, ids in ((server.raw(keys["member"]), ours), (them, theirs)):
        assert raw.get(f"training_runs/{ids['run'][0]}").json()["corrupted"] is False
        run = raw.run(raw.session())
        assert "protobuf" in raw.result(raw.forward_backward(run, 1))


@pytest.mark.parametrize("role", ROLES)
def test_a_few_requests_of_every_kind(
    server: Server, keys: dict[str, str], worlds: tuple[Ids, Ids], role: str
) -> None:
    attack(server, keys, worlds, role, examples=4 if role == "member" else 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ROLES)
def test_many_requests_of_every_kind(
    server: Server, keys: dict[str, str], worlds: tuple[Ids, Ids], role: str
) -> None:
    attack(server, keys, worlds, role, examples=150)
