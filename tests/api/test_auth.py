"""Keys, and the tokens that they are exchanged for, through the SDK, its command line and raw HTTP."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jwt
import pytest
import tinker

from tests.harness import Raw, Server, datum, detail, exit_code, wait_for


def token_of(raw: Raw) -> str:
    return str(raw.ok("auth/token")["jwt"])


def claims_of(token: str) -> dict[str, object]:
    payload = token.split(".")[1]
    claims: dict[str, object] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


# Tokens


def test_a_token_is_taken_in_the_place_of_its_key_and_says_whose_it_is(server: Server) -> None:
    key = server.new_key("whose", "--org", "tokens", "--note", "of the tests")
    token = token_of(server.raw(key))
    claims = claims_of(token)
    about = server.raw(token).get("auth/apikey/me").json()
    assert about == server.raw(key).get("auth/apikey/me").json()
    assert (about["name"], about["note"]) == ("whose", "of the tests")
    assert isinstance(about["key_id"], int)
    assert about["details"] == {"org_details": {"name": "tokens"}, "user_details": {"email": "whose"}}
    assert str(claims["sub"]).startswith("tml:organization_user:")
    assert claims["email"] == "whose"
    assert 60 < int(str(claims["exp"])) - time.time() <= 3600
    bearer = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{server.url}/api/v1/sessions", headers=bearer).status_code == 200
    session = server.raw(token).session()
    assert server.raw(key).get(f"sessions/{session}").status_code == 200


def _other_claims(token: str) -> str:
    header, _, signature = token.split(".")
    payload = base64.urlsafe_b64encode(json.dumps({**claims_of(token), "org_id": "another"}).encode())
    return f"{header}.{payload.decode().rstrip('=')}.{signature}"


def _unsigned(token: str) -> str:
    return jwt.encode(claims_of(token), None, algorithm="none")


def _signed_by_another(token: str) -> str:
    return jwt.encode(claims_of(token), "x" * 32, algorithm="HS256")


def _cut(token: str) -> str:
    return token[:-3]


@pytest.mark.parametrize("change", [_other_claims, _unsigned, _signed_by_another, _cut])
def test_a_token_that_is_not_as_it_was_issued_is_a_401_that_makes_the_sdk_get_another(
    server: Server, raw: Raw, change: Callable[[str], str]
) -> None:
    answer = server.raw(change(token_of(raw))).get("sessions")
    assert (answer.status_code, "token" in detail(answer)) == (401, True)
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


def test_a_token_for_a_token_ends_with_it(server: Server, raw: Raw) -> None:
    first = token_of(raw)
    time.sleep(1.1)
    second = token_of(server.raw(first))
    assert second != first
    assert int(str(claims_of(second)["exp"])) <= int(str(claims_of(first)["exp"]))


def test_a_token_ends_with_its_key(server: Server) -> None:
    key = server.new_key("short")
    token = server.raw(token_of(server.raw(key)))
    assert token.get("sessions").status_code == 200
    server.operate("keys", "revoke", key)
    wait_for(lambda: token.get("sessions").status_code == 401, 10.0, "the token to be refused")
    assert 'error="invalid_token"' in token.get("sessions").headers["WWW-Authenticate"]
    assert token.post("auth/token").status_code == 401


def test_the_secret_behind_tokens_is_its_owners_alone(server: Server) -> None:
    assert stat.S_IMODE((server.data / "identity.key").stat().st_mode) == 0o600


def test_a_client_outlives_the_secret_behind_its_token(hardy: Server) -> None:
    with hardy.sdk() as client:
        training = client.create_lora_training_client(base_model="tests/tiny", rank=4).result()
        training.forward_backward([datum()], "cross_entropy").result()
        assert hardy.stop() == 0
        (hardy.data / "identity.key").unlink()
        hardy.start()
        assert training.forward_backward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0


# Keys


def test_a_key_that_expires_does(server: Server) -> None:
    key = server.new_key("soon", "--expires", "3s")
    raw = server.raw(key)
    token = token_of(raw)
    assert raw.get("auth/apikey/me").json()["expires_at"] is not None
    assert int(str(claims_of(token)["exp"])) <= time.time() + 3
    wait_for(lambda: raw.get("sessions").status_code == 401, 6.0, "the key to expire")
    assert "expired" in detail(raw.get("sessions"))
    assert server.raw(token).get("sessions").status_code == 401


def test_a_key_ends_itself_at_once_and_no_other(server: Server) -> None:
    first, second = (server.raw(server.new_key(name, "--org", "pair")) for name in ("one", "two"))
    token = server.raw(token_of(first))
    assert first.http.delete("auth/apikey/me").status_code == 200
    for ended in (first, token):
        assert ended.get("sessions").status_code == 401
    assert second.get("sessions").status_code == 200


def test_a_rotated_key_is_replaced_at_once_or_in_a_while(server: Server) -> None:
    old = server.new_key("rotating", "--org", "rotating", "--scope", "read", "--expires", "30d")
    new = server.operate("keys", "rotate", old, "--overlap", "1h")
    for key in (old, new):
        about = server.raw(key).get("auth/apikey/me").json()
        assert (about["name"], about["scopes"]) == ("rotating", ["read"])
    newest = server.operate("keys", "rotate", new)
    wait_for(lambda: server.raw(new).get("sessions").status_code == 401, 10.0, "the key to be refused")
    assert server.raw(newest).get("sessions").status_code == 200


def test_when_a_key_was_last_used_is_known(server: Server) -> None:
    key = server.new_key("used")
    number = server.raw(key).get("auth/apikey/me").json()["key_id"]

    def last_used() -> object:
        listed = json.loads(server.operate("keys", "list", "--json"))
        return next(row["last_used_at"] for row in listed if row["number"] == number)

    wait_for(last_used, 15.0, "the use to be written down")


# The SDK and its program


def test_the_sdk_knows_who_it_is(server: Server) -> None:
    server.operate("org", "create", "lab")
    server.operate("user", "create", "ada@example.org", "--org", "lab", "--name", "Ada")
    key = server.new_key("laptop", "--org", "lab", "--user", "ada@example.org")
    client = tinker.RestClient(base_url=server.url, api_key=key)
    who = client.whoami().result()
    assert who.email == "ada@example.org"
    assert who.user_urn.startswith("tml:organization_user:")
    assert who.org_urn.startswith("tml:organization:")
    # A token by itself is a credential, too.
    token = token_of(server.raw(key))
    assert tinker.RestClient(base_url=server.url, api_key=token).whoami().result() == who


def test_the_sdk_says_that_a_key_is_refused(server: Server) -> None:
    with pytest.raises(tinker.AuthenticationError, match="not valid here"):
        tinker.RestClient(base_url=server.url, api_key="tml-" + "0" * 40)


@pytest.mark.parametrize("generated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tinker_auth_logs_in_says_who_one_is_and_logs_out(
    server: Server, tmp_path: Path, generated: bool
) -> None:
    key = server.new_key("program", "--org", f"program-{generated}", "--note", "n")
    environment = {name: value for name, value in os.environ.items() if name != "TINKER_API_KEY"}
    environment |= {"TINKER_BASE_URL": server.url, "HOME": str(tmp_path), "COLUMNS": "250"}

    def run(*words: str, said: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tinker.cli", *words],
            env=environment, input=said, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    refused = run("auth", "login", said="tml-nonsense\n")
    assert (exit_code(refused), "not valid here" in refused.stderr) == (1, True)
    login = run("auth", "login", said=f"{key}\n")
    assert f"Logged in as program (program-{generated})" in login.stdout
    with ThreadPoolExecutor(2) as pool:
        status, whoami = pool.map(
            lambda words: run(*words), (["auth", "status"], ["-f", "json", "auth", "whoami"])
        )
    assert "Tinker accessible: yes" in status.stdout
    assert json.loads(whoami.stdout)["email"] == "program"
    stored = tmp_path / ".tinker" / "credentials.json"
    if generated:  # as an older program left it: logging out deletes such a key on the server
        stored.write_text(stored.read_text().replace('"manual"', '"generated"'))
    logout = run("auth", "logout")
    assert (exit_code(logout), "Removed credential" in logout.stdout) == (0, True)
    assert server.raw(key).get("sessions").status_code == (401 if generated else 200)
