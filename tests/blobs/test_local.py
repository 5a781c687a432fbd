"""The local blob store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinsmith.blobs import LocalBlobs


def test_a_blob_comes_back_and_goes(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.put("bodies/a1", b"data")
    assert blobs.get("bodies/a1") == b"data"
    assert list(blobs.keys("bodies")) == ["bodies/a1"]
    blobs.delete("bodies/a1")
    blobs.delete("bodies/a1")
    assert list(blobs.keys("bodies")) == []


def test_a_folder_can_be_deleted_whole(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    folder = blobs.path("checkpoints/c1")
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    assert list(blobs.keys("checkpoints")) == ["checkpoints/c1"]
    blobs.delete("checkpoints/c1")
    assert not folder.exists()


@pytest.mark.parametrize(
    "key",
    ["", "a", "../a", "a/../b", "a/..", "/etc/passwd", "a/b/c", "a/.", "A/b", "a/b\0", "a/.part-x", "a/b\n"],
)
def test_keys_cannot_leave(tmp_path: Path, key: str) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    for use in (blobs.path, blobs.get, blobs.delete):
        with pytest.raises(ValueError, match="no blob key"):
            use(key)
    with pytest.raises(ValueError, match="no blob key"):
        blobs.put(key, b"x")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        blobs.put("bodies/a", b"data")
    assert list((tmp_path / "bodies").iterdir()) == []


def test_what_a_crash_left_half_written_is_swept(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.put("bodies/whole", b"x")
    (tmp_path / "bodies" / ".part-1").write_bytes(b"y")
    (tmp_path / "bodies" / ".folder.partial").mkdir()  # an engine's, that was being written
    (tmp_path / "bodies" / ".folder.partial" / "weights").write_bytes(b"z")
    assert list(blobs.keys("bodies")) == ["bodies/whole"]
    blobs.sweep_unfinished()
    assert [path.name for path in (tmp_path / "bodies").iterdir()] == ["whole"]
