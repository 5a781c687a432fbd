"""What a client session has put aside for its training requests, in a folder of its own: sequences that were
sampled with record_stability_info, and custom losses.

sample-HASH.safetensors  the prompt, and tokens and logprobs of every sequence of one sample request
loss-HASH.json           one custom loss, as it was created

Names come from clients, so that files are named by their hashes. A recorded sequence can be used for a day;
every use begins a new one. The day is counted from the file's time to the arrival of the request, so that
a request that is carried out late, or again, finds what it found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tinsmith.engine.commands import RECORD_TTL
from tinsmith.wire.sampling import Sampled
from tinsmith.wire.training import ContentError

SAMPLE, LOSS = "sample", "loss"
MOST_LOSSES = 1000  # of a session


@dataclass(frozen=True, slots=True)
class Recorded:
    """A sequence as it was sampled: int32 ids of its prompt and its own, float32 logprobs at the request's
    temperature."""

    prompt: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


def record(folder: str, request_id: str, prompt: Sequence[int], sequences: Sequence[Sampled]) -> None:
    """Keep what a sample request has sampled. Raises OSError."""
    tensors: dict[str, npt.NDArray[np.generic]] = {"prompt": np.asarray(prompt, np.int32)}
    for index, sequence in enumerate(sequences):
        tensors[f"tokens.{index}"], tensors[f"logprobs.{index}"] = sequence.tokens, sequence.logprobs
    # Not synced: a day's use is not worth that the engine waits for the disk. A dead process loses nothing.
    _write(_file(folder, SAMPLE, request_id), save(tensors), sync=False)


def keep_loss(folder: str, loss_id: str, body: bytes) -> None:
    """Keep a custom loss under its id, for good. Raises ContentError where another one has it; OSError."""
    file = _file(folder, LOSS, loss_id)
    if file.exists() and file.read_bytes() != body:
        raise ContentError(f"custom_loss_seq_id: there is another custom loss {loss_id} in this session")
    if len(list(file.parent.glob(f"{LOSS}-*"))) >= MOST_LOSSES:
        raise ContentError(
            f"this session has {MOST_LOSSES} custom losses already; create a new ServiceClient"
        )
    _write(file, body, sync=True)


def has_loss(folder: str, loss_id: str) -> bool:
    return _file(folder, LOSS, loss_id).exists()


class Aside:
    """The folder of the session that a request arrived in at the time `at`; None where there is none."""

    def __init__(self, folder: str | None, at: float = 0.0) -> None:
        self._folder, self._at = folder, at
        self._samples: dict[str, dict[str, npt.NDArray[np.generic]]] = {}
        self._used: list[Path] = []

    def sequence(self, sequence_id: str, where: str) -> Recorded:
        """Raises ContentError."""
        request_id, _, index = sequence_id.rpartition(":")
        if request_id not in self._samples:
            self._samples[request_id] = self._load(request_id, f"{where} names {sequence_id[:200]!r}, which")
        tensors = self._samples[request_id]
        tokens = tensors.get(f"tokens.{index}")
        if tokens is None:
            count = (len(tensors) - 1) // 2
            raise ContentError(
                f"{where} names {sequence_id[:200]!r}; that request has the sequences 0 to {count - 1}"
            )
        return Recorded(
            tensors["prompt"].astype(np.int32),
            tokens.astype(np.int32),
            tensors[f"logprobs.{index}"].astype(np.float32),
        )

    def _load(self, request_id: str, which: str) -> dict[str, npt.NDArray[np.generic]]:
        try:
            if self._folder is None:
                raise FileNotFoundError
            file = _file(self._folder, SAMPLE, request_id)
            age = self._at - file.stat().st_mtime
            tensors: dict[str, npt.NDArray[np.generic]] = load_file(file)
        except FileNotFoundError:
            raise ContentError(
                f"{which} was not recorded in this session, or expired: sample it from a client with "
                "record_stability_info=True, and train on it within a day"
            ) from None
        except (OSError, SafetensorError) as error:
            raise ContentError(f"{which} was recorded, but cannot be read: {error}") from error
        if age > RECORD_TTL:
            raise ContentError(
                f"{which} has expired: it was sampled or last trained on {age / 3600:.1f} hours ago, and a "
                "day is allowed"
            )
        self._used.append(file)
        return tensors

    def touch(self) -> None:
        """Begin a new day for every sequence that was used."""
        for file in self._used:
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < self._at:
                    os.utime(file, (self._at, self._at))

    def loss(self, loss_id: str) -> bytes:
        """A custom loss as it was created. Raises ContentError."""
        try:
            if self._folder is None:
                raise FileNotFoundError
            return _file(self._folder, LOSS, loss_id).read_bytes()
        except FileNotFoundError:
            raise ContentError(
                f"loss_fn_config['loss_id'] is {loss_id[:200]!r}; this session has no such custom loss: "
                "create it with ServiceClient.create_custom_loss"
            ) from None


def _file(folder: str, kind: str, name: str) -> Path:
    suffix = "safetensors" if kind == SAMPLE else "json"
    return Path(folder) / f"{kind}-{hashlib.sha256(name.encode()).hexdigest()[:40]}.{suffix}"


def _write(file: Path, data: bytes, *, sync: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            if sync:
                f.flush()
                os.fsync(f.fileno())
        os.rename(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
