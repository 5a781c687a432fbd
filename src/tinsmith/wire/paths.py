"""Checkpoint paths, `tinker://{run}/{weights|sampler_weights|external_weights}/{name}`, and names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .errors import WireError

CheckpointKind = Literal["training", "sampler", "external"]

_SEGMENTS: dict[str, CheckpointKind] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
_SEGMENT_OF: dict[CheckpointKind, str] = {kind: segment for segment, kind in _SEGMENTS.items()}
_SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9_.\-+=@,:~ ]+")
LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """Where a checkpoint is found by those who use it (never a path in a file system)."""

    run: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        """The id that URLs and listings use, with its slash."""
        return f"{_SEGMENT_OF[self.kind]}/{self.name}"

    @classmethod
    def parse(cls, text: str, field: str = "path") -> TinkerPath:
        parts = text.removeprefix(_SCHEME).split("/")
        if not text.startswith(_SCHEME) or len(parts) != 3 or parts[1] not in _SEGMENTS or not all(parts):
            raise WireError(
                field,
                f"must look like tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME,"
                f" not {text[:120]!r}",
            )
        return cls(parts[0], _SEGMENTS[parts[1]], parts[2])

    @classmethod
    def from_checkpoint_id(cls, run: str, checkpoint_id: str) -> TinkerPath:
        return cls.parse(f"{_SCHEME}{run}/{checkpoint_id}", "checkpoint_id")


def check_name(name: str, field: str = "path") -> str:
    """A checkpoint's name: one segment of a path, so that it can neither leave nor nest."""
    if not name:
        raise WireError(field, "is empty; give the checkpoint a name")
    if len(name) > LONGEST_NAME:
        raise WireError(field, f"has {len(name)} characters; a name has at most {LONGEST_NAME}")
    if name.strip(". ") == "" or not _NAME.fullmatch(name):
        raise WireError(
            field,
            f"{name[:60]!r} is no name for a checkpoint; use letters, digits, blanks"
            " and _ . - + = @ , : ~ (no slash)",
        )
    return name
