"""Training and sampling on one device: no decode step waits for more than one piece of the other's work, and
neither starves. Time is what a clock of the test's own says."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from tests.engine.test_sampler import sample
from tests.engine.tiny import request, tokens
from tinsmith.engine import adapter_files, rounds, training
from tinsmith.engine import engine as module
from tinsmith.engine.commands import (
    AdamParams,
    Cancel,
    Command,
    CreateAdapter,
    Done,
    EngineConfig,
    Failed,
    ForwardBackward,
    LoadState,
    LoraSpec,
    ModelSource,
    OpenSampler,
    OptimStep,
    Piece,
    Publish,
    ReleaseRun,
    ReleaseSampler,
    Reply,
    SaveState,
    Share,
)
from tinsmith.engine.engine import Engine
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.rounds import PASS_ROWS, SHARED_PASS_ROWS, Rounds
from tinsmith.engine.runs import Run
from tinsmith.engine.turns import PIECE_SECONDS, RECENT

Folder = Callable[[str], Path]
ROW, DECODE, OPTIMIZE = 0.0002, 0.005, 0.01  # seconds of a trained row and of each step


class World:
    """An engine whose work takes a given time and is written down: what, and how many rows or seconds."""

    def __init__(self, folder: Path, tmp_path: Path, patch: pytest.MonkeyPatch, models: int = 1) -> None:
        self.time = 0.0
        self.costs: dict[str, float] = {}  # seconds of a run's commands, where not OPTIMIZE
        self.events: list[tuple[str, float]] = []
        sources = tuple(ModelSource("m" if not i else f"m{i}", str(folder)) for i in range(models))
        config = EngineConfig(sources, str(tmp_path), device="cpu", dtype="fp32", memory=1 << 30)
        self.engine = Engine(config, now=lambda: self.time)
        self.path = tmp_path
        patch.setattr(rounds, "run_pass", self._pass)
        real = module.execute

        def execute(residents: object, run: Run, command: Command) -> Done:
            self.spend(type(command).__name__, self.costs.get(run.name, OPTIMIZE))
            return real(residents, run, command)  # type: ignore[arg-type]

        patch.setattr(module, "execute", execute)
        for name, sampler in self.engine._samplers.items():
            patch.setattr(sampler, "step", self._decode(name, sampler.step))

    def _pass(
        self,
        work: Sequence[tuple[training.TrainingJob, training._Cut]],
        most: int,
        pause: Callable[[], None] | None,
    ) -> None:
        rows = sum(cut.rows for _, cut in work)
        self.time += rows * ROW
        self.events.append(("pass", rows))
        training.run_pass(work, most, pause)

    def _decode(self, name: str, real: Callable[[], bool]) -> Callable[[], bool]:
        def step() -> bool:
            self.spend(f"sample {name}", DECODE)
            return real()

        return step

    def spend(self, what: str, seconds: float) -> None:
        self.time += seconds
        self.events.append((what, seconds))

    def tell(self, *commands: Command) -> list[Reply]:
        replies: list[Reply] = []
        for command in commands:
            self.engine.submit(command, replies.append)  # type: ignore[arg-type]
        return replies

    def create(self, *runs: str) -> None:
        replies = self.tell(*(CreateAdapter(run, "m", LoraSpec(4, 1)) for run in runs))
        assert all(isinstance(r, Done) for r in replies), replies

    def flood(self, model: str = "m") -> list[Reply]:
        """Samples without end."""
        prompts = [sample(f"{model} {i}", tokens(20, i), max_tokens=400, stop=()) for i in range(4)]
        for prompt in prompts:
            object.__setattr__(prompt, "model", model)
        replies = self.tell(*prompts)
        self.engine.step()
        self.events.clear()
        return replies

    def turns(self) -> list[list[tuple[str, float]]]:
        """What training did between two sampling steps."""
        grouped = groupby(self.events, key=lambda e: e[0].startswith("sample"))
        return [list(group) for is_sampling, group in grouped if not is_sampling]

    def seconds(self, sampling: bool) -> float:
        of = {True: 0.0, False: 0.0}
        for what, amount in self.events:
            of[what.startswith("sample")] += amount * ROW if what == "pass" else amount
        return of[sampling]


@pytest.fixture
def world(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(folder("qwen3"), tmp_path, monkeypatch)


def backward(run: str, seq: int, lengths: Sequence[int]) -> ForwardBackward:
    return ForwardBackward(run, seq, request([tokens(n + 1, i) for i, n in enumerate(lengths)]))


def test_between_two_sampling_steps_there_is_one_short_pass(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BLOCK_TOKENS", 128)
    monkeypatch.setitem(SHARED_PASS_ROWS, "cpu", 128)
    world.create("long", "short", "mixed")
    samples = world.flood()
    trained = world.tell(
        backward("long", 1, [400, 200]),
        *(backward("short", i, [16] * 5) for i in range(4)),
        backward("mixed", 1, [30, 128, 10]),
    )
    while len(trained) < 6:
        world.engine.step()
    assert all(isinstance(r, Done) for r in trained), trained
    assert not samples
    turns = world.turns()
    assert all(len(turn) == 1 for turn in turns)
    assert [rows for ((_, rows),) in turns if rows > 128] == [400, 208], "one sequence may be longer"


def test_a_flood_of_samples_leaves_training_half_of_the_time(world: World) -> None:
    world.create("r")
    samples = world.flood()
    trained = world.tell(backward("r", 1, [256] * 8), OptimStep("r", 2, AdamParams()))
    while len(trained) < 2:
        world.engine.step()
    assert not samples
    assert world.seconds(sampling=False) >= world.seconds(sampling=True) - 5 * DECODE


def test_a_flood_of_training_leaves_samples_half_of_the_time(world: World) -> None:
    runs = [f"r{i}" for i in range(6)]
    world.create(*runs)
    world.flood()
    for seq in range(1, 7, 2):
        world.tell(*(c for r in runs for c in (backward(r, seq, [60]), OptimStep(r, seq + 1, AdamParams()))))
    while world.engine.runs["r5"].waiting:
        world.engine.step()
    assert world.seconds(sampling=True) >= world.seconds(sampling=False)


def test_optimizer_steps_of_many_runs_are_made_in_pieces(world: World) -> None:
    runs = [f"r{i}" for i in range(12)]
    world.create(*runs)
    world.flood()
    replies = world.tell(*(OptimStep(run, 1, AdamParams()) for run in runs))
    while len(replies) < len(runs):
        world.engine.step()
    pieces = [sum(seconds for _, seconds in turn) for turn in world.turns()]
    assert max(pieces) <= PIECE_SECONDS + OPTIMIZE
    assert len(pieces) <= 12 * OPTIMIZE / PIECE_SECONDS + 1, "and not one after the other"


def test_a_run_whose_commands_take_long_stops_neither_others_nor_samples(world: World) -> None:
    world.create("slow", "other")
    world.costs["slow"] = 0.3
    world.flood()
    slow = world.tell(*(OptimStep("slow", i, AdamParams()) for i in range(10)))
    trained = world.tell(backward("other", 1, [300, 300]), OptimStep("other", 2, AdamParams()))
    while len(trained) < 2:
        world.engine.step()
    assert len(slow) <= 5, "one at most before each of the three, and one before and behind them"
    for turn in world.turns():
        assert len([1 for _, cost in turn if cost >= 0.3]) <= 1, "a decode step waits for one of them"


@pytest.mark.parametrize("what", ["save", "publish", "load"])
def test_files_are_written_and_read_beside_the_work_of_others(
    world: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    world.create("r", "other")
    path = str(world.path / "state")
    command: Command = SaveState("r", 1, path)
    if what == "load":
        _done(world, command)
        command = LoadState("r", 2, path, optimizer=True)
    elif what == "publish":
        command = Publish("r", 1, "w", path)
    slow, called = threading.Event(), threading.Event()
    name = "read" if what == "load" else "write"
    real = getattr(adapter_files, name)

    def waiting(*args: object, **kwargs: object) -> object:
        called.set()
        assert slow.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(adapter_files, name, waiting)
    samples = world.flood()
    own = world.tell(command, backward("r", 3, [20]))
    others = world.tell(backward("other", 1, [20]), OptimStep("other", 2, AdamParams()))
    while len(others) < 2 or len(samples) < 4:
        world.engine.step()
    assert called.is_set()
    assert not own, "the run itself stands still"
    assert world.engine.step()
    slow.set()
    while len(own) < 2:
        world.engine.step()
    assert all(isinstance(reply, Done) for reply in own), own


class TestASamplersWeights:
    """They are read from a checkpoint's folder when the first sample asks for them."""

    @pytest.fixture
    def gate(self, world: World, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """What reading waits for."""
        gate, real = threading.Event(), adapter_files.read

        def waiting(*args: object, **kwargs: object) -> object:
            assert gate.wait(30)
            return real(*args, **kwargs)  # type: ignore[arg-type]

        world.create("r")
        path = str(world.path / "published")
        _done(world, Publish("r", 1, "own", path))
        _done(world, OpenSampler("s", "m", path), ReleaseSampler("own"))
        _done(world, *(c for i in (2, 4) for c in (backward("r", i, [20]), OptimStep("r", i, AdamParams(1)))))
        monkeypatch.setattr(adapter_files, "read", waiting)
        return gate

    def of(self, name: str) -> Command:
        return replace(sample(name, tokens(20, 1), max_tokens=4, stop=()), sampler="s")

    def test_are_read_beside_the_work_of_others(self, world: World, gate: threading.Event) -> None:
        waiting = world.tell(self.of("a"), self.of("b"))
        (base,) = _done(world, sample("c", tokens(20, 1), max_tokens=4, stop=()))
        _done(world, backward("r", 6, [30]))
        assert not waiting
        gate.set()
        while len(waiting) < 2:
            world.engine.step()
        assert isinstance(waiting[0], Done)
        assert isinstance(waiting[1], Done)
        assert waiting[0].payload == waiting[1].payload == base.payload, "B was zero when it was saved"

    def test_a_sample_that_waits_for_them_can_be_cancelled(self, world: World, gate: threading.Event) -> None:
        waiting = world.tell(self.of("a"), self.of("b"), Cancel("a"))
        assert [getattr(reply, "message", "") for reply in waiting] == ["cancelled", ""]
        gate.set()
        while len(waiting) < 3:
            world.engine.step()
        assert isinstance(waiting[2], Done)

    def test_that_are_released_meanwhile_are_named(self, world: World, gate: threading.Event) -> None:
        waiting = world.tell(self.of("a"))
        world.tell(ReleaseSampler("s"))
        gate.set()
        while not waiting:
            world.engine.step()
        assert isinstance(waiting[0], Failed)
        assert "sampler s is not on this engine" in waiting[0].message
        assert not world.engine.step(), "nothing is left of it"

    def test_that_cannot_be_read_fail_those_who_wait(self, world: World, gate: threading.Event) -> None:
        waiting = world.tell(self.of("a"), self.of("b"))
        shutil.rmtree(world.path / "published")
        gate.set()
        while len(waiting) < 2:
            world.engine.step()
        for reply in waiting:
            assert isinstance(reply, Failed)
            assert "cannot be read" in reply.message


def test_small_commands_of_several_runs_are_one_piece(world: World) -> None:
    runs = [f"r{i}" for i in range(4)]
    world.create(*runs)
    world.flood()
    replies = world.tell(*(Publish(run, 1, f"w{run}") for run in runs))
    world.engine.step()
    assert len(replies) == 4


def test_each_model_samples_in_turn_beside_training(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(folder("qwen3"), tmp_path, monkeypatch, models=2)
    world.create("r")
    world.flood("m")
    world.flood("m1")
    trained = world.tell(backward("r", 1, [256] * 4))
    while not trained:
        world.engine.step()
    counts = [sum(what == f"sample {name}" for what, _ in world.events) for name in ("m", "m1")]
    assert counts[0] == counts[1] > 5


def test_passes_stay_short_for_a_moment_after_the_last_sample(world: World) -> None:
    world.create("r")
    replies = world.tell(sample("s", tokens(20, 1), max_tokens=2, stop=()))
    while not replies:
        world.engine.step()
    world.events.clear()
    world.tell(*(backward("r", i, [256] * 4) for i in (1, 2)))
    world.engine.step()
    assert world.events == [("pass", SHARED_PASS_ROWS["cpu"])]
    world.time += RECENT
    world.engine.step()
    assert world.events[1] == ("pass", 2048 - 512)


def test_a_pass_stands_still_for_samples_of_a_key_that_lacks_time(world: World) -> None:
    """They come in the middle of another key's pass, which has the result that it has without them."""
    world.create("disturbed", "alone")
    samples: list[Reply] = []

    def intake(seconds: float) -> bool:
        if world.engine.shares.several:
            return False
        prompt = replace(sample("s", tokens(20, 1), max_tokens=400, stop=()), share=Share("steady"))
        world.engine.submit(prompt, samples.append)  # type: ignore[arg-type]
        return True

    def train(run: str) -> Reply:
        """The reply; `steps` are then the sampling steps that were made before it came."""
        replies: list[Reply] = []

        def answer(reply: Reply | Piece) -> None:
            assert not isinstance(reply, Piece)
            replies.append(reply)
            steps.append(sum(what.startswith("sample") for what, _ in world.events))

        command = replace(backward(run, 1, [400, 300, 200]), share=Share("flood"))
        world.engine.submit(command, answer)
        while not replies:
            world.engine.step()
        return replies[0]

    steps: list[int] = []
    alone = train("alone")
    world.engine.intake = intake
    disturbed = train("disturbed")
    assert steps[0] == 0
    assert steps[1] >= 5
    assert not samples, "the key has its half, and not all that it wants"
    assert isinstance(alone, Done)
    assert isinstance(disturbed, Done)
    assert alone.payload == disturbed.payload


def test_company_of_the_other_kind_changes_no_bit(world: World) -> None:
    body = [backward("r", 1, [100, 30]), OptimStep("r", 2, AdamParams(1e-2)), backward("r", 3, [80])]
    prompt = sample("s", tokens(40, 1), max_tokens=20, stop=())
    world.create("r")
    (alone,) = _done(world, prompt)
    apart = _done(world, *body)
    world.tell(ReleaseRun("r"))
    world.engine.step()
    world.create("r")
    together = _done(world, body[0], prompt, *body[1:])
    assert [r.payload for r in together if r.usage.get("train")] == [
        r.payload for r in apart if r.usage.get("train")
    ]
    assert alone.payload in [r.payload for r in together]


def _done(world: World, *commands: Command) -> list[Done]:
    replies = world.tell(*commands)
    while len(replies) < len(commands):
        world.engine.step()
    assert all(isinstance(r, Done) for r in replies), replies
    return replies  # type: ignore[return-value]


def test_what_waits_behind_a_release_is_answered(world: World) -> None:
    world.create("r")
    replies = world.tell(ReleaseRun("r"), OptimStep("r", 2, AdamParams()), backward("r", 3, [20]))
    while world.engine.step():
        pass
    assert isinstance(replies[0], Done)
    assert [r.message for r in replies[1:] if isinstance(r, Failed)] == ["run r is not on this engine"] * 2


def test_a_gpu_cuts_passes_by_what_it_has_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.create(*(f"r{i}" for i in range(8)))
    engine = world.engine
    own = Rounds(engine.residents, engine.shares, Metrics(), "cuda", lambda: world.time)
    monkeypatch.setitem(PASS_ROWS, "cuda", 4096)
    for i in range(8):
        job = backward(f"r{i}", 1, [256] * 2)
        own.start(engine.runs[f"r{i}"], job, lambda reply: None)
    own.run(True)
    own.run(True)
    assert [rows for _, rows in world.events] == [2048, 512]  # 5,000 rows a second are 250 in 50 ms
