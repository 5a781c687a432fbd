"""zstd with a limit."""

from __future__ import annotations

import time

import pytest
import zstandard

from tinsmith.wire.compression import decompress, decompress_prefix
from tinsmith.wire.errors import BodyTooLarge, WireError


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * 2**20])
def test_what_was_compressed_comes_back(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert decompress(_compress(data), 2**30) == data


def test_several_frames_are_one_body() -> None:
    assert decompress(_compress(b"one") + _compress(b"two"), 100) == b"onetwo"


def test_the_limit_is_exact() -> None:
    assert len(decompress(_compress(bytes(1000)), 1000)) == 1000
    with pytest.raises(BodyTooLarge, match="999"):
        decompress(_compress(bytes(1000)), 999)


def test_a_bomb_is_given_up_at_the_limit() -> None:
    bomb = _compress(bytes(10**9))
    started = time.monotonic()
    with pytest.raises(BodyTooLarge) as caught:
        decompress(bomb, 10**6)
    assert time.monotonic() - started < 0.5
    assert caught.value.prefix == bytes(65536)


def test_broken_data_is_refused() -> None:
    whole = _compress(bytes(range(256)) * 100)
    for body in (b"n", b"nonsense", whole[:3], whole[:-3], whole[: len(whole) // 2]):
        with pytest.raises(WireError):
            decompress(body, 2**30)
    assert decompress(b"", 2**30) == b""


def test_a_prefix_gives_what_can_be_had() -> None:
    data = bytes(range(256)) * 4000
    compressed = zstandard.ZstdCompressor(level=1).compress(data)
    assert data.startswith(decompress_prefix(compressed[:5000]))
    assert decompress_prefix(b"nonsense") == b""
