"""Undoing zstd with a limit, so that a small body cannot become an enormous one."""

from __future__ import annotations

import zstandard

from .errors import BodyTooLarge, WireError

_STEP = 1 << 20
_PREFIX = 1 << 16


MAGIC = b"\x28\xb5\x2f\xfd"  # how zstd data begins


def decompress_prefix(prefix: bytes) -> bytes:
    """The first bytes of the content of zstd data that was cut off, as far as they can be had."""
    with zstandard.ZstdDecompressor().stream_reader(prefix) as reader:
        try:
            return reader.read(_PREFIX)
        except zstandard.ZstdError:
            return b""


def decompress(body: bytes, limit: int) -> bytes:
    """The content of the zstd frames in `body`, of which at most `limit` bytes are ever made."""
    parts: list[bytes] = []
    size = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
            while part := reader.read(min(_STEP, limit + 1 - size)):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise BodyTooLarge(limit, b"".join(parts)[:_PREFIX])
        # The reader takes a frame that was cut short for one that ended; its header knows better.
        whole = zstandard.frame_content_size(body) if body else 0
    except zstandard.ZstdError as error:
        raise WireError("body", f"is no valid zstd data ({error})") from None
    if size < whole:
        raise WireError("body", "ends in the middle of its zstd data")
    return b"".join(parts)
