"""Copies of a data folder, while its server runs or not, and making a data folder of one.

A copy is of one moment: SQLite copies the database as it is at an instant, without holding up its writer, and
blobs never change once they are written. They may be deleted, though, between that instant and their turn.
So hard links to all of them are made before the database is copied, and again behind it; then what the
copy refers to is looked for among them, and if the server was quicker, all begins anew. From then on a
deleted blob is still there under its link.

What an engine holds in memory is not in the data folder: a training run goes on from its newest checkpoint,
as after a crash. A server that was stopped has put everything away; a copy made then is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import zstandard

from tinsmith.store import reading, references

MANIFEST = "backup.json"
_ARCHIVES = (".tar", ".tar.zst")
_NOT_COPIED = frozenset({"lock", reading.FILE, *(reading.FILE + end for end in ("-wal", "-shm", "-journal"))})
_ATTEMPTS = 20
_CHUNK = 1 << 20


class BackupError(Exception):
    """A copy cannot be made or used; the message says why."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What is in a copy. `absent` are blobs that the database names and that its data folder did not have."""

    files: int
    size_bytes: int
    absent: tuple[str, ...] = ()


def backup(data: Path, out: Path) -> Summary:
    """Copy the data folder `data` into the new folder, .tar or .tar.zst file `out`. Raises BackupError."""
    if not (data / reading.FILE).is_file():
        raise BackupError(f"{data} is no data folder of a server: it has no {reading.FILE}")
    _check_out(out, data)
    try:
        with _scratch(data, "backup") as farm:
            absent = _gather(data, farm)
            archived = out.name.endswith(_ARCHIVES)
            with _scratch(out.parent, out.name, folder=not archived) as part:
                with _Archive(part, out.name) if archived else _Folder(part) as written:
                    summary = _copy_all(farm, written, absent)
                os.rename(part, out)
            _sync(out.parent)
            return summary
    except reading.NoDatabase as error:
        raise BackupError(str(error)) from error
    except OSError as error:
        raise BackupError(f"{out} could not be written: {error.strerror or error}") from error


def restore(source: Path, data: Path) -> Summary:
    """Make the data folder `data`, which must be new or empty, of a copy. Raises BackupError."""
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise BackupError(f"{data} exists and is not empty; name a data folder that is new")
    if not source.exists():
        raise BackupError(f"there is no {source}")
    data.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _scratch(data.parent, data.name) as part:
            if source.is_dir():
                _unfold(source, part)
            else:
                _unpack(source, part)
            summary = _verify(part, source)
            with contextlib.suppress(OSError):
                data.rmdir()
            os.rename(part, data)
        _sync(data.parent)
        return summary
    except reading.NoDatabase as error:
        raise BackupError(str(error)) from error
    except OSError as error:
        raise BackupError(f"{data} could not be written: {error.strerror or error}") from error


