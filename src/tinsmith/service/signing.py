"""Signed addresses: what a URL says may be done without a key, until its time is over."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
import uuid
from pathlib import Path

from .errors import Forbidden, Gone


class Signer:
    """Signs with HMAC-SHA256, by a secret that the data folder keeps: URLs live on after a restart."""

    def __init__(self, file: Path) -> None:
        self._secret = secret_in(file)

    def sign(self, what: str, expires: int) -> str:
        """A signature for `what`, an address and what may be done there, until `expires` (since 1970)."""
        message = f"{expires}\n{what}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def check(self, what: str, expires: str, signature: str) -> None:
        """Raises Forbidden, or Gone where the time is over."""
        if not expires.isascii() or not expires.isdigit() or len(expires) > 12:
            raise Forbidden("this URL is not one that the server has signed")
        if not hmac.compare_digest(self.sign(what, int(expires)).encode(), signature.encode()):
            raise Forbidden("this URL is not one that the server has signed")
        if int(expires) < time.time():
            raise Gone("the time of this URL is over; ask for new URLs")


def secret_in(file: Path) -> bytes:
    """The secret in `file`, of which there is exactly one however many processes start at once."""
    if not file.exists():
        part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, secrets.token_bytes(32))
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(part, file)
        except FileExistsError:
            pass
        finally:
            part.unlink()
    return file.read_bytes()
