"""A checkpoint's safetensors files: what lies in them, and reading it a piece at a time.

Files are read and not mapped into memory: the pages of a mapped file count as the process's own, and loading
would seem to need (and in a container with a limit, need) all of the files beside all of the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from tinsmith.engine.model.errors import ModelError

PIECE = 1 << 20  # elements that are on their way at a time on a CPU
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100 << 20  # bytes, as the format says
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def piece_size(device: torch.device) -> int:
    """How many elements to handle at a time: to another device small copies are slow."""
    return PIECE if device.type == "cpu" else 32 * PIECE


class Weights(Protocol):
    """A tensor that can be had in any dtype and on any device, without a second copy of all of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def place(self) -> tuple[str, int]:
        """Its file and where it begins there: reading in this order is fastest."""
        ...

    def read(self, into: Tensor) -> None:
        """Fill `into`, a contiguous tensor or view of this shape. Raises ModelError."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file, from byte `start` on."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def place(self) -> tuple[str, int]:
        return str(self.file), self.start

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, into: Tensor) -> None:
        if into.dtype == self.dtype and into.device.type == "cpu":
            with open(self.file, "rb", buffering=0) as file:
                self._fill(file, self.start, into)
            return
        flat = into.view(-1)
        for first, piece in self.pieces(piece_size(into.device)):
            flat[first : first + len(piece)] = piece.to(into.device)

    def whole(self) -> Tensor:
        """All of it, in its own dtype."""
        made = torch.empty(self.shape, dtype=self.dtype)
        self.read(made)
        return made

    def pieces(self, size: int, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Elements [first, stop), `size` at a time: (index of the first one, them in their own dtype)."""
        stop = math.prod(self.shape) if stop is None else stop
        with open(self.file, "rb", buffering=0) as file:
            for at in range(first, stop, size):
                made = torch.empty(min(size, stop - at), dtype=self.dtype)
                self._fill(file, self.start + at * self.dtype.itemsize, made)
                yield at, made

    def _fill(self, file: Any, start: int, into: Tensor) -> None:
        view = memoryview(into.view(-1).view(torch.uint8).numpy().data)
        file.seek(start)
        at = 0
        while at < len(view):
            count = file.readinto(view[at : at + (1 << 30)])
            if not count:
                raise ModelError(f"{self.file} ends in the middle of the tensor {self.name}")
            at += count


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's weight files, by its name there. Raises ModelError."""
    found: dict[str, Stored] = {}
    for file, expected in _files(folder).items():
        here = read_header(file)
        if absent := sorted(expected - here.keys()):
            raise ModelError(f"{folder / INDEX} says that {absent[0]} is in {file.name}, where it is not")
        found.update(here)
    if not found:
        raise ModelError(f"{folder}: its weight files hold no tensors")
    return found


def _files(folder: Path) -> dict[Path, set[str]]:
    """The weight files of a folder, each with the tensors that the index says are in it."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"{folder} has no weights: {_other_weights(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ModelError(f"{index}: {name!r} (of {tensor}) is no name of a file beside it")
        files.setdefault(folder / name, set()).add(tensor)
    for file in files:
        if not file.is_file():
            raise ModelError(f"{folder} lacks {file.name}, one of {len(files)} files that its index names")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_checkpoint` reads, the index among them, by name. Raises ModelError."""
    files = sorted(_files(folder))
    return files if files == [folder / SINGLE] else sorted([*files, folder / INDEX])


def _other_weights(folder: Path) -> str:
    for pattern, what in (
        ("*.gguf", "GGUF"),
        ("*.bin", "PyTorch's pickles"),
        ("*.pt*", "PyTorch's pickles"),
        ("*.safetensors", "safetensors under another name"),
    ):
        if others := sorted(file for file in folder.glob(pattern) if file.is_file()):
            return f"neither {SINGLE} nor {INDEX}; {others[0].name} is {what}, which is not loaded here"
    return f"neither {SINGLE} nor {INDEX}"


def read_json(file: Path) -> dict[str, Any]:
    """Raises ModelError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ModelError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} is no JSON object")
    return found


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ModelError if it is not whole."""
    try:
        with open(file, "rb") as stream:
            return _read_header(file, stream)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None


def _read_header(file: Path, stream: BinaryIO) -> dict[str, Stored]:
    size = file.stat().st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise ModelError(f"{file} is truncated, or no safetensors file: it has {size} bytes")
    if length > _HEADER_LIMIT:
        raise ModelError(f"{file} is no safetensors file: its header would have {length} bytes")
    found: dict[str, Stored] = {}
    try:
        header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(isinstance(n, int) and n >= 0 for n in (first, last, *shape)):
                raise ValueError(f"{name} has impossible sizes")
            if entry["dtype"] not in _DTYPES:
                raise ModelError(f"{file}: {name} has the dtype {entry['dtype']}, which is not known here")
            stored = Stored(file, name, _DTYPES[entry["dtype"]], shape, 8 + length + first)
            if stored.nbytes != last - first:
                raise ValueError(f"{name} has {last - first} bytes where its shape needs {stored.nbytes}")
            found[name] = stored
        end = 0
        for stored in sorted(found.values(), key=lambda stored: (stored.start, stored.nbytes)):
            if stored.start != 8 + length + end:
                raise ValueError(f"{stored.name} does not begin where the tensor before it ends")
            end += stored.nbytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a corrupt header: {error}") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{file} is {'truncated' if size < 8 + length + end else 'corrupt'}: it has {size} bytes, and "
            f"its header describes {8 + length + end}"
        )
    return found