def _check_out(out: Path, data: Path) -> None:
    if out.exists() or out.is_symlink():
        raise BackupError(f"{out} exists already; name one that does not")
    if out.resolve().is_relative_to(data.resolve()):
        raise BackupError(f"{out} lies in the data folder itself; name a place outside of it")
    if not out.parent.is_dir():
        raise BackupError(f"there is no folder {out.parent}")
    if out.suffix in (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst") and not out.name.endswith(_ARCHIVES):
        raise BackupError(f"{out.name}: a copy is a folder, or a file that ends in {' or '.join(_ARCHIVES)}")


# One moment of the data folder


def _gather(data: Path, farm: Path) -> tuple[str, ...]:
    """Fill `farm` with the database as it was at one moment, and links to all that it refers to. Answers the
    blobs that are nowhere."""
    blobs, linked = data / "blobs", farm / "blobs"
    linked.mkdir()
    absent: set[str] | None = None
    for _ in range(_ATTEMPTS):
        _link_all(blobs, linked)
        (farm / reading.FILE).unlink(missing_ok=True)
        reading.copy(data / reading.FILE, farm / reading.FILE)
        _link_all(blobs, linked)
        with reading.read_only(farm / reading.FILE) as connection:
            needed = references.blobs(connection)
        # An upload has no folder before its first file has come.
        missing = {key for key in needed if not key.startswith("uploads/") and not (linked / key).exists()}
        if not missing or missing == absent:  # what is missing twice in a row was not deleted meanwhile
            break
        absent = missing
    else:
        raise BackupError(f"{data} changes faster than it can be copied; try again when less is going on")
    for kind in linked.iterdir():
        for entry in kind.iterdir():
            if f"{kind.name}/{entry.name}" not in needed:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for file in sorted(data.iterdir()):
        if stat.S_ISREG(file.lstat().st_mode) and file.name not in _NOT_COPIED:
            shutil.copy2(file, farm / file.name)
    return tuple(sorted(missing))


def _link_all(blobs: Path, linked: Path) -> None:
    if not blobs.is_dir():
        return
    for kind in os.scandir(blobs):
        if not kind.is_dir():
            continue
        (linked / kind.name).mkdir(exist_ok=True)
        for entry in os.scandir(kind.path):
            target = linked / kind.name / entry.name
            if not entry.name.startswith(".") and not target.exists():
                _link(Path(entry.path), target)


def _link(source: Path, target: Path) -> None:
    """A blob, or a folder of them, under a second name; nothing if it goes away in this moment."""
    try:
        if not source.is_dir():
            _link_or_copy(source, target)
            return
        target.mkdir()
        names = sorted(os.listdir(source))
        for name in names:
            _link_or_copy(source / name, target / name)
        if sorted(os.listdir(source)) != names:
            raise FileNotFoundError
    except FileNotFoundError:
        shutil.rmtree(target, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        part = target.with_name(f".{target.name}")
        shutil.copyfile(source, part)
        os.rename(part, target)


# The copy


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for folder in (self._root, *(f for f in self._root.rglob("*") if f.is_dir())):
                _sync(folder)

    def add(self, name: str, file: IO[bytes], size: int, mode: int) -> str:
        """Write a file; answers its SHA-256."""
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(target, "xb") as out:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        target.chmod(mode)
        return digest.hexdigest()


class _Archive:
    def __init__(self, file: Path, name: str) -> None:
        self._raw = open(file, "wb")  # noqa: SIM115
        packed: Any = zstandard.ZstdCompressor().stream_writer(self._raw, closefd=False)
        self._packed = packed if name.endswith(".zst") else None
        self._tar = tarfile.open(fileobj=self._packed or self._raw, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._tar.close()
            if self._packed is not None:
                self._packed.close()
            self._raw.flush()
            os.fsync(self._raw.fileno())
        except Exception:
            if kind is None:  # else there is a reason already why it is not whole
                raise
        finally:
            self._raw.close()

    def add(self, name: str, file: IO[bytes], size: int, mode: int) -> str:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, mode, int(time.time())
        hashed = _Hashed(file)
        self._tar.addfile(info, hashed)  # type: ignore[arg-type]
        return hashed.digest.hexdigest()


class _Hashed:
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self.digest.update(chunk)
        return chunk


def _copy_all(farm: Path, written: _Folder | _Archive, absent: tuple[str, ...]) -> Summary:
    files: dict[str, dict[str, object]] = {}
    total = 0
    for path in sorted(file for file in farm.rglob("*") if file.is_file()):
        name, size = path.relative_to(farm).as_posix(), path.stat().st_size
        with open(path, "rb") as file:
            digest = written.add(name, file, size, stat.S_IMODE(path.stat().st_mode))
        files[name] = {"size": size, "sha256": digest}
        total += size
    manifest = {
        "created_at": time.time(),
        "absent": list(absent),
        "files": files,
    }
    # Last of all: a copy without it is not whole.
    text = json.dumps(manifest, indent=1).encode()
    written.add(MANIFEST, io.BytesIO(text), len(text), 0o600)
    return Summary(len(files), total, absent)


# A data folder of a copy


def _unfold(source: Path, part: Path) -> None:
    for path in sorted(file for file in source.rglob("*") if file.is_file()):
        with open(path, "rb") as file:
            _put(part, path.relative_to(source).as_posix(), file, stat.S_IMODE(path.stat().st_mode))


def _unpack(source: Path, part: Path) -> None:
    try:
        with open(source, "rb") as raw, contextlib.ExitStack() as stack:
            stream: Any = raw
            if raw.read(4) == zstandard.FRAME_HEADER:
                raw.seek(0)
                stream = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(raw))
            else:
                raw.seek(0)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.isreg() else None
                    if file is None:
                        raise BackupError(f"{source} is no copy of a data folder: {member.name} is no file")
                    _put(part, member.name, file, member.mode & 0o777)
    except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise BackupError(f"{source} is no copy of a data folder, or not all of one: {error}") from error


def _put(part: Path, name: str, file: IO[bytes], mode: int) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise BackupError(f"the copy has a file of the name {name!r}, which leads out of the data folder")
    target = part / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb") as out:
        shutil.copyfileobj(file, out, _CHUNK)
        out.flush()
        os.fsync(out.fileno())
    target.chmod(mode | 0o600)


def _verify(part: Path, source: Path) -> Summary:
    """That everything is there as it was copied. Takes the manifest out."""
    try:
        manifest = json.loads((part / MANIFEST).read_text())
        files: dict[str, dict[str, object]] = manifest["files"]
        absent = tuple(manifest["absent"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BackupError(
            f"{source} is no copy of a data folder, or not all of one: it has no {MANIFEST}"
        ) from None
    (part / MANIFEST).unlink()
    found = {file.relative_to(part).as_posix(): file for file in part.rglob("*") if file.is_file()}
    total = 0
    for name in sorted(files.keys() | found.keys()):
        if name not in found or name not in files:
            raise BackupError(f"{source} is damaged: {name} is {'missing' if name in files else 'too much'}")
        with open(found[name], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != files[name]["sha256"]:
            raise BackupError(f"{source} is damaged: {name} is not what was copied")
        total += found[name].stat().st_size
    reading.check_known(part / reading.FILE)
    return Summary(len(files), total, absent)


# Files and folders that are not there before they are whole


@contextlib.contextmanager
def _scratch(parent: Path, name: str, *, folder: bool = True) -> Iterator[Path]:
    """A new folder or file beside `name`, locked, and gone at the end unless it was renamed. What an earlier
    process left there when it was killed goes first."""
    for left in parent.glob(f".{glob.escape(name)}.*.partial"):
        with contextlib.suppress(OSError), _locked(left):
            _remove(left)
    path = parent / f".{name}.{uuid.uuid4().hex[:12]}.partial"
    path.mkdir() if folder else path.touch(0o600)
    with _locked(path):
        try:
            yield path
        finally:
            _remove(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises OSError if another process holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
