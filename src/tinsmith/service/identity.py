"""Short-lived identities: a signed token (JWT) that a key is exchanged for.

The token says who its holder is, and is taken in the key's place until it expires; what its holder may
do is looked up anew all the time, by the key that it was made from. The secret that signs it never
leaves the data folder.
"""

from __future__ import annotations

import functools
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import jwt

from tinsmith.wire.urns import user_urn

from .caller import Caller
from .signing import secret_in

LIFETIME = 3600  # seconds
# The SDK takes a token's claims for the caller's identity where its issuer begins with "passport-".
_ISSUER = "passport-tinsmith"
_ALGORITHM = "HS256"


def is_token(credential: str) -> bool:
    """Whether a credential is meant as a token, and not as a key."""
    return credential.startswith("eyJ")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a valid token says."""

    key_id: str
    expires_at: float


class Identities:
    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        # A signature that holds once holds for ever, and a client shows the same token with every request.
        self._signed = functools.lru_cache(maxsize=4096)(self._read)

    @classmethod
    def of_folder(cls, data: Path) -> Identities:
        """With the secret of a data folder. Only the folder's owner can read it: whoever can, could be
        everybody."""
        return cls(secret_in(data / "identity.key"))

    def issue(self, caller: Caller, until: float | None = None) -> str:
        """A token for `caller`, good for an hour, and no longer than `until`."""
        now = int(time.time())
        expires = now + LIFETIME
        if until is not None:
            expires = min(expires, int(until))
        claims = {
            "iss": _ISSUER,
            "sub": user_urn(caller.user_id),
            "org_id": caller.org_id,
            "email": caller.user_email or caller.user_name,
            "key": caller.key_id,
            "iat": min(now, expires - 1),
            "exp": expires,
            "jti": uuid.uuid4().hex,
        }
        return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)

    def read(self, token: str) -> Identity | None:
        """What a token says; None where it is not one of ours, was changed, or has expired."""
        try:
            identity = self._signed(token)
        except jwt.InvalidTokenError:
            return None
        return identity if time.time() < identity.expires_at else None

    def _read(self, token: str) -> Identity:
        """Raises jwt.InvalidTokenError (which no cache keeps)."""
        claims = jwt.decode(
            token,
            self._secret,
            algorithms=[_ALGORITHM],
            issuer=_ISSUER,
            options={"require": ["exp", "iat", "iss", "sub", "key"]},
        )
        if not isinstance(claims["key"], str):
            raise jwt.InvalidTokenError("its key is no string")
        return Identity(claims["key"], float(claims["exp"]))
