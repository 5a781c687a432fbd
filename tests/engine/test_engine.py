"""The engine as a state machine: commands in, replies out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.tiny import logprobs, request, tokens
from tinsmith.engine import training
from tinsmith.engine.commands import (
    AdamParams,
    Command,
    CreateAdapter,
    Done,
    EngineConfig,
    Failed,
    ForwardBackward,
    GetStatus,
    LoadState,
    LoraSpec,
    ModelSource,
    OpenSampler,
    OptimStep,
    Publish,
    ReleaseRun,
    ReleaseSampler,
    Reply,
    SaveState,
)
from tinsmith.engine.engine import Engine
from tinsmith.engine.memory import Budget
from tinsmith.engine.model.base import ModelError
from tinsmith.engine.optimizers.clipping import gradient_norm

Folder = Callable[[str], Path]
MODEL = "tests/tiny"
SPEC = LoraSpec(rank=8, seed=3)


@pytest.fixture
def engine(folder: Folder, tmp_path: Path) -> Engine:
    return make_engine(folder("qwen3"), tmp_path)


def make_engine(model: Path, tmp_path: Path, **settings: object) -> Engine:
    return Engine(
        EngineConfig(
            (ModelSource(MODEL, str(model)),),
            str(tmp_path / "spill"),
            "cpu",
            "fp32",
            **settings,  # type: ignore[arg-type]
        )
    )


def tell(engine: Engine, *commands: Command) -> list[Reply]:
    """Submit all, run until all are answered; the replies in the order of the commands."""
    replies: dict[int, Reply] = {}
    for i, command in enumerate(commands):
        engine.submit(command, lambda reply, i=i: replies.setdefault(i, reply))  # type: ignore[misc]
    for _ in range(1000):
        if len(replies) == len(commands):
            break
        engine.step()
    return [replies[i] for i in range(len(commands))]


def ok(engine: Engine, *commands: Command) -> list[Done]:
    replies = tell(engine, *commands)
    assert all(isinstance(r, Done) for r in replies), replies
    return replies  # type: ignore[return-value]


def step_of(run: str, seq: int, seed: int | None = None) -> list[Command]:
    """A forward_backward and an optimizer step."""
    body = request([tokens(30, (seed if seed is not None else seq) * 7 + i) for i in range(3)])
    return [ForwardBackward(run, seq, body), OptimStep(run, seq + 1, AdamParams(1e-2))]


def probe(engine: Engine, run: str) -> bytes:
    """The run's logprobs on a fixed text: two runs that agree here have the same weights."""
    (reply,) = ok(engine, ForwardBackward(run, 99, request([tokens(40, 5)], forward_only=True)))
    return logprobs(reply.payload)[0].tobytes()  # type: ignore[arg-type]


