"""Samples: which ones are under way, and what came of them.

Nothing of a sample outlives the server. A sample that was forgotten is answered as lost, and its
client submits it again: with a seed of its own it then gets the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinsmith.engine.commands import Cancel, EngineLost, Failed, ModelInfo, Piece, SampleParams
from tinsmith.engine.commands import Sample as EngineSample
from tinsmith.store import WriteFailed, sessions
from tinsmith.store.ledger import Entry
from tinsmith.store.samplers import SamplingSessionRow
from tinsmith.store.scope import Owned, Owner
from tinsmith.wire.errors import WireError
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.requests import RetrieveFutures
from tinsmith.wire.sample_request import SampleRequest

from .aside import aside_key
from .audit import AuditLog
from .caller import Caller
from .context import Context
from .errors import Gone
from .futures import Failure, Lost, Outcome, Pending, PendingRequest, Result
from .limits import Who
from .samplers import Samplers, quietly
from .session_status import failure_of_request
from .sessions import Sessions

log = logging.getLogger("tinsmith.service.sampling")

_KEPT_BYTES = 256 * 2**20  # results of samples in memory, beyond which the oldest fetched ones go
_COLDEST = 1e-30  # a temperature that is greedy already; logits by still lower ones leave fp32
_CLONE = 1_000_000_000  # a clone's seq_ids start at a multiple of this


def is_sample(request_id: str) -> bool:
    return ":sample:" in request_id or request_id.startswith("sample:")


@dataclass(frozen=True, slots=True)
class Promise:
    """What a sampling request is answered: where its outcome will be, and its sequences' names."""

    request_id: str
    sequence_ids: list[str]


@dataclass(slots=True, eq=False)
class _Sample:
    request: PendingRequest
    owner: Owned
    who: Who
    session_id: str | None  # of the client, for cancelling what nobody waits for
    sampling_session_id: str | None
    seq_id: int
    num_samples: int
    size: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    owed: list[Entry] = field(default_factory=list)  # what the ledger does not have yet
    entering: asyncio.Task[None] | None = None
    ended: int = 0  # the order in which samples ended; 0 while it has not
    ended_at: float = 0.0
    fetched_at: float | None = None


