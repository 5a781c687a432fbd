"""Copies of a data folder, while its server works and after it has stopped; and what no copy may become."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Server, datum
from tinsmith.service import backup as module
from tinsmith.service.backup import BackupError, backup, restore
from tinsmith.store import reading, references

DATA = [datum(10)]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def check_whole(data: Path) -> int:
    """That a data folder has everything that its database names. How much that is."""
    with reading.read_only(data / reading.FILE) as connection:
        keys = references.blobs(connection)
    assert {key for key in keys if not (data / "blobs" / key).exists()} == set()
    return len(keys)


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A server that has stopped, a run that was put away with gradients accumulated, and a checkpoint."""
    server = Server(tiny_model, tmp_path_factory.mktemp("stopped") / "data").start()
    raw = server.raw()
    run = raw.run(raw.session())
    raw.result(raw.forward_backward(run, 1))
    raw.result(raw.optim(run, 2))
    path = raw.result(raw.save(run, 3, "first"))["path"]
    raw.result(raw.forward_backward(run, 4))
    server.stop()
    yield server, run, path
    server.end()


@pytest.fixture
def data(stopped: tuple[Server, str, str], tmp_path: Path) -> Path:
    """A data folder to work on."""
    return shutil.copytree(stopped[0].data, tmp_path / "data")


@pytest.mark.parametrize("name", ["copy", "copy.tar", "copy.tar.zst"])
def test_a_copy_becomes_the_same_data_folder_again(data: Path, tmp_path: Path, name: str) -> None:
    made = backup(data, tmp_path / name)
    restored = restore(tmp_path / name, tmp_path / "again")
    assert made == restored
    before, after = contents(data), contents(tmp_path / "again")
    ignored = {reading.FILE, "tinsmith.db-wal", "tinsmith.db-shm", "lock"}
    assert {n: x for n, x in after.items() if n not in ignored} == {
        n: x for n, x in before.items() if n not in ignored
    }
    assert check_whole(tmp_path / "again") >= 2
    mode = (tmp_path / "again" / "url-signing.key").stat().st_mode
    assert mode & 0o077 == 0


def test_a_stopped_servers_runs_go_on_from_the_copy_bit_for_bit(
    stopped: tuple[Server, str, str], tiny_model: Path, tmp_path: Path
) -> None:
    server, run, path = stopped
    backup(server.data, tmp_path / "copy")
    restore(tmp_path / "copy", tmp_path / "data")
    ends = []
    for data in (server.data, tmp_path / "data"):
        each = Server(tiny_model, data).start()
        try:
            raw = each.raw()
            raw.result(raw.optim(run, 5))
            ends.append(raw.result(raw.forward_backward(run, 6))["protobuf"])
            assert path in json.dumps(raw.get(f"training_runs/{run}/checkpoints").json())
        finally:
            each.end()
    assert ends[0] == ends[1]


