"""Continuous batching: every step advances all running sequences, prefills and decodes alike, in one pass.

A sequence is its tokens and how many of them are in the cache. What is missing is computed: one token
while it decodes, more while its prompt (or, after it had to make room, its prompt and output) is
prefilled. That is all the state there is, so joining, leaving, making room and coming back change nothing
about a result.

Here requests come in, tokens are drawn and results go out. Who runs is up to sample_scheduler.py, what is
computed up to model_runner.py.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from tinsmith.engine.aside import record
from tinsmith.engine.commands import Done, Failed, Piece, Reply, Sample
from tinsmith.engine.generic import CachePool
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.model.attention import PAGE
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model_runner import ModelRunner
from tinsmith.engine.pace import Pace
from tinsmith.engine.program import Draws
from tinsmith.engine.prompt_scores import PromptScores
from tinsmith.engine.runs import Answer
from tinsmith.engine.sample_requests import (
    SampledSequence,
    SampleRequest,
    check,
    check_tokens,
    decodes,
    piece,
)
from tinsmith.engine.sample_scheduler import PREFILL_ROWS, RUNNING, Plan, SampleScheduler
from tinsmith.engine.sampling import Drawn, StopCheck, likeliest, sample, uniforms
from tinsmith.engine.shares import Costs, Shares
from tinsmith.engine.states import StatePool
from tinsmith.engine.waiting import Waiting
from tinsmith.wire.sampling import Sampled, TopK, encode_response
from tinsmith.wire.training import ContentError

log = logging.getLogger(__name__)

LOGIT_ROWS = 256  # rows whose logits exist at a time
STEP = 0.008  # seconds of a step while several share keys have work: what one that comes may have to wait for


class Sampler:
    """All sampling of one base model, with any mix of adapters."""

    def __init__(
        self,
        model: BaseModel,
        cache_bytes: int,
        shares: Shares | None = None,
        metrics: Metrics | None = None,
        *,
        copies: bool = True,
    ) -> None:
        """copies: whether to make copies of the weights that sampling is faster with, when it begins."""
        self.model = model
        self.shares = shares or Shares()
        self.metrics = metrics or Metrics()
        self.copies = copies
        self.states: StatePool | CachePool | None = None
        if model.generic:
            self.states = CachePool(model, RUNNING, cache_bytes)
        elif model.mixers:
            self.states = StatePool(model, RUNNING, cache_bytes // 2)
            cache_bytes -= cache_bytes // 2
        self.pool = PagePool(model, cache_bytes)
        self.runner = ModelRunner(model, self.pool, self.states)
        self.scheduler = SampleScheduler(
            model,
            self.pool,
            self.states,
            self.shares,
            self.metrics,
            lambda sequence, message: self._fail(sequence.request, message, "user"),
        )
        self.requests: dict[str, SampleRequest] = {}
        self.stuck = False  # whether the last step found nothing that it could compute
        self._costs = Costs()
        self._pace = Pace()

    @property
    def running(self) -> list[SampledSequence]:
        return self.scheduler.running

    @property
    def waiting(self) -> Waiting[SampledSequence]:
        return self.scheduler.waiting

    @property
    def pending(self) -> int:
        """Sequences that are not finished."""
        return len(self.waiting) + len(self.running)

    def add(self, command: Sample, weights: AdapterWeights | None, answer: Answer) -> None:
        """Take a request. Raises ContentError, naming the field."""
        if command.request in self.requests:
            raise ContentError(f"request {command.request} is running already")
        text = np.frombuffer(command.prompt, dtype="<i4").astype(np.int64)
        check_tokens(self.model, text)
        expanded = self.model.expand(text, command.images, "prompt") if command.images else None
        prompt = (text if expanded is None else expanded.tokens).tolist()
        content = prompt if expanded is None else expanded.content()
        limit = check(self.model, command, prompt)
        needed = math.ceil((len(prompt) + 1) / PAGE)
        if needed > self.pool.capacity:
            need, have = needed * self.pool.page_bytes, self.pool.capacity * self.pool.page_bytes
            raise ContentError(
                f"the prompt of {len(prompt)} tokens needs {need} bytes of cache; this server has {have}. "
                "Send a shorter prompt or raise --memory"
            )
        if isinstance(self.states, CachePool):
            limit = self._fit(self.states.most_tokens, len(prompt), limit, command.params.max_tokens)
        stop = StopCheck(command.params.stop, self.model.eos_token_ids, self.model.tokenizer)
        scores = PromptScores(command, prompt, self.model.vocab_size)
        request = SampleRequest(command, weights, answer, prompt, content, expanded, limit, stop, scores)
        self.requests[command.request] = request
        # The other samples join when the first has computed the prompt for all.
        request.live.append(SampledSequence(request, 0, list(prompt)))
        if self.copies:
            self.copies = False
            self.runner.pack()
        self.waiting.append(request.live[0])

    @staticmethod
    def _fit(most: int, prompt: int, limit: int, wanted: int | None) -> int:
        """The output tokens for which a cache of `most` tokens has room. Raises ContentError."""
        if prompt + (wanted or 1) > most:
            raise ContentError(
                f"the prompt of {prompt} tokens and max_tokens {wanted} need a larger cache; this server has "
                f"room for {most} tokens of a sequence. Send less or raise --memory"
            )
        return min(limit, most - prompt)

    def cancel(self, name: str) -> None:
        """Stop a request and free what it held."""
        request = self.requests.get(name)
        if request is not None:
            self._fail(request, "cancelled", "user")
            if not self.running:
                self.runner.forget()

    def release(self, weights: AdapterWeights) -> None:
        """Forget what the cache knows of an adapter."""
        self.pool.forget_weights(weights.serial)

    # One step

    @torch.inference_mode()
    def step(self) -> bool:
        """Advance everything once. True while there is more to do."""
        self.scheduler.admit()
        most = self._costs.within(STEP) if self.shares.contended else None
        plan = self.scheduler.plan(self._prefill_rows(), most)
        self.stuck = not plan
        if plan:
            started = time.perf_counter()
            self.metrics.sample_step_fill.observe(len(plan) / RUNNING)
            keys = self._rows_by_key(plan)
            try:
                self._advance(plan)
            except Exception as error:
                log.exception("a sampling step failed")
                text = f"sampling failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                for request in {id(s.request): s.request for s, _ in plan}.values():
                    self._fail(request, text, "server")
            self._charge(keys, time.perf_counter() - started)
        if not self.running:
            self.runner.forget()
        return self.pending > 0

    def _prefill_rows(self) -> int:
        """Prompt tokens of the next step."""
        most = PREFILL_ROWS[self.model.device.type]
        if self.runner.decoder is not None and any(map(decodes, self.running)):
            return self._pace.rows(most)  # those who decode wait for it
        return most

    def _rows_by_key(self, plan: Plan) -> Counter[str]:
        rows: Counter[str] = Counter()
        for sequence, count in plan:
            rows[sequence.key] += count
        return rows

    def _charge(self, keys: Counter[str], seconds: float) -> None:
        whole = keys.total()
        self.metrics.sample_step_seconds.observe(seconds)
        self._costs.observe(whole, seconds)
        self._pace.observe(whole, seconds)
        self.shares.charge(
            seconds, {key: self._costs.estimate(rows, whole, seconds) for key, rows in keys.items()}
        )

    def _advance(self, plan: Plan) -> None:
        if self.runner.decoder is not None and all(decodes(s) and n == 1 for s, n in plan):
            part = sorted((s for s, _ in plan), key=lambda s: s.request.serial)  # adapters' rows together
            drawn = self.runner.decode(part)
            for sequence in part:
                sequence.computed += 1
                self.scheduler.make_known(sequence)
            self._take(part, drawn)
            return
        step = self.runner.run(plan, self.scheduler.epoch)
        hidden = step.hidden
        assert hidden is not None
        for sequence, row, count in step.placed:
            if sequence.index == 0 and not sequence.logprobs:
                self._score_prompt(sequence, hidden, row, count)
            request = sequence.request
            of_prompt = min(sequence.computed + count, len(request.prompt)) - sequence.computed
            if of_prompt > 0:
                self.metrics.tokens["prefill"] += of_prompt
                request.prefilled = max(request.prefilled, sequence.computed + of_prompt)
            sequence.computed += count
            self.scheduler.make_known(sequence)
        if step.draws is not None:
            self._take(*self._drawn(step.ready, step.draws))
            return
        for at in range(0, len(step.ready), LOGIT_ROWS):
            self._extend(step.ready[at : at + LOGIT_ROWS], hidden)

    def _score_prompt(self, sequence: SampledSequence, hidden: torch.Tensor, row: int, count: int) -> None:
        """What the request wants to know of its prompt and the rows [row, row + count) can tell."""
        request = sequence.request
        wanted = request.scores.rows(sequence.computed, count)
        for at in range(wanted.start, wanted.stop, LOGIT_ROWS):
            rows = [row + r - sequence.computed for r in range(at, min(at + LOGIT_ROWS, wanted.stop))]
            table = self.model.log_softmax(self.runner.logits(hidden, rows, [request.weights] * len(rows)))
            request.scores.take(at, table)

    def _extend(self, ready: Sequence[tuple[SampledSequence, int]], hidden: torch.Tensor) -> None:
        """Sample the next token of every ready sequence, and the first one of its siblings."""
        members, source = self._with_siblings(ready)
        logits = self.runner.logits(hidden, [row for _, row in ready], [s.request.weights for s, _ in ready])
        for at in range(0, len(members), LOGIT_ROWS):
            part = members[at : at + LOGIT_ROWS]
            rows = source[at : at + LOGIT_ROWS]
            own = (
                logits
                if rows == list(range(len(logits)))
                else logits[torch.tensor(rows, device=logits.device)]
            )
            params = [s.request.command.params for s in part]
            draws = uniforms([p.seed for p in params], [s.index for s in part], [len(s.tokens) for s in part])
            self._take(part, sample(own, params, draws, max(s.request.command.topk_sample for s in part)))

    def _with_siblings(
        self, ready: Sequence[tuple[SampledSequence, int]]
    ) -> tuple[list[SampledSequence], list[int]]:
        """Ready sequences, each with the siblings that begin now, and which of `ready` each belongs to."""
        members: list[SampledSequence] = []
        source: list[int] = []
        for i, (sequence, _) in enumerate(ready):
            made = [sequence, *self.scheduler.fork(sequence)]
            members += made
            source += [i] * len(made)
        return members, source

    def _drawn(
        self, ready: Sequence[tuple[SampledSequence, int]], draws: Draws
    ) -> tuple[list[SampledSequence], Drawn]:
        """What the step itself has drawn, and for whom."""
        members, _ = self._with_siblings(ready)
        k = max(s.request.command.topk_sample for s in members)
        shown = None
        if k:
            params = [s.request.command.params for s in members]
            shown = likeliest(draws.logits[torch.from_numpy(draws.source)], params, k)
        return members, Drawn(draws.tokens.tolist(), draws.logprobs.tolist(), shown)

    def _take(self, part: Sequence[SampledSequence], drawn: Drawn) -> None:
        """Each sequence's next token."""
        now = time.time()
        self.metrics.tokens["sample"] += len(part)
        for i, (sequence, token, logprob) in enumerate(zip(part, drawn.tokens, drawn.logprobs, strict=True)):
            request = sequence.request
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if "first_token" not in request.times:
                request.times["first_token"] = now
                self.metrics.first_token_seconds.observe(max(0.0, now - request.added))
            shown = request.command.topk_sample
            if shown and drawn.likeliest is not None:
                sequence.topk.append((drawn.likeliest[0][i, :shown], drawn.likeliest[1][i, :shown]))
            if request.command.stream:
                request.answer(piece(sequence))
            self._maybe_finish(sequence)

    # The end of a sequence

    def _maybe_finish(self, sequence: SampledSequence) -> None:
        request = sequence.request
        stopped = request.stop(sequence.tokens, len(request.prompt))
        if not stopped and len(sequence.tokens) - len(request.prompt) < request.limit:
            return
        output = sequence.output
        topk = None
        if sequence.topk:
            topk = TopK(np.stack([t for t, _ in sequence.topk]), np.stack([p for _, p in sequence.topk]))
        request.finished[sequence.index] = Sampled(
            np.array(output, np.int32),
            np.array(sequence.logprobs, np.float32),
            "stop" if stopped else "length",
            topk,
        )
        if request.command.stream:
            request.answer(Piece(sequence.index, None, ended="stop" if stopped else "length"))
        self.scheduler.drop(sequence)
        if len(request.finished) == request.command.num_samples:
            del self.requests[request.command.request]
            request.answer(self._result(request))

    def _fail(self, request: SampleRequest, message: str, category: str) -> None:
        usage = request.usage
        for sequence in list(request.live):
            self.scheduler.drop(sequence)
        if self.requests.pop(request.command.request, None) is not None:
            if category == "user":
                request.answer(Failed(message, "user", usage, request.times))
            else:  # our own fault is nobody's usage
                request.answer(Failed(message, "server"))

    def _result(self, request: SampleRequest) -> Reply:
        command = request.command
        sampled = [request.finished[i] for i in range(command.num_samples)]
        if command.record is not None:
            try:
                record(command.record, command.request, request.prompt, sampled)
            except OSError as error:
                return Failed(
                    f"the sampled sequences could not be recorded: {error.strerror or error}", "server"
                )
        usage = request.usage
        return Done(encode_response(sampled, request.scores.answers(), request.cached), usage, request.times)
