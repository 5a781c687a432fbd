"""The few fields of a ForwardBackwardRequest that the control plane needs.

Decoding a request of many megabytes to learn its run and number would cost more than everything
else that the service does with it, so this walks over the message's outermost fields and skips
their content. What is inside is the engine's to judge.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import WireError

_MODEL_ID, _SEQ_ID, _FORWARD_ONLY = 1, 2, 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Envelope:
    """Which run a request belongs to, and its place there."""

    model_id: str
    seq_id: int
    forward_only: bool


def read_envelope(body: bytes, *, cut: bool = False) -> Envelope:
    """The envelope of a serialized ForwardBackwardRequest. With `cut`, `body` is only its beginning."""
    model_id, seq_id, forward_only = "", 0, False
    at, end = 0, len(body)
    while at < end:
        try:
            tag, at = _varint(body, at)
            number, kind = tag >> 3, tag & 7
            if number == 0:
                raise WireError("body", "is no valid protobuf message (field number 0)")
            if kind == _VARINT:
                value, at = _varint(body, at)
                if number == _SEQ_ID:
                    seq_id = (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
                elif number == _FORWARD_ONLY:
                    forward_only = bool(value)
            elif kind == _BYTES:
                size, at = _varint(body, at)
                if at + size > end:
                    raise IndexError
                if number == _MODEL_ID:
                    model_id = body[at : at + size].decode("utf-8")
                at += size
            elif kind in (_FIXED64, _FIXED32):
                at += 8 if kind == _FIXED64 else 4
                if at > end:
                    raise IndexError
            else:
                raise WireError("body", f"is no valid protobuf message (wire type {kind} at byte {at})")
        except IndexError:
            if cut:
                break
            raise WireError("body", f"ends in the middle of a protobuf field (at byte {end})") from None
        except UnicodeDecodeError:
            raise WireError("model_id", "is no valid UTF-8") from None
    if not model_id:
        raise WireError("model_id", "is missing; it names the training run")
    if seq_id < 1:
        raise WireError("seq_id", f"must be an integer of at least 1, not {seq_id}")
    return Envelope(model_id, seq_id, forward_only)


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise WireError("body", f"is no valid protobuf message (an endless number at byte {at})")
