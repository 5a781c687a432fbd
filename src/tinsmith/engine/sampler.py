"""Continuous batching: every step advances all running sequences, prefills and decodes alike, in one pass.

A sequence is its tokens and how many of them are in the cache. What is missing is computed: one token
while it decodes, more while its prompt (or, after it had to make room, its prompt and output) is
prefilled. That is all the state there is, so joining, leaving, making room and coming back change nothing
about a result.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinsmith.engine import program
from tinsmith.engine.aside import record
from tinsmith.engine.commands import Done, Failed, Piece, Reply, Sample
from tinsmith.engine.generic import CachePool, SampledApart
from tinsmith.engine.kernels import gpu
from tinsmith.engine.kv_cache import PagePool, chain, root
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.model.attention import PAGE, pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import Pass, RecurrentBackend, Segment
from tinsmith.engine.model.vision import Part
from tinsmith.engine.pace import Pace
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.program import Program
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
from tinsmith.engine.sampling import Drawn, StopCheck, sample, uniforms
from tinsmith.engine.shares import Costs, Shares
from tinsmith.engine.states import SampledRecurrence, StatePool
from tinsmith.engine.waiting import Waiting
from tinsmith.wire.sampling import Sampled, TopK, encode_response
from tinsmith.wire.training import ContentError

if TYPE_CHECKING:
    from tinsmith.engine.decoding import Decoder

log = logging.getLogger(__name__)

PREFILL_ROWS = {"cpu": 512, "cuda": 8192}  # prompt tokens of a step
RUNNING = 256  # sequences of a step
LOGIT_ROWS = 256  # rows whose logits exist at a time


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
        self.program: Program | None = None
        self.states: StatePool | CachePool | None = None
        if model.generic:
            self.states = CachePool(model, RUNNING, cache_bytes)
        elif model.mixers:
            self.states = StatePool(model, RUNNING, cache_bytes // 2)
            cache_bytes -= cache_bytes // 2
        self.pool = PagePool(model, cache_bytes)
        self.decoder: Decoder | None = None
        if self.states is None and model.short is None and gpu.takes(model.device, model.dtype):
            from tinsmith.engine.decoding import Decoder  # needs Triton

            self.decoder = Decoder(model, self.pool)
        self.waiting: Waiting[SampledSequence] = Waiting(self.shares)
        self.running: list[SampledSequence] = []
        self.requests: dict[str, SampleRequest] = {}
        self.stuck = False  # whether the last step found nothing that it could compute
        self._costs = Costs()
        self._pace = Pace()

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
        if self.copies and self.decoder is None:
            self.copies = False
            self.model.pack()
            self.program = Program.of(self.model)
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

    def release(self, weights: AdapterWeights) -> None:
        """Forget what the cache knows of an adapter."""
        self.pool.forget_weights(weights.serial)

    # One step

    @torch.inference_mode()
    def step(self) -> bool:
        """Advance everything once. True while there is more to do."""
        self._admit()
        plan = self._plan()
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
        return self.pending > 0

    def _rows_by_key(self, plan: Sequence[tuple[SampledSequence, int]]) -> Counter[str]:
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

    def _admit(self) -> None:
        if not self.waiting:
            return
        counts = Counter(sequence.key for sequence in self.running)
        while self.waiting:
            sequence = self.waiting.head(counts)
            slot: int | None = None
            full = len(self.running) >= RUNNING or (bool(self.running) and not self._room_for(sequence))
            if not full and self.states is not None:
                slot = self.states.allocate()
                full = slot is None
            if full:
                if not self._make_way(sequence.key, counts):
                    return
                continue
            self.waiting.remove(sequence)
            sequence.slot = slot
            request = sequence.request
            if "started" not in request.times:
                request.times["started"] = time.time()
            self._take_known_pages(sequence)
            self.running.append(sequence)
            counts[sequence.key] += 1

    def _make_way(self, key: str, counts: Counter[str]) -> bool:
        """Put off the youngest sequence of another share key that runs more for its weight than `key`
        would with one more. False if there is none."""
        weight = self.shares.weight
        over = [
            other
            for other in counts
            if other != key and (counts[other] - 1) / weight(other) >= (counts[key] + 1) / weight(key)
        ]
        if not over:
            return False
        most = max(over, key=lambda other: counts[other] / weight(other))
        counts[most] -= 1
        self._put_off(next(s for s in reversed(self.running) if s.key == most))
        return True

    def _room_for(self, sequence: SampledSequence) -> bool:
        """Whether its tokens fit beside what runs, with a page to spare for each of those."""
        needed = math.ceil((len(sequence.tokens) + 1) / PAGE)
        return self.pool.used + needed + len(self.running) <= self.pool.capacity

    def _take_known_pages(self, sequence: SampledSequence) -> None:
        """Begin behind the longest prefix that the cache knows. The last token is always computed, and so are
        the rows that score the prompt."""
        sequence.long = self._is_long(sequence)
        sequence.content, sequence.known = root(sequence.request.serial, long=sequence.long), 0
        fresh = not sequence.logprobs
        if self.states is not None:
            return  # what the recurrent layers make of a prefix is not in its pages
        most = len(sequence.tokens) - 1
        if fresh and sequence.index == 0:
            most = min(most, sequence.request.scores.first - 1)
        while (sequence.known + 1) * PAGE <= most:
            content = chain(sequence.content, sequence.page(sequence.known))
            page = self.pool.find(content)
            if page is None:
                break
            sequence.pages.append(page)
            sequence.content, sequence.known = content, sequence.known + 1
        sequence.computed = sequence.known * PAGE
        request = sequence.request
        if fresh and sequence.index == 0 and not request.prefilled:
            # Not when it comes back after it had to make room: then the pages may be its own.
            request.cached = request.prefilled = min(sequence.computed, len(request.prompt))
            self.metrics.tokens["cached_prefill"] += request.cached

    def _plan(self) -> list[tuple[SampledSequence, int]]:
        """(sequence, new tokens) of this step, each with its pages; the youngest make room for the older."""
        budget = PREFILL_ROWS[self.model.device.type]
        if self.decoder is not None and any(map(decodes, self.running)):
            budget = self._pace.rows(budget)  # those who decode wait for it
        budgets = self._prefill_budgets(budget) if self.shares.several else {}
        plan: list[tuple[SampledSequence, int]] = []
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # it has made room
            key = sequence.key
            if not self.shares.may(key):
                continue
            if sequence.long != self._is_long(sequence):
                self._begin_again(sequence)
            missing = self._wanted(sequence)
            count = missing if missing == 1 else min(missing, budget, budgets.get(key, budget))
            if self.states is not None and count < missing:
                continue
            if count == 0:
                continue
            if not self._reserve(sequence, sequence.computed + count):
                continue
            if missing > 1:
                budget -= count
                if key in budgets:
                    budgets[key] -= count
            plan.append((sequence, count))
        return [(s, n) for s, n in plan if s in self.running]

    def _prefill_budgets(self, budget: int) -> dict[str, int]:
        """What each share key may prefill in this step. Recurrent layers take fixed chunks, whole or not at
        all; there the steps themselves are shared out alone."""
        keys = {s.key for s in self.running if self._wanted(s) > 1 and self.shares.may(s.key)}
        if len(keys) < 2 or self.states is not None:
            return {}
        total = sum(self.shares.weight(key) for key in keys)
        return {key: max(1, int(budget * self.shares.weight(key) / total)) for key in keys}

    def _wanted(self, sequence: SampledSequence) -> int:
        """How many of its next tokens a sequence would best compute in one step."""
        missing = len(sequence.tokens) - sequence.computed
        if self.states is None:
            return missing
        # Recurrent layers take one token and many by different formulas, so which way a token goes must not
        # depend on the company: a prompt in fixed chunks, what has been sampled token by token.
        chunk = PREFILL_ROWS[self.model.device.type]
        in_prompt = len(sequence.request.prompt) - sequence.computed
        return min(in_prompt, chunk - sequence.computed % chunk) if in_prompt > 0 else min(missing, 1)

    def _is_long(self, sequence: SampledSequence) -> bool:
        return self.model.short is not None and len(sequence.tokens) > self.model.short

    def _begin_again(self, sequence: SampledSequence) -> None:
        """Compute all of a sequence again: it has become one whose tokens are rotated otherwise."""
        for page in sequence.pages:
            self.pool.free(page)
        sequence.pages, sequence.computed = [], 0
        self._take_known_pages(sequence)

    def _reserve(self, sequence: SampledSequence, tokens: int) -> bool:
        while len(sequence.pages) * PAGE < tokens:
            page = self.pool.allocate()
            if page is not None:
                sequence.pages.append(page)
                continue
            youngest = self.running[-1]
            if youngest is sequence and len(self.running) == 1:
                self._fail(
                    sequence.request,
                    f"the sequence has grown to {tokens} tokens, for which the cache of "
                    f"{self.pool.capacity * PAGE} tokens has no room. Set a smaller max_tokens or "
                    "raise --memory",
                    "user",
                )
                return False
            self._put_off(youngest)
            if youngest is sequence:
                return False
        return True

    def _put_off(self, sequence: SampledSequence) -> None:
        """Free a sequence's pages; it is computed again when there is room."""
        self.metrics.put_off += 1
        self._free(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _free(self, sequence: SampledSequence) -> None:
        for page in sequence.pages:
            self.pool.free(page)
        sequence.pages, sequence.computed, sequence.known = [], 0, 0
        if self.states is not None and sequence.slot is not None:
            self.states.free(sequence.slot)
            sequence.slot = None

    def _advance(self, plan: Sequence[tuple[SampledSequence, int]]) -> None:
        if self.decoder is not None and all(decodes(s) and n == 1 for s, n in plan):
            self._decode(self.decoder, [s for s, _ in plan])
            return
        groups: dict[int, list[tuple[SampledSequence, int]]] = {}
        for sequence, count in plan:
            groups.setdefault(sequence.request.serial, []).append((sequence, count))
        segments: list[Segment] = []
        chunks: list[Chunk] = []
        placed: list[tuple[SampledSequence, int, int]] = []  # sequence, first row, count
        ids: list[int] = []
        positions: list[int] = []
        of_images: list[tuple[int, torch.Tensor]] = []  # row, positions [3, count] of a sequence with images
        images: list[Part] = []
        for members in groups.values():
            start = len(ids)
            for sequence, count in members:
                first = sequence.computed
                chunks.append(Chunk(len(ids), count, first, sequence.pages))
                placed.append((sequence, len(ids), count))
                if sequence.request.expanded is not None:
                    images += sequence.request.expanded.within(len(ids), first, count)
                    of_images.append((len(ids), sequence.request.expanded.places(first, count)))
                ids += sequence.tokens[first : first + count]
                positions += range(first, first + count)
            stop = len(ids)
            if not self.model.mixes_rows:
                _pad(ids, positions)
                stop = len(ids)
            segments.append(Segment(start, stop, members[0][0].request.weights))
        _pad(ids, positions)
        device = self.model.device
        attention = PagedAttention(self.pool, chunks, len(ids))
        recurrent: RecurrentBackend | None = None
        slots = [sequence.slot for sequence, _, _ in placed if sequence.slot is not None]
        if isinstance(self.states, StatePool):
            recurrent = SampledRecurrence(self.states, segments, list(zip(chunks, slots, strict=True)))
        elif self.states is not None:
            recurrent = SampledApart(self.states, segments, list(zip(chunks, slots, strict=True)))
        places = torch.tensor(positions)
        if of_images:
            places = places.repeat(3, 1)
            for row, own in of_images:
                places[:, row : row + own.shape[1]] = own
        visual = self.model.vision.visual(images) if self.model.vision is not None else None
        if self.program is not None and visual is None and not of_images and len(ids) <= program.ROWS:
            hidden = self.program.run(torch.tensor(ids), places, segments, attention, segments[-1].stop)
        else:
            this = Pass(segments, attention, recurrent)
            spans = [(row, count, len(sequence.tokens)) for sequence, row, count in placed]
            this.long = self.model.long_rows(spans, len(ids))
            hidden = self.model.hidden(torch.tensor(ids, device=device), places.to(device), this, visual)
        ready: list[tuple[SampledSequence, int]] = []
        for sequence, row, count in placed:
            if sequence.index == 0 and not sequence.logprobs:
                self._score_prompt(sequence, hidden, row, count)
            request = sequence.request
            of_prompt = min(sequence.computed + count, len(request.prompt)) - sequence.computed
            self.metrics.tokens["prefill"] += max(of_prompt, 0)
            sequence.computed += count
            request.prefilled = max(request.prefilled, min(sequence.computed, len(request.prompt)))
            self._make_known(sequence)
            if sequence.computed == len(sequence.tokens):
                ready.append((sequence, row + count - 1))
        for at in range(0, len(ready), LOGIT_ROWS):
            self._extend(ready[at : at + LOGIT_ROWS], hidden)

    def _make_known(self, sequence: SampledSequence) -> None:
        while (sequence.known + 1) * PAGE <= sequence.computed:
            sequence.content = chain(sequence.content, sequence.page(sequence.known))
            self.pool.remember(sequence.pages[sequence.known], sequence.content, sequence.request.serial)
            sequence.known += 1

    def _score_prompt(self, sequence: SampledSequence, hidden: torch.Tensor, row: int, count: int) -> None:
        """What the request wants to know of its prompt and the rows [row, row + count) can tell."""
        request = sequence.request
        wanted = request.scores.rows(sequence.computed, count)
        for at in range(wanted.start, wanted.stop, LOGIT_ROWS):
            rows = [row + r - sequence.computed for r in range(at, min(at + LOGIT_ROWS, wanted.stop))]
            table = self.model.log_softmax(self._logits(hidden, rows, [request.weights] * len(rows)))
            request.scores.take(at, table)

    def _logits(
        self, hidden: torch.Tensor, rows: Sequence[int], weights: Sequence[AdapterWeights | None]
    ) -> torch.Tensor:
        """Logits of some rows; rows of one adapter stand together."""
        index: list[int] = []
        keep: list[int] = []
        segments: list[Segment] = []
        at = 0
        for _, group in itertools.groupby(zip(rows, weights, strict=True), key=lambda pair: id(pair[1])):
            members = [row for row, _ in group]
            keep += range(len(index), len(index) + len(members))
            start = len(index)
            index += members
            if not self.model.mixes_rows:
                _pad(index)
            segments.append(Segment(start, len(index), weights[at]))
            at += len(members)
        _pad(index)
        logits = self.model.logits(hidden[torch.tensor(index, device=hidden.device)], Pass(segments))
        return logits if len(keep) == len(index) else logits[torch.tensor(keep, device=logits.device)]

    def _extend(self, ready: Sequence[tuple[SampledSequence, int]], hidden: torch.Tensor) -> None:
        """Sample the next token of every ready sequence, and the first one of its siblings."""
        source: list[int] = []  # for each sequence, the row of `logits` that it samples from
        members: list[SampledSequence] = []
        for i, (sequence, _) in enumerate(ready):
            members.append(sequence)
            source.append(i)
            for sibling in self._siblings(sequence):
                members.append(sibling)
                source.append(i)
        logits = self._logits(hidden, [row for _, row in ready], [s.request.weights for s, _ in ready])
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

    def _decode(self, decoder: Decoder, sequences: Sequence[SampledSequence]) -> None:
        """A step of single tokens, each of which is drawn at once."""
        from tinsmith.engine.decoding import Row

        part = sorted(sequences, key=lambda s: s.request.serial)  # adapters' rows together
        commands = [s.request.command for s in part]
        draws = uniforms(
            [c.params.seed for c in commands], [s.index for s in part], [len(s.tokens) for s in part]
        )
        rows = [
            Row(s.tokens[-1], s.computed, s.pages, s.request.weights, c.params, float(u), c.topk_sample)
            for s, c, u in zip(part, commands, draws, strict=True)
        ]
        drawn = decoder.run(rows)
        for sequence in part:
            sequence.computed += 1
            self._make_known(sequence)
        self._take(part, drawn)

    def _siblings(self, sequence: SampledSequence) -> list[SampledSequence]:
        """The other samples of a request whose prompt has just been computed: they share its pages."""
        request = sequence.request
        if sequence.index or sequence.logprobs or request.command.num_samples == 1:
            return []
        full, rest = divmod(len(request.prompt), PAGE)
        made: list[SampledSequence] = []
        for index in range(1, request.command.num_samples):
            sibling = SampledSequence(request, index, list(request.prompt))
            request.live.append(sibling)
            made.append(sibling)
            if len(self.running) >= RUNNING or not self._share_state(sequence, sibling):
                self.waiting.append(sibling)  # comes back behind the pages that the cache knows
                continue
            sibling.pages = sequence.pages[:full]
            for page in sibling.pages:
                self.pool.share(page)
            sibling.known, sibling.content, sibling.computed = full, sequence.content, full * PAGE
            sibling.long = sequence.long
            if rest and (copied := self.pool.allocate()) is not None:
                self.pool.copy(sequence.pages[full], copied)
                sibling.pages.append(copied)
                sibling.computed = len(request.prompt)
            if self.states is not None and sibling.computed < len(request.prompt):
                self._free(sibling)  # its state is that behind the whole prompt
                self.waiting.append(sibling)
                continue
            self.running.append(sibling)
        return made

    def _share_state(self, sequence: SampledSequence, sibling: SampledSequence) -> bool:
        """Give a sibling its copy of the recurrent layers' states, if there is room for one."""
        if self.states is None:
            return True
        sibling.slot = self.states.allocate()
        if sibling.slot is None or sequence.slot is None:
            return False
        self.states.copy(sequence.slot, sibling.slot)
        return True

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
        self._drop(sequence)
        if len(request.finished) == request.command.num_samples:
            del self.requests[request.command.request]
            request.answer(self._result(request))

    def _drop(self, sequence: SampledSequence) -> None:
        self._free(sequence)
        sequence.request.live.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _fail(self, request: SampleRequest, message: str, category: str) -> None:
        usage = request.usage
        for sequence in list(request.live):
            self._drop(sequence)
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


def _pad(*rows: list[int]) -> None:
    """Fill up to a number of rows that changes no bit of a product."""
    for values in rows:
        values += [0] * (pad_rows(len(values)) - len(values))
