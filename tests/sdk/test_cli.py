"""The SDK's own program, `tinker`, against a real server, in both output formats."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import tinker

from tests.harness import KEY, MODEL, Server, exit_code
from tests.sdk.program import run_tinker


@dataclass(frozen=True)
class Told:
    """What a command printed as a table and as JSON; errors were none."""

    table: str
    json: Any


@dataclass
class Program:
    """`tinker`, of which two run at a time."""

    server: Server
    pool: ThreadPoolExecutor
    key: str = KEY

    @property
    def rest(self) -> tinker.RestClient:
        return tinker.RestClient(base_url=self.server.url, api_key=KEY)

    def checkpoint(self, path: str) -> tinker.types.Checkpoint:
        """As the SDK sees it."""
        listed = self.rest.list_checkpoints(path.split("/")[2]).result().checkpoints
        return next(each for each in listed if each.tinker_path == path)

    def start(self, *words: str, key: str | None = None) -> Future[subprocess.CompletedProcess[str]]:
        environment = {
            **os.environ,
            "TINKER_BASE_URL": self.server.url,
            "TINKER_API_KEY": key or self.key,
            "COLUMNS": "250",
            "HF_HUB_OFFLINE": "1",
        }
        return self.pool.submit(run_tinker, words, environment)

    def ok(self, *words: str) -> str:
        return _out(self.start(*words).result())

    def both(self, *words: str) -> Told:
        table, as_json = self.start(*words), self.start("--format", "json", *words)
        return Told(_out(table.result()), json.loads(_out(as_json.result())))

    def fails(self, *words: str, key: str | None = None) -> str:
        done = self.start(*words, key=key).result()
        assert (exit_code(done), done.stdout) == (1, "")
        assert "Traceback" not in done.stderr
        return done.stderr


def _out(done: subprocess.CompletedProcess[str]) -> str:
    assert exit_code(done) == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def program(server: Server) -> Iterator[Program]:
    with ThreadPoolExecutor(2) as pool:
        yield Program(server, pool)


@pytest.fixture(scope="module")
def run(server: Server) -> str:
    """A run with a checkpoint of each kind."""
    with server.sdk() as client:
        training = client.create_lora_training_client(
            MODEL, rank=4, seed=1, user_metadata={"purpose": "the cli"}
        ).result()
        training.save_state("first", user_metadata={"step": "1"}).result()
        training.save_state("second", ttl_seconds=7200).result()
        training.save_weights_for_sampler("first").result()
        return str(training.model_id)


def test_version_and_models(program: Program) -> None:
    version, models = program.start("version"), program.both("model", "list", "TINY")
    assert _out(version.result()) == f"tinker {tinker.__version__}\n"
    assert MODEL in models.table
    assert models.json["models"] == [
        {"model_name": MODEL, "max_context_length": 512, "trainable": True, "sampleable": True}
    ]


def test_runs_are_listed(program: Program, run: str) -> None:
    columns = "id,model,owner,lora,updated,status,checkpoint,checkpoint_time"
    told = program.both("run", "list", "--limit", "0", "--columns", columns)
    (line,) = [line for line in told.table.splitlines() if run in line]
    for part in (MODEL, "Rank 4", "just now", "OK", "weights/second"):
        assert part in line
    (listed,) = [each for each in told.json["runs"] if each["training_run_id"] == run]
    assert (listed["base_model"], listed["lora_rank"], listed["corrupted"]) == (MODEL, 4, False)


def test_a_run_is_shown(program: Program, run: str) -> None:
    told = program.both("run", "info", run)
    for part in (run, MODEL, "Yes (Rank 4)", "weights/second", "sampler_weights/first", "the cli"):
        assert part in told.table
    assert told.json["last_checkpoint"]["tinker_path"] == f"tinker://{run}/weights/second"
    assert told.json["user_metadata"] == {"purpose": "the cli"}


def test_checkpoints_are_listed(program: Program, run: str) -> None:
    of_run, newest = program.both("checkpoint", "list", "--run-id", run), program.both(
        "checkpoint", "list", "--limit", "1"
    )  # fmt: skip
    assert "3 checkpoints for run" in of_run.table
    assert {each["checkpoint_id"] for each in of_run.json["checkpoints"]} == {
        "weights/first",
        "weights/second",
        "sampler_weights/first",
    }
    assert "more not shown" in newest.table
    assert len(newest.json["checkpoints"]) == 1


def test_a_checkpoint_is_shown(program: Program, run: str) -> None:
    told = program.both("checkpoint", "info", f"tinker://{run}/weights/second")
    for part in ("weights/second", "training", "KB", "in 1 hour", "Yes (Rank 4)"):
        assert part in told.table
    assert (told.json["public"], told.json["lora_rank"]) == (False, 4)


def test_a_checkpoint_is_published_and_taken_back(program: Program, run: str) -> None:
    path = f"tinker://{run}/weights/first"
    assert program.ok("checkpoint", "publish", path) == ""
    assert json.loads(program.ok("-f", "json", "checkpoint", "info", path))["public"] is True
    assert program.ok("checkpoint", "unpublish", path) == ""
    assert not program.checkpoint(path).public


def test_a_lifetime_is_set_and_removed(program: Program, run: str) -> None:
    path = f"tinker://{run}/sampler_weights/first"
    program.ok("checkpoint", "set-ttl", path, "--ttl", "86400")
    assert program.checkpoint(path).expires_at is not None
    program.ok("checkpoint", "set-ttl", path, "--remove")
    assert program.checkpoint(path).expires_at is None
    assert "ttl_seconds" in program.fails("checkpoint", "set-ttl", path, "--ttl", "5")


def test_checkpoints_are_deleted(program: Program, server: Server) -> None:
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=2).result()
        paths = [training.save_state(name).result().path for name in ("a", "b")]
        training.save_weights_for_sampler("c").result()
        run = training.model_id
    assert "Deleted 1 checkpoint(s)" in program.ok("checkpoint", "delete", "--yes", paths[0])
    by_type = ("checkpoint", "delete", "-y", "--run-id", run, "--type", "weights", "--after", "2020-01-01")
    assert json.loads(program.ok("-f", "json", *by_type)) == {"deleted_count": 1, "failed": []}
    (left,) = program.rest.list_checkpoints(run).result().checkpoints
    assert left.checkpoint_id == "sampler_weights/c"
    again = json.loads(program.ok("-f", "json", "checkpoint", "delete", "-y", paths[0]))
    assert [again["deleted_count"], again["failed"][0]["tinker_path"]] == [0, paths[0]]


def test_errors_say_what_is_wrong(program: Program, run: str) -> None:
    started = [
        ("no training run 'none'", ("run", "info", "none")),
        ("there is no checkpoint", ("checkpoint", "publish", f"tinker://{run}/weights/none")),
    ]
    for says, words in started:
        assert says in program.fails(*words)
    assert "this API key is not valid here" in program.fails("run", "list", key="tml-wrong")