class Load(threading.Thread):
    """A client that trains, saves, overwrites and deletes without a pause."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.ended, self.rounds = server, threading.Event(), 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            rest = tinker.RestClient(base_url=self.server.url, api_key=KEY)
            with self.server.sdk() as client:
                training = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
                while not self.ended.is_set():
                    training.forward_backward(DATA, "cross_entropy").result()
                    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
                    training.save_state("newest", overwrite=True).result()
                    path = training.save_state(f"round-{self.rounds}").result().path
                    if self.rounds % 2:
                        rest.delete_checkpoint_from_tinker_path(path).result()
                    self.rounds += 1
        except BaseException as error:
            self.error = error


def test_a_server_goes_on_training_while_it_is_copied_and_every_copy_serves(
    make_server: Callable[..., Server], tiny_model: Path, tmp_path: Path
) -> None:
    server = make_server().start()
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        training.forward_backward(DATA, "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        state = training.save_state("kept").result().path
        sampler = training.save_weights_for_sampler("kept").result().path
        expected = training.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    load = Load(server)
    load.start()
    try:
        for name in ("a", "b.tar", "c.tar.zst", "d", "e"):
            before = load.rounds
            assert backup(server.data, tmp_path / name).absent == ()
            while load.rounds < before + 2 and load.error is None:  # it trains on
                time.sleep(0.01)
            restore(tmp_path / name, tmp_path / f"{name}-data")
            assert check_whole(tmp_path / f"{name}-data") >= 2
    finally:
        load.ended.set()
        load.join()
    assert load.error is None
    assert not list(server.data.glob(".backup*"))
    server.stop()
    again = Server(tiny_model, tmp_path / "e-data").start()
    try:
        with again.sdk() as client:
            resumed = client.create_training_client_from_state_with_optimizer(state).result()
            assert resumed.forward(DATA, "cross_entropy").result().metrics["loss:sum"] == expected
            params = types.SamplingParams(max_tokens=2, seed=1)
            drawn = client.create_sampling_client(model_path=sampler).result()
            assert drawn.sample(types.ModelInput.from_ints([1, 2]), 1, params).result().sequences
        rest = tinker.RestClient(base_url=again.url, api_key=KEY)
        for item in rest.list_user_checkpoints(limit=1000).result().checkpoints:
            if item.checkpoint_type == "training":
                with again.sdk() as client:
                    client.create_training_client_from_state(item.tinker_path).result()
    finally:
        again.end()


def test_what_is_deleted_in_between_makes_the_copy_begin_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server saves a checkpoint behind the first look and deletes it before the second."""
    plain, seen = reading.copy, []

    def copy(source: Path, target: Path) -> None:
        with closing(sqlite3.connect(source)) as database:
            if not seen:
                names = [row[1] for row in database.execute("pragma table_info(checkpoints)")]
                new = {"id": "'new'", "name": "'new'", "folder": "'checkpoints/new'"}
                values = ", ".join(new.get(name, name) for name in names)
                database.execute(f"insert into checkpoints select {values} from checkpoints")
                database.commit()
            plain(source, target)
            database.execute("delete from checkpoints where id = 'new'")
            database.commit()
        seen.append(target)

    monkeypatch.setattr(reading, "copy", copy)
    assert backup(data, tmp_path / "copy").absent == ()
    assert len(seen) == 2
    restore(tmp_path / "copy", tmp_path / "again")
    check_whole(tmp_path / "again")


def test_what_the_data_folder_lacks_is_told_and_hinders_nothing(data: Path, tmp_path: Path) -> None:
    (folder,) = (data / "blobs" / "checkpoints").iterdir()
    shutil.rmtree(folder)
    made = backup(data, tmp_path / "copy")
    assert made.absent == (f"checkpoints/{folder.name}",)
    assert restore(tmp_path / "copy", tmp_path / "again").absent == made.absent


def test_an_upload_without_a_file_yet_lacks_nothing(data: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(data / reading.FILE)) as database:
        database.execute(
            "insert into uploads select 'u', org_id, project_id, user_id, key_id, 'm', '{}', 'uploads/u', 1,"
            " null from sessions"
        )
        database.commit()
    assert backup(data, tmp_path / "copy").absent == ()


