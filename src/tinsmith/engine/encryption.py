"""Encryption of a checkpoint's files to age recipients (age-encryption.org)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyrage

from tinsmith.wire.training import ContentError

SUFFIX = ".age"
_age: Any = pyrage  # it comes without types


def read_recipients(texts: Sequence[str]) -> list[Any]:
    """Native `age1...` keys and SSH public keys. Raises ContentError, which names the one that is neither."""
    recipients: list[Any] = []
    for index, text in enumerate(texts):
        kind = _age.x25519 if text.startswith("age1") else _age.ssh
        try:
            recipients.append(kind.Recipient.from_str(text.strip()))
        except Exception as error:
            raise ContentError(
                f"age_encryption_recipients[{index}]: {text[:40]!r} is no age recipient ({error}); give a"
                " native key (age1...) or an SSH public key (ssh-ed25519 ..., ssh-rsa ...)"
            ) from error
    return recipients


def seal(folder: Path, recipients: Sequence[Any]) -> None:
    """Encrypt every file of `folder` to `recipients`, and delete what was readable. Raises OSError."""
    for file in sorted(folder.iterdir()):
        try:
            _age.encrypt_file(str(file), f"{file}{SUFFIX}", recipients)
        except _age.EncryptError as error:
            raise OSError(f"{file.name} could not be encrypted: {error}") from error
        file.unlink()
