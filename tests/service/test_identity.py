"""Tokens: what they say, and how long."""

from __future__ import annotations

import time

import pytest

from tinsmith.service.caller import Caller
from tinsmith.service.identity import Identities

NOBODY: frozenset[str] = frozenset()
CALLER = Caller("key", "o", "org", "u", "user", None, "member", None, None, False, "home", {}, NOBODY, NOBODY)


def test_a_token_that_was_read_before_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    identities, now = Identities(b"s" * 32), time.time()
    token = identities.issue(CALLER, until=now + 100)
    for _ in range(2):
        read = identities.read(token)
        assert read is not None
        assert (read.key_id, read.expires_at) == ("key", int(now + 100))
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert identities.read(token) is None


def test_what_was_changed_or_signed_by_another_is_none_of_ours() -> None:
    identities = Identities(b"s" * 32)
    token = identities.issue(CALLER)
    head, claims, signature = token.split(".")
    assert identities.read(token) is not None
    for wrong in (f"{head}.{claims[:-2]}AA.{signature}", Identities(b"t" * 32).issue(CALLER), "eyJ", ""):
        for _ in range(2):
            assert identities.read(wrong) is None