@pytest.mark.parametrize("name", ["copy", "copy.tar"])
def test_an_interrupted_copy_leaves_nothing(
    data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    before = {file for file in contents(data) if not file.startswith("tinsmith.db-")}
    monkeypatch.setattr(module.json, "dumps", interrupted)  # when all but the manifest is written
    with pytest.raises(KeyboardInterrupt):
        backup(data, tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []
    assert {file for file in contents(data) if not file.startswith("tinsmith.db-")} == before


def test_what_a_killed_copy_left_goes_with_the_next(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tinsmith.service import backup as b\n"
        "b._copy_all = lambda *_: (print('there', flush=True), time.sleep(60))\n"
        "b.backup(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "copy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        assert list(data.glob(".backup.*.partial"))
        backup(data, tmp_path / "other")  # leaves those alone whose process lives
        assert list(data.glob(".backup.*.partial"))
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "copy").exists()
    backup(data, tmp_path / "copy")
    assert not list(data.glob(".backup.*"))
    assert not list(tmp_path.glob(".copy.*"))


class TestRefused:
    def test_places_that_are_taken_or_wrong(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        for out, says in (
            (tmp_path / "taken", "exists already"),
            (data / "copy", "lies in the data folder itself"),
            (tmp_path / "none" / "copy", "there is no folder"),
            (tmp_path / "copy.zip", "ends in .tar or .tar.zst"),
        ):
            with pytest.raises(BackupError, match=says):
                backup(data, out)
        with pytest.raises(BackupError, match="no data folder of a server"):
            backup(tmp_path / "taken", tmp_path / "copy")

    def test_a_data_folder_with_something_in_it(self, data: Path, tmp_path: Path) -> None:
        backup(data, tmp_path / "copy")
        with pytest.raises(BackupError, match="is not empty"):
            restore(tmp_path / "copy", data)
        with pytest.raises(BackupError, match="there is no"):
            restore(tmp_path / "none", tmp_path / "again")
        (tmp_path / "again").mkdir()
        restore(tmp_path / "copy", tmp_path / "again")  # an empty one will do

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda f: (f / "backup.json").unlink(), "has no backup.json"),
            (lambda f: (f / "backup.json").write_text("[]"), "has no backup.json"),
            (lambda f: (f / "tinsmith.db").unlink(), "tinsmith.db is missing"),
            (lambda f: (f / "more").write_text("x"), "more is too much"),
            (lambda f: next(f.rglob("adapter_config.json")).write_text("{}"), "is not what was copied"),
        ],
    )
    def test_a_damaged_folder(
        self, data: Path, tmp_path: Path, damage: Callable[[Path], object], says: str
    ) -> None:
        backup(data, tmp_path / "copy")
        damage(tmp_path / "copy")
        with pytest.raises(BackupError, match=says):
            restore(tmp_path / "copy", tmp_path / "again")
        assert not (tmp_path / "again").exists()
        assert not list(tmp_path.glob(".again*"))

    @pytest.mark.parametrize("name", ["copy.tar", "copy.tar.zst"])
    def test_a_file_that_was_cut_off_or_is_no_copy(self, data: Path, tmp_path: Path, name: str) -> None:
        backup(data, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for size in (0, 100, len(whole) // 2, len(whole) - (40 if name.endswith(".zst") else 11000)):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(BackupError, match=r"no copy of a data folder|not all of one"):
                restore(tmp_path / name, tmp_path / "again")
        (tmp_path / name).write_bytes(b"nonsense" * 1000)
        with pytest.raises(BackupError, match="no copy of a data folder"):
            restore(tmp_path / name, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    @pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
    def test_a_file_that_leads_elsewhere(self, tmp_path: Path, name: str) -> None:
        with tarfile.open(tmp_path / "evil.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        with pytest.raises(BackupError, match="leads out of the data folder"):
            restore(tmp_path / "evil.tar", tmp_path / "again")
        with tarfile.open(tmp_path / "link.tar", "w") as tar:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(BackupError, match="is no file"):
            restore(tmp_path / "link.tar", tmp_path / "again")

    def test_a_newer_versions_database(self, data: Path, tmp_path: Path) -> None:
        with closing(sqlite3.connect(data / reading.FILE)) as database:
            database.execute("update alembic_version set version_num = '9999'")
            database.commit()
        with pytest.raises(BackupError, match="another version of Tinsmith"):
            backup(data, tmp_path / "copy")


def test_the_commands(data: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tinsmith", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    made = run("backup", "--data", str(data), "--out", str(tmp_path / "copy.tar"))
    assert (made.returncode, made.stderr) == (0, "")
    taken = run("restore", str(tmp_path / "copy.tar"), "--data", str(tmp_path / "again"))
    assert (taken.returncode, taken.stderr) == (0, "")
    wrong = run("restore", str(tmp_path / "copy.tar"), "--data", str(data))
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (1, 1)