class Sampling:
    def __init__(self, context: Context, sessions: Sessions, samplers: Samplers, audit: AuditLog) -> None:
        self._context = context
        self._audit = audit
        self._sessions = sessions
        self._samplers = samplers
        self._samples: dict[str, _Sample] = {}
        self._of_session: dict[str, dict[str, _Sample]] = {}
        self._ended = 0
        self._kept_bytes = 0
        self._bells: dict[str, asyncio.Event] = {}
        sessions.on_finish.append(self._session_ended)
        sessions.on_silence.append(self._session_ended)
        sessions.on_move.append(self._session_moved)

    # Samples

    async def sample(
        self, caller: Caller, request: SampleRequest, parts: Callable[[Piece], None] | None = None
    ) -> Promise:
        """Begin a sample. `parts` is told of its tokens as they come."""
        if request.sampling_session_id is not None:
            row = await self._samplers.get(caller, request.sampling_session_id)
            owner: Owned = await self._sessions.get(caller, row.session_id)
            caller.require(owner.project_id, "sample")
            request_id = f"{row.id}:{request.seq_id}"
            if (known := self._samples.get(request_id)) is not None:
                return _promise(known)
            if (end := await self._sessions.end_of(row.session_id)) is not None:
                raise Gone(
                    f"sampling_session_id: the session of {row.id} {end}; create a new sampling client"
                )
        else:
            caller.require(caller.home, "sample")
            owner = Owner(caller.org_id, caller.home, caller.user_id)
            row = SamplingSessionRow(
                "", caller.org_id, "", 0.0, "", request.model_path, None, None, ephemeral=False
            )
            row = await self._samplers.resolve(caller, row, request.base_model)
            if row.model_path is not None:
                self._audit.was_sampled_from(caller, TinkerPath.parse(row.model_path))
            request_id = f"sample:{uuid.uuid4().hex}"
        model = self._samplers.sampleable(row.base_model)
        _check_images(request, model)
        _check_length(request, model)
        _check_top_k(request, model)
        if (why := await self._samplers.why_gone(row)) is not None:
            raise Gone(f"sampling_session_id: {why}")
        if (known := self._samples.get(request_id)) is not None:
            return _promise(known)
        who = Who(owner.org_id, owner.project_id, row.session_id, owner.user_id, caller.key_id)
        self._context.limits.begin_sample(who)
        sample = _Sample(
            PendingRequest(request_id),
            owner,
            who,
            row.session_id or None,
            row.id or None,
            request.seq_id or 0,
            request.num_samples,
        )
        self._samples[request_id] = sample
        if row.session_id:
            self._sessions.seen(row.session_id)
            self._of_session.setdefault(row.session_id, {})[request_id] = sample
        self._context.traces.accepted(
            caller.org_id, row.session_id, request_id, "sample", row.id, len(request.prompt)
        )
        self._context.spawn(self._run(sample, row, model, request, parts))
        return _promise(sample)

    async def _run(
        self,
        sample: _Sample,
        row: SamplingSessionRow,
        model: ModelInfo,
        request: SampleRequest,
        parts: Callable[[Piece], None] | None,
    ) -> None:
        try:
            outcome = await self._outcome_of(sample, row, model, request, parts)
        except EngineLost:
            outcome = Lost("the engine stopped while this was being sampled; submit it again")
        except Exception as error:
            outcome = Failure(f"the server failed: {error}", "server")
            self._end(sample, outcome)
            raise
        cancelled = sample.ended
        self._end(sample, outcome)
        if not cancelled and isinstance(outcome, Failure) and sample.session_id is not None:
            session_id = sample.session_id
            failure = failure_of_request(
                sample.request.request_id, "sample", outcome.category, outcome.message
            )
            self._context.store.write_soon(
                lambda connection: sessions.failed(connection, session_id, failure)
            )

    async def _outcome_of(
        self,
        sample: _Sample,
        row: SamplingSessionRow,
        model: ModelInfo,
        request: SampleRequest,
        parts: Callable[[Piece], None] | None,
    ) -> Outcome:
        if row.folder is not None and (task := self._samplers.begin_to_open(row)) is not None:
            wrong = await asyncio.shield(task)
            if wrong is not None:
                return Failure(
                    f"the weights {row.model_path or row.id} could not be opened: {wrong}", "server"
                )
        elif row.folder is None:
            await self._samplers.held(row)
        if sample.request.outcome is not None:  # cancelled meanwhile
            return sample.request.outcome
        reply = await self._context.engine.submit(
            EngineSample(
                request=sample.request.request_id,
                model=model.name,
                sampler=row.sampler,
                prompt=request.prompt,
                params=SampleParams(
                    seed=request.seed if request.seed is not None else secrets.randbits(63),
                    max_tokens=request.max_tokens,
                    temperature=request.temperature and max(request.temperature, _COLDEST),
                    top_k=request.top_k,
                    top_p=request.top_p,
                    stop=request.stop,
                ),
                num_samples=request.num_samples,
                prompt_logprobs=request.prompt_logprobs,
                topk_prompt=request.topk_prompt_logprobs,
                topk_sample=request.topk_sample_logprobs,
                prompt_logprobs_last_n=request.prompt_logprobs_last_n,
                targets=request.targets,
                alt_tokens=request.prompt_alt_tokens_k,
                images=request.images,
                record=self._record(row) if request.record_stability_info else None,
                stream=parts is not None,
                share=self._context.limits.share(sample.who.org_id),
            ),
            parts,
        )
        self._context.traces.started(sample.request.request_id, reply.times.get("started"))
        self._use(sample, model, reply.usage)
        if isinstance(reply, Failed):
            return Failure(reply.message, reply.category)
        sample.usage = dict(reply.usage)
        return Result(reply.payload)

    def _record(self, row: SamplingSessionRow) -> str:
        """Where a session's sequences are kept for training on them."""
        return str(self._context.blobs.path(aside_key(row.session_id)))

    def _use(self, sample: _Sample, model: ModelInfo, usage: Mapping[str, int]) -> None:
        """Note what a sample has used, or enter it at once where it was told already that it is cancelled."""
        self._context.limits.used_tokens(sample.who, sum(usage.values()))
        entries = self._context.meter.entries(sample.who, model.name, usage)
        self._context.meter.owe(entries)
        if sample.ended:
            self._context.spawn(self._enter(entries))
        else:
            sample.owed = entries

    async def _settle(self, sample: _Sample) -> None:
        """See to it that what a sample has used is in the ledger."""
        if sample.owed:
            entries, sample.owed = sample.owed, []
            sample.entering = self._context.spawn(self._enter(entries))
        if sample.entering is not None:
            await asyncio.shield(sample.entering)

    async def _enter(self, entries: list[Entry]) -> None:
        try:
            await self._context.meter.enter(entries)
        except WriteFailed as error:
            log.error("usage could not be entered: %s", error)
        finally:
            self._context.meter.owe(entries, -1)

    def _end(self, sample: _Sample, outcome: Outcome) -> None:
        if sample.ended:
            return
        ended = {Result: "done", Failure: "failed"}.get(type(outcome), "lost")
        self._context.traces.ended(sample.request.request_id, ended, sample.usage)
        self._context.limits.end_sample(sample.who)
        sample.request.resolve(outcome)
        self._ended += 1
        sample.ended, sample.ended_at = self._ended, time.monotonic()
        if isinstance(outcome, Result) and isinstance(outcome.payload, bytes):
            sample.size = len(outcome.payload)
            self._kept_bytes += sample.size
        if sample.sampling_session_id is not None:
            bell = self._bells.pop(sample.sampling_session_id, None)
            if bell is not None:
                bell.set()

    async def outcome(
        self, caller: Caller, request_id: str, seconds: float, closing: asyncio.Future[None]
    ) -> Outcome | Pending:
        sample = self._samples.get(request_id)
        if sample is None or not caller.scope().sees(sample.owner):
            return Lost("this sampling request is not known here (any more); submit it again")
        if sample.session_id is not None:
            self._sessions.seen(sample.session_id)
        outcome = await sample.request.wait(seconds, closing)
        if outcome is None:
            ready = self._context.engine.ready
            return Pending() if ready else Pending("paused_capacity", "the engine is starting")
        await self._settle(sample)
        if sample.fetched_at is None:
            sample.fetched_at = time.monotonic()
        return outcome

    def prompt_tokens(self, request_id: str) -> int:
        """How many tokens the prompt of a sample that has ended was, images included."""
        usage = self._samples[request_id].usage
        return usage.get("prefill", 0) + usage.get("cached_prefill", 0)

    async def completions(
        self, caller: Caller, request: RetrieveFutures, hold: float, closing: asyncio.Future[None]
    ) -> tuple[list[dict[str, object]], int]:
        """Which of a sampling client's requests have ended since a cursor; waits until one has."""
        row = await self._samplers.get(caller, request.sampling_session_id)
        caller.require_over(await self._sessions.get(caller, row.session_id))
        mine = self._of_session.get(row.session_id, {})
        for request_id in request.retrieved:
            if (sample := mine.get(request_id)) is not None and sample.fetched_at is None:
                sample.fetched_at = time.monotonic()
        deadline = time.monotonic() + (hold if request.timeout is None else min(request.timeout, hold))
        while True:
            ended = sorted(
                (
                    sample
                    for sample in self._of_session.get(row.session_id, {}).values()
                    if sample.sampling_session_id == row.id
                    and sample.seq_id // _CLONE == request.clone
                    and sample.ended > request.cursor
                ),
                key=lambda sample: sample.ended,
            )
            left = deadline - time.monotonic()
            if ended or left <= 0 or closing.done():
                return [_completion(sample) for sample in ended], max(
                    [request.cursor, *(sample.ended for sample in ended)]
                )
            bell = self._bells.setdefault(row.id, asyncio.Event())
            ringing = asyncio.ensure_future(bell.wait())
            either: set[asyncio.Future[Any]] = {ringing, closing}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            ringing.cancel()

    # Ends

    async def cancel(self, caller: Caller, request_id: str) -> None:
        sample = self._samples.get(request_id)
        if sample is not None and caller.scope().sees(sample.owner):
            caller.require_over(sample.owner)
            self._cancel(sample)

    def _cancel(self, sample: _Sample) -> None:
        if not sample.ended:
            self._end(sample, Failure("cancelled"))
            self._context.spawn(quietly(self._context.engine.submit(Cancel(sample.request.request_id))))

    def _session_moved(self, session_id: str, project_id: str) -> None:
        """Whoever sees the session sees its samples."""
        for sample in self._of_session.get(session_id, {}).values():
            sample.owner = Owner(sample.owner.org_id, project_id, sample.owner.user_id)

    async def _session_ended(self, session_id: str) -> None:
        """Nobody waits for this session's samples any more."""
        for sample in list(self._of_session.get(session_id, {}).values()):
            self._cancel(sample)

    def sweep(self) -> None:
        """Forget results that were fetched long ago, and earlier where they take too much room."""
        now, ttl = time.monotonic(), self._context.settings.result_ttl
        for request_id, sample in list(self._samples.items()):
            if not sample.ended:
                continue
            old = now - (sample.fetched_at or sample.ended_at) > ttl
            if old or (self._kept_bytes > _KEPT_BYTES and sample.fetched_at is not None):
                del self._samples[request_id]
                self._context.spawn(self._settle(sample))
                self._kept_bytes -= sample.size
                if sample.session_id is not None:
                    mine = self._of_session.get(sample.session_id, {})
                    mine.pop(request_id, None)
                    if not mine:
                        self._of_session.pop(sample.session_id, None)

    @property
    def under_way(self) -> int:
        return sum(not sample.ended for sample in self._samples.values())