class TestRuns:
    def test_training_changes_the_weights_and_counts_tokens(self, engine: Engine) -> None:
        ok(engine, CreateAdapter("r", MODEL, SPEC))
        before = probe(engine, "r")
        first, second = ok(engine, *step_of("r", 1))
        assert first.usage == {"train": 87}
        assert second.payload["metrics"]["unclipped_grad_l2:mean"] > 0  # type: ignore[index]
        assert probe(engine, "r") != before

    def test_the_norm_that_is_known_is_that_of_all_that_is_accumulated(self, engine: Engine) -> None:
        """With gradients of one request, and with a second one's added to them."""
        ok(engine, CreateAdapter("r", MODEL, SPEC))
        for count in (1, 2):
            ok(engine, *(step_of("r", i)[0] for i in range(count)))
            expected = gradient_norm(engine.runs["r"].live.gradient)  # type: ignore[arg-type]
            (reply,) = ok(engine, OptimStep("r", 9, AdamParams()))
            assert reply.payload == {"metrics": {"unclipped_grad_l2:mean": expected}}

    def test_an_optimizer_step_with_nothing_accumulated_changes_nothing(self, engine: Engine) -> None:
        ok(engine, CreateAdapter("r", MODEL, SPEC), *step_of("r", 1))
        before, steps = probe(engine, "r"), engine.runs["r"].live.step
        ok(engine, OptimStep("r", 3, AdamParams(weight_decay=0.5)))
        assert probe(engine, "r") == before
        assert engine.runs["r"].live.step == steps

    def test_a_step_beyond_fp32_is_refused_and_changes_nothing(self, engine: Engine) -> None:
        body = request([tokens(30, 1)])
        ok(engine, CreateAdapter("r", MODEL, SPEC), *step_of("r", 1), ForwardBackward("r", 3, body))
        before = [x.clone() for x in (engine.runs["r"].live.params, engine.runs["r"].live.first)]
        for params in (AdamParams(learning_rate=1e300), AdamParams(learning_rate=1e30, weight_decay=1e30)):
            (refused,) = tell(engine, OptimStep("r", 4, params))
            assert isinstance(refused, Failed)
            assert "learning_rate" in refused.message
        state = engine.runs["r"].live
        assert torch.equal(before[0], state.params)
        assert torch.equal(before[1], state.first)
        assert ok(engine, OptimStep("r", 5, AdamParams()))[0].payload["metrics"]  # type: ignore[index]

    def test_pipelined_commands_run_in_order(self, engine: Engine) -> None:
        ok(engine, CreateAdapter("a", MODEL, SPEC), CreateAdapter("b", MODEL, SPEC))
        ok(engine, *step_of("a", 1), *step_of("a", 3), *step_of("a", 5))
        for seq in (1, 3, 5):
            for command in step_of("b", seq):
                ok(engine, command)
        assert probe(engine, "a") == probe(engine, "b")

    def test_the_same_seed_and_data_end_in_the_same_weights_beside_others(self, engine: Engine) -> None:
        ok(engine, CreateAdapter("alone", MODEL, SPEC))
        for seq in (1, 3, 5):
            ok(engine, *step_of("alone", seq))
        others = [CreateAdapter(f"o{i}", MODEL, LoraSpec(rank=4 * i, seed=i)) for i in range(1, 5)]
        ok(engine, CreateAdapter("beside", MODEL, SPEC), *others)
        for seq in (1, 3, 5):
            company = [c for i in range(1, 5) for c in step_of(f"o{i}", seq, seed=i * 10 + seq)]
            ok(engine, *company[:4], *step_of("beside", seq), *company[4:])
        assert torch.equal(engine.runs["alone"].live.params, engine.runs["beside"].live.params)

    def test_a_refused_request_leaves_the_state_as_it_was(self, engine: Engine) -> None:
        ok(engine, CreateAdapter("r", MODEL, SPEC), CreateAdapter("s", MODEL, SPEC))
        good, optim = step_of("r", 1)
        bad = ForwardBackward("r", 2, request([[1, 2, 3]], "no_such_loss"))
        replies = tell(engine, good, bad, optim)
        assert [type(r) for r in replies] == [Done, Failed, Done]
        ok(engine, *step_of("s", 1))
        assert probe(engine, "r") == probe(engine, "s")

    def test_a_pass_that_breaks_fails_only_whose_fault_it_is(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ok(
            engine,
            CreateAdapter("good", MODEL, SPEC),
            CreateAdapter("bad", MODEL, SPEC),
            CreateAdapter("ref", MODEL, SPEC),
        )
        real = training.run_pass

        def breaking(work: list, *rest: int) -> None:
            real(work, *rest)  # gradients are already written when the failure comes
            if any(job.sequences[0].tokens[0] == 77 for job, _ in work):
                raise MemoryError("no room")

        monkeypatch.setattr("tinsmith.engine.rounds.run_pass", breaking)
        poison = ForwardBackward("bad", 1, request([[77, 2, 3]]))
        replies = tell(engine, poison, *step_of("good", 1))
        assert isinstance(replies[0], Failed)
        assert "no room" in replies[0].message
        assert replies[0].category == "server"
        ok(engine, *step_of("ref", 1))
        assert torch.equal(engine.runs["good"].live.params, engine.runs["ref"].live.params)
        assert engine.runs["bad"].live.gradient is None

    def test_unknown_runs_models_and_bad_settings_are_refused_by_name(self, engine: Engine) -> None:
        replies = tell(
            engine,
            OptimStep("nobody", 1, AdamParams()),
            CreateAdapter("r", "no/model", SPEC),
            CreateAdapter("r", MODEL, LoraSpec(rank=0, seed=1)),
            CreateAdapter("r", MODEL, LoraSpec(rank=100_000, seed=1)),
            CreateAdapter("r", MODEL, LoraSpec(8, 1, train_attn=False, train_mlp=False, train_unembed=False)),
        )
        expected = (
            "run nobody",
            "served are: tests/tiny",
            "rank is 0",
            "from 1 to 128",
            "at least one of train_attn",
        )
        for reply, words in zip(replies, expected, strict=True):
            assert isinstance(reply, Failed)
            assert words in reply.message


class TestCheckpoints:
    def test_a_saved_state_goes_on_bitwise(self, engine: Engine, tmp_path: Path) -> None:
        path = str(tmp_path / "state")
        ok(engine, CreateAdapter("a", MODEL, SPEC), *step_of("a", 1), SaveState("a", 3, path))
        ok(engine, CreateAdapter("b", MODEL, SPEC), LoadState("b", 0, path, optimizer=True))
        for run in ("a", "b"):
            ok(engine, *step_of(run, 5), *step_of(run, 7))
        assert torch.equal(engine.runs["a"].live.params, engine.runs["b"].live.params)

    def test_without_the_optimizer_it_starts_anew(self, engine: Engine, tmp_path: Path) -> None:
        path = str(tmp_path / "state")
        ok(engine, CreateAdapter("a", MODEL, SPEC), *step_of("a", 1), SaveState("a", 3, path))
        ok(engine, CreateAdapter("b", MODEL, SPEC), LoadState("b", 0, path, optimizer=False))
        assert engine.runs["b"].live.step == 0
        assert probe(engine, "a") == probe(engine, "b")

    def test_another_shape_is_refused_and_changes_nothing(self, engine: Engine, tmp_path: Path) -> None:
        path = str(tmp_path / "state")
        ok(engine, CreateAdapter("a", MODEL, SPEC), SaveState("a", 1, path))
        ok(engine, CreateAdapter("b", MODEL, LoraSpec(rank=4, seed=1)), *step_of("b", 1))
        before = probe(engine, "b")
        (reply,) = tell(engine, LoadState("b", 3, path, optimizer=True))
        assert isinstance(reply, Failed)
        assert "rank 8, this run has 4" in reply.message
        assert probe(engine, "b") == before

    def test_a_write_that_fails_leaves_nothing_behind(self, engine: Engine, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        ok(engine, CreateAdapter("a", MODEL, SPEC))
        (reply,) = tell(engine, SaveState("a", 1, str(tmp_path / "file" / "state")))
        assert isinstance(reply, Failed)
        assert "could not be written" in reply.message
        assert reply.category == "server"
        ok(engine, SaveState("a", 2, str(tmp_path / "state")))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "state"]

    def test_an_existing_folder_is_never_overwritten(self, engine: Engine, tmp_path: Path) -> None:
        path = str(tmp_path / "state")
        ok(engine, CreateAdapter("a", MODEL, SPEC), SaveState("a", 1, path))
        (reply,) = tell(engine, SaveState("a", 2, path))
        assert isinstance(reply, Failed)
        assert "exists already" in reply.message

    def test_a_checkpoint_of_another_base_is_refused(
        self, engine: Engine, folder: Folder, tmp_path: Path
    ) -> None:
        path = str(tmp_path / "state")
        ok(engine, CreateAdapter("a", MODEL, SPEC), SaveState("a", 1, path))
        other = make_engine(folder("llama"), tmp_path)
        (reply,) = tell(other, OpenSampler("s", MODEL, path))
        assert isinstance(reply, Failed)
        assert "another base model" in reply.message


class TestMemory:
    def test_idle_runs_leave_memory_and_come_back_bitwise(self, engine: Engine) -> None:
        names = [f"r{i}" for i in range(4)]
        for name in (*names, "ref"):
            ok(engine, CreateAdapter(name, MODEL, SPEC))
        ok(engine, *step_of("ref", 1), *step_of("ref", 3))
        accumulate, optimize = step_of("x", 3)
        size = engine.runs["ref"].nbytes
        engine.residents.budget = Budget(
            adapters=2 * size, cache=engine.budget.cache, passes=engine.budget.passes
        )
        for name in names:
            ok(engine, *step_of(name, 1))
            ok(engine, ForwardBackward(name, 3, accumulate.body))  # type: ignore[union-attr]
        status = ok(engine, GetStatus())[0].payload
        assert status["runs_resident"] < 5  # type: ignore[index, operator]
        for name in names:  # the accumulated gradients came along
            ok(engine, OptimStep(name, 4, optimize.params))  # type: ignore[union-attr]
            assert torch.equal(engine.runs[name].live.params, engine_params(engine, "ref"))
        ok(engine, *[ReleaseRun(n) for n in (*names, "ref")])
        assert not list((Path(engine.config.spill_dir)).glob("run-*"))

    def test_samplers_live_under_a_bound_and_weights_are_shared(self, engine: Engine, tmp_path: Path) -> None:
        path = str(tmp_path / "named")
        ok(engine, CreateAdapter("r", MODEL, SPEC), Publish("r", 1, "named", path), Publish("r", 2, "twin"))
        assert engine.snapshots.weights("named", 1)[1] is engine.snapshots.weights("twin", 1)[1]
        bits = engine.snapshots.weights("named", 1)[1].tensors()
        ok(engine, OpenSampler("again", MODEL, path))
        assert engine.snapshots.weights("again", 1)[1] is engine.snapshots.weights("named", 1)[1]
        ok(engine, *step_of("r", 3))
        engine.residents.budget = Budget(adapters=1, cache=engine.budget.cache, passes=engine.budget.passes)
        ok(engine, Publish("r", 5, "newest"))
        assert engine.snapshots.entries["named"].weights is None
        assert engine.snapshots.entries["twin"].weights is None
        for name in ("named", "twin"):
            back = engine.snapshots.weights(name, 9)[1].tensors()
            assert all(torch.equal(bits[k], back[k]) for k in bits)
        ok(engine, *[ReleaseSampler(n) for n in ("named", "twin", "again", "newest")])
        assert not list((tmp_path / "spill").glob("sampler-*"))

    def test_a_sequence_that_cannot_fit_fails_with_the_numbers(self, engine: Engine) -> None:
        ok(engine, CreateAdapter("r", MODEL, SPEC))
        engine.residents.budget = Budget(engine.budget.adapters, engine.budget.cache, passes=100_000)
        (reply,) = tell(engine, step_of("r", 1)[0])
        assert isinstance(reply, Failed)
        assert "data[0] has 29 tokens" in reply.message
        assert "100000" in reply.message


class TestStart:
    def test_what_an_engine_that_died_had_put_away_is_cleared(self, folder: Folder, tmp_path: Path) -> None:
        spill = tmp_path / "spill"
        (spill / "run-1").mkdir(parents=True)
        (spill / "sampler-2.safetensors").write_text("")
        (spill / "another's").write_text("")
        make_engine(folder("qwen3"), tmp_path)
        assert [p.name for p in spill.iterdir()] == ["another's"]

    def test_this_machine_is_exact_where_it_has_avx512(self, engine: Engine) -> None:
        if "avx512f" in Path("/proc/cpuinfo").read_text():
            assert engine.info().exact, engine.status()["inexact"]

    @pytest.mark.parametrize("what", ["missing", "empty"])
    def test_a_folder_that_is_no_model_is_named(self, tmp_path: Path, what: str) -> None:
        path = tmp_path / what
        if what == "empty":
            path.mkdir()
        with pytest.raises(ModelError, match=str(path)):
            make_engine(path, tmp_path)

    def test_a_model_says_what_it_has_no_room_for(self, engine: Engine) -> None:
        (info,) = engine.info().models.values()
        assert (info.not_trainable, info.not_sampleable, info.way) == ("", "", "packed")
        engine.residents.budget = Budget(adapters=1000, cache=1000, passes=1000)
        (info,) = engine.info().models.values()
        assert "rank 1" in info.not_trainable
        assert "the smallest cache" in info.not_sampleable

    def test_too_little_memory_is_said_at_start(self, folder: Folder, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"need \d+ bytes in float32, and 0 are left"):
            make_engine(folder("qwen3"), tmp_path, memory=1000)


def engine_params(engine: Engine, run: str) -> torch.Tensor:
    """The parameters of a run, wherever they are."""
    target = engine.runs[run]
    engine.residents.bring_back(target)
    return target.live.params


def test_a_hub_id_loads_from_the_hubs_cache_and_is_the_same_base(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(folder("qwen3"), snapshot)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    code = """
import sys, torch
from tinsmith.engine.model.base import BaseModel
cpu = torch.device("cpu")
print(*[BaseModel("org/tiny", p, cpu, d).fingerprint
        for p, d in (("org/tiny", torch.float32), (sys.argv[1], torch.bfloat16))])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder("qwen3"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from_hub, from_folder = done.stdout.split()
    assert from_hub == from_folder
