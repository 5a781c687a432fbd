"""The engine: a state machine over commands, driven by `submit` and `step`.

Each step is one clock cycle: due commands of every run, one training pass over blocks of whatever
runs have work, and sampling steps for about as long as the pass took. Nothing here waits or blocks
but the work itself; a process (process.py) or a test drives it.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from tinsmith.engine import adapter_files
from tinsmith.engine.adapter_files import FolderError, WriteError
from tinsmith.engine.aside import Aside, has_loss, keep_loss
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
    LoadState,
    LoraSpec,
    ModelInfo,
    OpenSampler,
    OptimStep,
    Piece,
    Publish,
    ReleaseRun,
    ReleaseSampler,
    Reply,
    Sample,
    SaveExternal,
    SaveState,
    Share,
)
from tinsmith.engine.device import make_deterministic, pick_device, pick_dtype
from tinsmith.engine.encryption import read_recipients
from tinsmith.engine.exactness import settle
from tinsmith.engine.exactness_gpu import failures_on_gpu
from tinsmith.engine.imports import import_adapter
from tinsmith.engine.losses.custom import read_program
from tinsmith.engine.memory import LEAST, Budget, available_memory
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.model.attention import PADDING
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.checks import check
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.model.vision import CACHE_BYTES
from tinsmith.engine.passes import fill_pass
from tinsmith.engine.runs import Answer, Run
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.shares import Costs, Shares
from tinsmith.engine.snapshots import Snapshots
from tinsmith.engine.training import TrainingJob, peak_bytes, run_pass
from tinsmith.wire.training import ContentError, decode_request

log = logging.getLogger(__name__)

BODY_LIMIT = 256 << 20  # bytes of a decompressed forward_backward body
PASS_ROWS = {"cpu": 4096, "cuda": 32768}  # rows of a training pass
SHARED_PASS_ROWS = {"cpu": 512, "cuda": 8192}  # the same while samples or several share keys are running
JOBS_AHEAD = 16  # forward_backwards of one run that are decoded at a time


class Engine:
    """Base models on one device, with all their runs and samplers."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads the models. Raises ModelError."""
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
        self.budget = Budget.split(memory, weights, copies)
        for model in self.models.values():
            if model.vision is not None:
                model.vision.most_bytes = self.budget.passes
        _clear(Path(config.spill_dir))
        self.runs: dict[str, Run] = {}
        self.snapshots = Snapshots(Path(config.spill_dir))
        self.shares = Shares()
        self.metrics = Metrics()
        cache = self.budget.cache // len(self.models)
        self._samplers = {
            name: Sampler(model, cache, self.shares, self.metrics, copies=self.budget.copies)
            for name, model in self.models.items()
        }
        self._pass_costs = {False: Costs(), True: Costs()}  # by forward_only
        self._turn: deque[str] = deque()  # runs, the one served longest ago first
        self._clock = 0

    # What it is

    def info(self) -> EngineInfo:
        return EngineInfo(
            device=str(self.device),
            exact=not any(self._inexact.values()),
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            models={name: self._model_info(model) for name, model in self.models.items()},
        )

    def _model_info(self, model: BaseModel) -> ModelInfo:
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
            not_trainable=self._not_trainable(model),
            not_sampleable=self._not_sampleable(model),
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
            "samples_pending": sum(s.pending for s in self._samplers.values()),
            "commands_waiting": sum(len(r.waiting) + len(r.jobs) for r in self.runs.values()),
            "adapter_bytes": self._adapter_bytes(),
            "adapter_budget_bytes": self.budget.adapters,
            "cache_budget_bytes": self.budget.cache,
            "model_bytes": sum(m.nbytes for m in self.models.values()),
            "cache_used_bytes": sum(s.pool.used * s.pool.page_bytes for s in self._samplers.values()),
            "sequences_running": sum(len(s.running) for s in self._samplers.values()),
            "sequences_waiting": sum(len(s.waiting) for s in self._samplers.values()),
            **self.metrics.figures(),
        }

    # Commands

    def submit(self, command: Command, answer: Answer) -> None:
        """Take a command; `answer` is called once, now or in a later step."""
        self._clock += 1
        try:
            self._take(command, answer)
        except Exception as error:
            answer(_failed(type(command).__name__, error))

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
            case ReleaseSampler():
                weights = self.snapshots.release(command.sampler)
                still_used = any(s.weights is weights for s in self.snapshots.entries.values())
                if weights is not None and not still_used:
                    for sampler in self._samplers.values():
                        sampler.release(weights)
                answer(Done({}))
            case Sample():
                entered = self._enter(command.share, answer)
                try:
                    self._sample(command, entered)
                except BaseException:
                    self.shares.leave(command.share.key)
                    raise
            case Cancel():
                for sampler in self._samplers.values():
                    sampler.cancel(command.request)
                answer(Done({}))
            case ImportAdapter():
                model = self._model(command.model)
                payload = import_adapter(command.source, command.path, model, command.lora)
                answer(Done(payload))
            case GetStatus():
                answer(Done(self.status()))
            case _:
                run = self.runs.get(command.run)
                if run is None:
                    raise ContentError(f"run {command.run} is not on this engine")
                if isinstance(command, ForwardBackward) and command.share is not None:
                    run.share = command.share
                run.waiting.append((command, self._enter(run.share, answer)))

    def _enter(self, share: Share, answer: Answer) -> Answer:
        """Count a command among those of its share key until it is answered."""
        self.shares.enter(share)

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
        run.used, run.share = self._clock, command.share
        self.runs[command.run] = run
        self._turn.append(command.run)
        self._make_room()

    def _sample(self, command: Sample, answer: Answer) -> None:
        model = self._model(command.model)
        weights = None
        if command.sampler is not None:
            try:
                model, weights = self.snapshots.weights(command.sampler, self._clock)
            except KeyError:
                raise ContentError(
                    f"sampler {command.sampler} is not on this engine: its weights were not saved under a "
                    "name, and the engine has restarted since, or its session has ended. Save them again"
                ) from None
            self._make_room(keep=command.sampler)
        self._samplers[model.name].add(command, weights, answer)

    # The clock

    def step(self) -> bool:
        """One cycle. True while there is more work."""
        self._clock += 1
        done = self._cycle()
        more = any(run.waiting or run.jobs for run in self.runs.values())
        more |= any(sampler.pending for sampler in self._samplers.values())
        if more and not done:
            # Whoever lacks time cannot use it now, for want of memory, say.
            self.shares.stand_aside()
            self._cycle()
        return more

    def _cycle(self) -> bool:
        """Whether anything was done."""
        done = False
        for name in list(self._turn):
            done |= self._advance(self.runs[name])
        started = time.perf_counter()
        trained = self._train()
        spent = time.perf_counter() - started
        started = time.perf_counter()
        for sampler in self._samplers.values():
            while sampler.pending:
                sampler.step()
                done |= not sampler.stuck
                if sampler.stuck or not trained or time.perf_counter() - started >= spent:
                    break
        return done or trained

    def _advance(self, run: Run) -> bool:
        """Carry out what is due of one run, up to forward_backwards, which become jobs. Whether there
        was anything."""
        done = False
        while run.waiting and self.shares.may(run.share.key):
            command, answer = run.waiting[0]
            begins = isinstance(command, ForwardBackward)
            if len(run.jobs) >= JOBS_AHEAD if begins else run.jobs:
                break
            run.waiting.popleft()
            run.used = self._clock
            done = True
            began, started = time.time(), time.perf_counter()
            if isinstance(command, ForwardBackward):
                self._start(run, command, answer)
            else:
                try:
                    answer(replace(self._execute(run, command), times={"started": began}))
                except Exception as error:
                    answer(_failed(f"{type(command).__name__} of run {run.name}", error))
            seconds = time.perf_counter() - started
            if isinstance(command, OptimStep):
                self.metrics.optim_step_seconds.observe(seconds)
            if self.shares.several:
                self.shares.charge(seconds, {run.share.key: seconds})
        return done

    def _start(self, run: Run, command: ForwardBackward, answer: Answer) -> None:
        try:
            request = decode_request(command.body, command.encoding, BODY_LIMIT)
            self._bring_back(run)
            aside = Aside(command.aside, command.arrived_at)
            job = TrainingJob(request, run.model, run.layout, run.weights, aside)
            self._fits(job)
        except Exception as error:
            answer(_failed(f"forward_backward {command.seq_id} of run {run.name}", error))
        else:
            job.answer = answer
            run.jobs.append(job)

    def _fits(self, job: TrainingJob) -> None:
        """Refuse a sequence whose pass would not fit by itself."""
        for index, sequence in enumerate(job.sequences):
            length = sequence.tokens.numel()
            need = peak_bytes(job.model, length, length, not job.forward_only, recomputed=True)
            if need > self.budget.passes:
                raise ContentError(
                    f"data[{index}] has {length} tokens, for which a pass needs about {need} bytes; this "
                    f"server has {self.budget.passes} for it. Send a shorter sequence or raise --memory"
                )

    def _execute(
        self,
        run: Run,
        command: OptimStep | SaveState | SaveExternal | LoadState | Publish | ReleaseRun,
    ) -> Done:
        match command:
            case OptimStep():
                self._bring_back(run)
                metrics = run.optimize(command.params)
                self._make_room(keep=run.name)
                return Done({"metrics": metrics} if metrics else {})
            case SaveState():
                self._bring_back(run)
                size = adapter_files.write(
                    command.path,
                    run.model,
                    run.layout,
                    run.live,
                    optimizer=run.optimizer,
                    gradients=command.gradients,
                )
                return Done({"size_bytes": size})
            case SaveExternal():
                recipients = read_recipients(command.recipients)
                self._bring_back(run)
                size = adapter_files.write(
                    command.path,
                    run.model,
                    run.layout,
                    run.live,
                    optimizer=None,
                    gradients=False,
                    recipients=recipients,
                )
                return Done({"size_bytes": size})
            case LoadState():
                spec, _ = adapter_files.read_spec(command.path, run.model)
                _same_shape(run, spec)
                if command.optimizer:
                    _same_optimizer(run, adapter_files.read_optimizer(command.path))
                state = adapter_files.read(
                    command.path,
                    run.layout,
                    run.model.device,
                    optimizer=command.optimizer,
                    gradients=command.gradients,
                )
                self._drop_spill(run)
                run.replace(state)
                self._make_room(keep=run.name)
                return Done({})
            case Publish():
                self._bring_back(run)
                written = None
                if command.path is not None:
                    written = adapter_files.write(
                        command.path, run.model, run.layout, run.live, optimizer=None, gradients=False
                    )
                self.snapshots.publish(command.sampler, run.model, run.layout, run.weights, command.path)
                self.snapshots.entries[command.sampler].used = self._clock
                self._make_room(keep=command.sampler)
                return Done({"size_bytes": written})
            case ReleaseRun():
                self._drop_spill(run)
                del self.runs[run.name]
                self._turn.remove(run.name)
                return Done({})

    # Training

    def _train(self) -> bool:
        """One pass over blocks of the runs that have work, in turns. False if there was none."""
        busy = any(s.pending for s in self._samplers.values())
        short = busy or self.shares.contended
        limit = (SHARED_PASS_ROWS if short else PASS_ROWS)[self.device.type]
        work = fill_pass(self.runs, self._turn, self.shares, limit, self.budget.passes)
        if not work:
            return False
        jobs = list({id(job): job for job, _ in work}.values())
        started = time.perf_counter()
        for job in jobs:
            job.started = job.started or time.time()
        try:
            run_pass([(job, job.cuts[index]) for job, index in work], self.budget.passes)
        except Exception as error:
            self._pass_failed(jobs, error)
        else:
            for job, index in work:
                job.next = index + 1
        seconds = time.perf_counter() - started
        rows: Counter[str] = Counter()
        for job, index in work:
            rows[job.key] += job.cuts[index].rows
        costs = self._pass_costs[jobs[0].forward_only]
        costs.observe(rows.total(), seconds)
        self.metrics.train_pass_seconds.observe(seconds)
        self.metrics.train_pass_fill.observe(rows.total() / limit)
        self.shares.charge(
            seconds, {key: costs.estimate(own, rows.total(), seconds) for key, own in rows.items()}
        )
        for run in self.runs.values():
            self._finish(run)
        return True

    def _pass_failed(self, jobs: list[TrainingJob], error: Exception) -> None:
        """A pass changed nothing but its own jobs: start them anew, each alone. One that was has failed."""
        if len(jobs) == 1 and jobs[0].alone:
            log.error("a training pass failed", exc_info=error)
            jobs[0].failure = f"forward_backward failed: {_text(error)}. Nothing was accumulated"
            return
        log.warning("a training pass of %d requests failed, trying each alone: %s", len(jobs), _text(error))
        for job in jobs:
            job.restart()
            job.alone = True

    def _finish(self, run: Run) -> None:
        """Answer finished jobs, in the order of their seq_ids."""
        while run.jobs and (run.jobs[0].done or run.jobs[0].failure):
            job = run.jobs.popleft()
            if job.failure:
                job.answer(Failed(job.failure, "server"))
                continue
            try:
                payload = job.result()
            except ContentError as error:
                job.answer(Failed(str(error)))
                continue
            if job.gradients is not None:
                run.accumulate(job.gradients)
                self._make_room(keep=run.name)
            self.metrics.tokens["train"] += job.tokens
            job.answer(Done(payload, {"train": job.tokens}, {"started": job.started}))

    # Memory

    def _adapter_bytes(self) -> int:
        """Resident bytes of runs and snapshots; weights that several share count once."""
        states = sum(r.state.nbytes for r in self.runs.values() if r.state is not None)
        shared = {id(w): w.nbytes for r in self.runs.values() if (w := r.made_weights) is not None}
        shared |= {id(w): w.nbytes for s in self.snapshots.entries.values() if (w := s.weights) is not None}
        return states + sum(shared.values())

    def _make_room(self, keep: str | None = None) -> None:
        """Put away what was used longest ago until runs and snapshots are within their bound."""
        if self._adapter_bytes() <= self.budget.adapters:
            return
        idle_runs = [
            (r.used, r.name, True)
            for r in self.runs.values()
            if r.state is not None and not r.waiting and not r.jobs and r.name != keep
        ]
        snapshots = [
            (s.used, name, False)
            for name, s in self.snapshots.entries.items()
            if s.weights is not None and name != keep
        ]
        for _, name, is_run in sorted(idle_runs + snapshots):
            try:
                if is_run:
                    self._put_away(self.runs[name])
                else:
                    self.snapshots.evict(name)
            except (FolderError, OSError) as error:
                log.warning("%s could not be put away: %s", name, error)
            if self._adapter_bytes() <= self.budget.adapters:
                return

    def _put_away(self, run: Run) -> None:
        path = str(Path(self.config.spill_dir) / f"run-{uuid.uuid4().hex}")
        adapter_files.write(path, run.model, run.layout, run.live, optimizer=run.optimizer, gradients=True)
        run.spilled = path
        run.replace(None)

    def _bring_back(self, run: Run) -> None:
        if run.state is None and run.spilled is not None:
            run.replace(
                adapter_files.read(run.spilled, run.layout, run.model.device, optimizer=True, gradients=True)
            )
            self._drop_spill(run)
            self._make_room(keep=run.name)

    def _drop_spill(self, run: Run) -> None:
        if run.spilled is not None:
            adapter_files.remove(run.spilled)
            run.spilled = None