def _promise(sample: _Sample) -> Promise:
    request_id = sample.request.request_id
    return Promise(request_id, [f"{request_id}:{index}" for index in range(sample.num_samples)])


def _completion(sample: _Sample) -> dict[str, object]:
    done = isinstance(sample.request.outcome, Result)
    answer: dict[str, object] = {
        "request_id": sample.request.request_id,
        "state": "finished" if done else "failed",
    }
    if done:
        answer["response_payload_uncompressed_size"] = sample.size
    return answer


def _check_top_k(request: SampleRequest, model: ModelInfo) -> None:
    for name, k in (
        ("topk_prompt_logprobs", request.topk_prompt_logprobs),
        ("topk_sample_logprobs", request.topk_sample_logprobs),
    ):
        if k > model.vocab_size:
            raise WireError(name, f"is {k}, more than the {model.vocab_size} tokens of the vocabulary")


def _check_images(request: SampleRequest, model: ModelInfo) -> None:
    if request.images and not model.images:
        raise WireError(
            f"prompt.chunks[{request.images[0].chunk}].type", f"is 'image'; {model.name} reads text alone"
        )


def _check_length(request: SampleRequest, model: ModelInfo) -> None:
    wanted = request.max_tokens or 1
    if request.prompt_length + wanted > model.max_context:
        shown = str(wanted) if request.max_tokens is not None else "not set (at least 1)"
        raise WireError(
            "max_tokens",
            f"the prompt has {request.prompt_length} tokens and max_tokens is {shown}, together more than"
            f" this model's context of {model.max_context} tokens; shorten one of them",
        )
