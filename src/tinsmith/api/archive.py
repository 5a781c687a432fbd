"""A tar of files as it is sent: nothing is written, and its length is known before."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 20  # bytes that are read at a time


def length(sizes: Sequence[int]) -> int:
    """Of a tar of files of these sizes, in bytes."""
    blocks = sum(tarfile.BLOCKSIZE + size + _padding(size) for size in sizes)
    return blocks + 2 * tarfile.BLOCKSIZE


def pieces(files: Sequence[tuple[str, int, Path | None]]) -> Iterator[bytes]:
    """The tar's bytes, of (name, size, where it lies) in this order; None lies nowhere and is empty.

    All are opened before the first byte: a checkpoint that is deleted meanwhile is sent whole. A file that
    has become shorter ends the tar with an OSError, so that nobody takes it for whole.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(path, "rb")) if path else None for _, _, path in files]
        for (name, size, _), file in zip(files, opened, strict=True):
            info = tarfile.TarInfo(name)
            info.size, info.mode = size, 0o644
            yield info.tobuf(tarfile.GNU_FORMAT)
            if file is not None:
                yield from _content(file, size)
            yield bytes(_padding(size))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _content(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise OSError(f"{file.name} has become shorter")
        size -= len(piece)
        yield piece


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