def _clear(spill_dir: Path) -> None:
    """Delete what an engine that died had put away: it is of no use to anyone."""
    for left in spill_dir.glob("run-*"):
        adapter_files.remove(str(left))
    for left in spill_dir.glob("sampler-*.safetensors"):
        left.unlink(missing_ok=True)


def _same_shape(run: Run, spec: object) -> None:
    own = run.layout.spec
    for name in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed"):
        theirs = getattr(spec, name)
        if theirs != getattr(own, name):
            raise ContentError(
                f"the checkpoint has {name} {theirs}, this run has {getattr(own, name)}; create the training "
                "client from the checkpoint instead (create_training_client_from_state)"
            )


def _same_optimizer(run: Run, theirs: str) -> None:
    if theirs != run.optimizer:
        raise ContentError(
            f"the checkpoint has the state of the optimizer {theirs}, this run was created with "
            f"{run.optimizer}; load the weights alone, or create the training client from the checkpoint "
            "(create_training_client_from_state_with_optimizer)"
        )


def _failed(what: str, error: Exception) -> Failed:
    """The answer to a command that raised; what is not the user's own mistake is logged, too."""
    if isinstance(error, (ContentError, FolderError)):
        return Failed(str(error), "server" if isinstance(error, WriteError) else "user")
    log.error("%s failed", what, exc_info=error)
    return Failed(f"{what} failed: {_text(error)}", "server")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
