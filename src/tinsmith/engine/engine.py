"""The engine: a state machine over commands, driven by `submit` and `step`.

Each step is one clock cycle: due commands of every run, one training pass over blocks of whatever
runs have work, and sampling steps for about as long as those took; while samples run, training's turns
are short. Nothing here waits or blocks but the work itself; a process (process.py) or a test drives it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tinsmith.engine.aside import has_loss, keep_loss
from tinsmith.engine.commands import (
    Cancel,
    Command,
    CreateAdapter,
    CreateLoss,
    Done,
    EngineConfig,
    EngineInfo,
    Failed,
    ForwardBackward,
    GetStatus,
    ImportAdapter,
    LoraSpec,
    ModelInfo,
    OpenSampler,
    OptimStep,
    Piece,
    PutSampler,
    ReleaseRun,
    ReleaseSampler,
    Reply,
    Sample,
    Share,
)
from tinsmith.engine.device import make_deterministic, pick_device, pick_dtype
from tinsmith.engine.disk import Disk
from tinsmith.engine.exactness import settle
from tinsmith.engine.exactness_gpu import failures_on_gpu
from tinsmith.engine.failures import failed
from tinsmith.engine.imports import import_adapter
from tinsmith.engine.losses.custom import read_program
from tinsmith.engine.memory import LEAST, Budget, available_memory, give_back
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.model.attention import PADDING
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.checks import check
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.model.vision import CACHE_BYTES
from tinsmith.engine.residents import Residents
from tinsmith.engine.rounds import Rounds
from tinsmith.engine.run_commands import Files, execute
from tinsmith.engine.runs import Answer, Run
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.shares import Shares
from tinsmith.engine.snapshots import Read
from tinsmith.engine.text_folder import text_folder
from tinsmith.engine.training import peak_bytes
from tinsmith.engine.turns import Intake, Turns
from tinsmith.wire.training import ContentError

log = logging.getLogger(__name__)

JOBS_AHEAD = 16  # forward_backwards of one run that are decoded at a time


class Engine:
    """Base models on one device, with all their runs and samplers."""

    def __init__(self, config: EngineConfig, now: Callable[[], float] = time.perf_counter) -> None:
        """Loads the models. Raises ModelError. `now`: the clock, in seconds, by which turns are measured."""
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = pick_device(config.device)
        if config.deterministic and self.device.type == "cuda":
            make_deterministic(self.device)
        dtype = pick_dtype(config.dtype, self.device)
        # Before the models are there: what they take is no longer free afterwards.
        memory = config.memory or available_memory(self.device)
        self.models: dict[str, BaseModel] = {}
        for source in config.models:
            model = BaseModel(
                source.name,
                source.path,
                self.device,
                dtype,
                config.max_context,
                room=memory - LEAST - sum(m.nbytes for m in self.models.values()),
                trust_remote_code=config.trust_remote_code,
            )
            check(model)
            give_back()
            self.models[source.name] = model
        if self.device.type == "cpu":
            self._inexact = settle(list(self.models.values()), config.max_rank)
        else:
            self._inexact = {
                name: failures_on_gpu(model, config.max_rank) for name, model in self.models.items()
            }
        for name, reasons in self._inexact.items():
            for reason in reasons:
                log.warning("%s: results depend on their company here: %s", name, reason)
        weights = sum(m.nbytes + (CACHE_BYTES if m.vision else 0) for m in self.models.values())
        copies = sum(m.packed_bytes for m in self.models.values())
        budget = Budget.split(memory, weights, copies)
        for model in self.models.values():
            if model.vision is not None:
                model.vision.most_bytes = budget.passes
        self.residents = Residents(budget, Path(config.spill_dir))
        self.runs, self.snapshots = self.residents.runs, self.residents.snapshots
        self.shares = Shares()
        self.metrics = Metrics()
        cache = budget.cache // len(self.models)
        self._samplers = {
            name: Sampler(model, cache, self.shares, self.metrics, copies=budget.copies)
            for name, model in self.models.items()
        }
        self.now = now
        self._disk = Disk()
        self._opening: dict[
            str, list[tuple[Sample, Answer]]
        ] = {}  # samples that wait for a sampler's weights
        self.rounds = Rounds(self.residents, self.shares, self.metrics, self.device.type, now)
        self.turns = Turns(self._samplers, self.rounds, self._carry_out, self.device.type, now)

    @property
    def budget(self) -> Budget:
        return self.residents.budget

    # What it is

    def info(self) -> EngineInfo:
        return EngineInfo(
            device=str(self.device),
            exact=not any(self._inexact.values()),
            # torch's version is an object of torch's own, which whoever reads this would have to import.
            versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
            models={name: self._model_info(model) for name, model in self.models.items()},
        )

    def _model_info(self, model: BaseModel) -> ModelInfo:
        text_path, no_text = text_folder(model.folder, model.tokenizer, Path(self.config.spill_dir))
        return ModelInfo(
            name=model.name,
            path=model.path,
            architecture=type(model.module).__name__,
            tokenizer_path=model.path,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            max_rank=self.config.max_rank,
            dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype],
            parameters=model.parameters,
            active_parameters=model.active_parameters,
            fingerprint=model.fingerprint,
            exact=not self._inexact[model.name],
            way=model.way,
            images=model.vision is not None,
            no_images="" if model.vision is not None else model.no_images,
            image_token=model.vision.token if model.vision is not None else None,
            not_trainable=self._not_trainable(model),
            not_sampleable=self._not_sampleable(model),
            text_path=text_path,
            no_text=no_text,
            end_tokens=model.eos_token_ids,
        )

    def _not_trainable(self, model: BaseModel) -> str:
        """Why not even the smallest run has room, or nothing."""
        smallest = 4 * 4 * Layout(model.slots, LoraSpec(rank=1, seed=0)).size
        if smallest > self.budget.adapters:
            return f"an adapter of rank 1 needs {smallest} bytes in training; {self.budget.adapters} are left"
        need = peak_bytes(model, PADDING.rows, PADDING.rows, True, recomputed=True)
        if need > self.budget.passes:
            return f"a pass needs at least {need} bytes; {self.budget.passes} are left"
        return ""

    def _not_sampleable(self, model: BaseModel) -> str:
        pool = self._samplers[model.name].pool
        have = self.budget.cache // len(self.models)
        if pool.capacity * pool.page_bytes > have:
            return f"the smallest cache needs {pool.capacity * pool.page_bytes} bytes; {have} are left"
        return ""

    def status(self) -> dict[str, object]:
        """Figures of the moment; bytes where nothing else is said."""
        return {
            "exact": not any(self._inexact.values()),
            "padding_rows": PADDING.rows,
            "inexact": {name: list(reasons) for name, reasons in self._inexact.items() if reasons},
            "runs": len(self.runs),
            "runs_resident": sum(r.state is not None for r in self.runs.values()),
            "samplers": len(self.snapshots.entries),
            "samplers_resident": sum(s.weights is not None for s in self.snapshots.entries.values()),
            "samples_pending": sum(s.pending for s in self._samplers.values())
            + sum(map(len, self._opening.values())),
            "commands_waiting": sum(len(r.waiting) + len(r.jobs) + r.held for r in self.runs.values()),
            "adapter_bytes": self.residents.nbytes,
            "adapter_budget_bytes": self.budget.adapters,
            "cache_budget_bytes": self.budget.cache,
            "model_bytes": sum(m.nbytes for m in self.models.values()),
            "cache_used_bytes": sum(s.pool.used * s.pool.page_bytes for s in self._samplers.values()),
            "sequences_running": sum(len(s.running) for s in self._samplers.values()),
            "sequences_waiting": sum(len(s.waiting) for s in self._samplers.values()),
            **self.metrics.figures(),
        }

    # Commands

    @property
    def intake(self) -> Intake:
        """What submits the commands that have come: to be set by who drives the engine."""
        return self.turns.intake

    @intake.setter
    def intake(self, intake: Intake) -> None:
        self.turns.intake = intake

    def submit(self, command: Command, answer: Answer) -> None:
        """Take a command; `answer` is called once, now or in a later step, or while a pass stands still."""
        self.residents.clock += 1
        try:
            self._take(command, answer)
        except Exception as error:
            answer(failed(type(command).__name__, error))

    def _take(self, command: Command, answer: Answer) -> None:
        match command:
            case CreateAdapter():
                began = time.time()
                self._create(command)
                answer(Done({}, times={"started": began}))
            case CreateLoss():
                if command.body:
                    read_program(command.body)
                    keep_loss(command.aside, command.loss_id, command.body)
                found = has_loss(command.aside, command.loss_id)
                answer(Done({"loss_id": command.loss_id if found else None}))
            case OpenSampler():
                self.snapshots.open(command.sampler, self._model(command.model), command.path)
                answer(Done({}))
            case PutSampler():
                answer(Done({"written": self.snapshots.put(command.sampler, command.path)}))
            case ReleaseSampler():
                weights = self.snapshots.release(command.sampler)
                still_used = any(s.weights is weights for s in self.snapshots.entries.values())
                if weights is not None and not still_used:
                    for sampler in self._samplers.values():
                        sampler.release(weights)
                answer(Done({}))
            case Sample():
                entered = self._enter(command.share, answer, waits=not self.turns.interrupts)
                try:
                    self._sample(command, entered)
                except BaseException:
                    self.shares.leave(command.share.key)
                    raise
            case Cancel():
                self._cancel(command.request)
                answer(Done({}))
            case ImportAdapter():
                model, began = self._model(command.model), time.time()
                source, path, spec = command.source, command.path, command.lora
                self._leave(
                    Files(lambda: import_adapter(source, path, model, spec), Done), command, answer, began
                )
            case GetStatus():
                answer(Done(self.status()))
            case _:
                run = self.runs.get(command.run)
                if run is None:
                    raise _unknown(command.run)
                if isinstance(command, ForwardBackward) and command.share is not None:
                    run.share = command.share
                run.waiting.append((command, self._enter(run.share, answer)))

    def _enter(self, share: Share, answer: Answer, *, waits: bool = True) -> Answer:
        """Count a command among those of its share key until it is answered; it may `wait` for a pass."""
        self.shares.enter(share, waits=waits)

        def answered(reply: Reply | Piece) -> None:
            if not isinstance(reply, Piece):
                self.shares.leave(share.key)
            answer(reply)

        return answered

    def _model(self, name: str) -> BaseModel:
        model = self.models.get(name)
        if model is None:
            raise ContentError(
                f"base model {name!r} is not served here; served are: {', '.join(self.models)}"
            )
        return model

    def _create(self, command: CreateAdapter) -> None:
        model, spec = self._model(command.model), command.lora
        if command.run in self.runs:
            raise ContentError(f"run {command.run} exists already")
        if not 1 <= spec.rank <= self.config.max_rank:
            raise ContentError(
                f"lora_config.rank is {spec.rank}; it must be from 1 to {self.config.max_rank}"
            )
        if not (spec.train_attn or spec.train_mlp or spec.train_unembed):
            raise ContentError(
                "lora_config: at least one of train_attn, train_mlp and train_unembed must be true"
            )
        try:
            run = Run.create(command.run, model, spec, command.optimizer)
        except ValueError as error:
            raise ContentError(f"lora_config: {error}") from error
        if run.nbytes * 4 > self.budget.adapters:
            raise ContentError(
                f"an adapter of rank {spec.rank} needs up to {run.nbytes * 4} bytes with its optimizer; "
                f"this server keeps {self.budget.adapters} bytes for adapters"
            )
        run.share = command.share
        self.residents.add(run)

    def _sample(self, command: Sample, answer: Answer) -> None:
        model, name = self._model(command.model), command.sampler
        weights = None
        if name is not None:
            if name in self._opening:
                self._opening[name].append((command, answer))
                return
            try:
                if (read := self.snapshots.absent(name)) is not None:
                    self._open(name, read, command, answer)
                    return
                model, weights = self.snapshots.weights(name, self.residents.clock)
            except KeyError:
                raise ContentError(
                    f"sampler {name} is not on this engine: its weights were not saved under a "
                    "name, and the engine has restarted since, or its session has ended. Save them again"
                ) from None
            self.residents.make_room(keep=name)
        self._samplers[model.name].add(command, weights, answer)

    def _open(self, name: str, read: Callable[[], Read], command: Sample, answer: Answer) -> None:
        """Have a sampler's weights read; this sample and those that come meanwhile wait for them."""
        entry = self.snapshots.entries[name]
        self._opening[name] = [(command, answer)]

        def finish(result: Callable[[], Read]) -> None:
            waiting = self._opening.pop(name)
            try:
                found = result()
                if entry.weights is None:
                    self.snapshots.bring_back(entry, found)
            except Exception as error:
                for _, answer in waiting:
                    answer(failed("Sample", error))
                return
            for command, answer in waiting:
                try:
                    self._sample(command, answer)
                except Exception as error:
                    answer(failed("Sample", error))

        self._disk.do(read, finish)

    def _cancel(self, request: str) -> None:
        for sampler in self._samplers.values():
            sampler.cancel(request)
        for waiting in self._opening.values():
            for sample, answer in [each for each in waiting if each[0].request == request]:
                waiting.remove((sample, answer))
                answer(Failed("cancelled"))

    # The clock

    def step(self) -> bool:
        """One cycle. True while there is more work."""
        self.residents.clock += 1
        done = self._cycle()
        more = any(run.busy for run in self.runs.values()) or bool(self._disk)
        more |= any(sampler.pending for sampler in self._samplers.values())
        if more and not done:
            # Whoever lacks time cannot use it now, for want of memory, say.
            self.shares.stand_aside()
            if not self._cycle() and self._disk:
                self._disk.wait()
        return more

    def _cycle(self) -> bool:
        """What the disk has finished, and a turn of training and sampling. Whether anything was done."""
        written = self._disk.take()
        return self.turns.take() or written

    def _leave(
        self, files: Files, command: Command, answer: Answer, began: float, run: Run | None = None
    ) -> None:
        """Leave the rest of a command to the disk. Its run stands still for so long."""
        if run is not None:
            run.held = True

        def finish(result: Callable[[], Any]) -> None:
            if run is not None:
                run.held = False
            try:
                reply: Reply = replace(files.finish(result()), times={"started": began})
            except Exception as error:
                reply = failed(type(command).__name__ + ("" if run is None else f" of run {run.name}"), error)
            answer(reply)

        self._disk.do(files.work, finish)

    def _carry_out(self, until: float) -> tuple[bool, bool]:
        """Due commands of all runs, until a time. Whether there were any, and whether that was more than
        making jobs of a few requests."""
        done = heavy = False
        for name in list(self.residents.turn):
            run = self.runs[name]
            while self.now() < until and (command := self._advance(run)) is not None:
                done = True
                if not isinstance(command, ForwardBackward):
                    heavy = True
                    self.residents.served(run)
        return done, heavy or self.now() >= until

    def _advance(self, run: Run) -> Command | None:
        """Carry out the next command of a run, if it is due; of a forward_backward a job is made."""
        if not run.waiting or run.held or not self.shares.may(run.share.key):
            return None
        command, answer = run.waiting[0]
        begins = isinstance(command, ForwardBackward)
        if len(run.jobs) >= JOBS_AHEAD if begins else run.jobs:
            return None
        run.waiting.popleft()
        run.used = self.residents.clock
        began, started = time.time(), self.now()
        if isinstance(command, ForwardBackward):
            self.rounds.start(run, command, answer)
        else:
            try:
                found = execute(self.residents, run, command)
                if isinstance(found, Files):
                    self._leave(found, command, answer, began, run)
                else:
                    answer(replace(found, times={"started": began}))
            except Exception as error:
                answer(failed(f"{type(command).__name__} of run {run.name}", error))
        if isinstance(command, ReleaseRun):
            while run.waiting:
                late, answer = run.waiting.popleft()
                answer(failed(type(late).__name__, _unknown(run.name)))
        seconds = self.now() - started
        if isinstance(command, OptimStep):
            self.metrics.optim_step_seconds.observe(seconds)
        if self.shares.several:
            self.shares.charge(seconds, {run.share.key: seconds})
        return command


def _unknown(run: str) -> ContentError:
    return ContentError(f"run {run} is not on this engine")
