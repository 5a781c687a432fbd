"""A tar of files as it is sent: nothing is written, and its length is known before."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_PIECE = 1 << 20  # bytes that are read at a time


def length(sizes: Sequence[int]) -> int:
    """Of a tar of files of these sizes, in bytes."""
    blocks = sum(tarfile.BLOCKSIZE + size + _padding(size) for size in sizes)
    return blocks + 2 * tarfile.BLOCKSIZE


def pieces(files: Sequence[tuple[str, int, Path | None]]) -> Iterator[bytes]:
    """The tar's bytes, of (name, size, where it lies) in this order; None lies nowhere and is empty. A file
    that has become shorter ends the tar with an OSError, so that nobody takes it for whole."""
    for name, size, path in files:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        yield info.tobuf(tarfile.GNU_FORMAT)
        if path is not None:
            yield from _content(path, size)
        yield bytes(_padding(size))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _content(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while size:
            piece = file.read(min(size, _PIECE))
            if not piece:
                raise OSError(f"{path.name} has become shorter")
            size -= len(piece)
            yield piece


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
