"""Which sequences run, what each computes in the next step, and the cache's pages that they hold.

A sequence that runs has all the pages of what it has computed. Where pages or places are short, the youngest
makes room: it gives back its pages and waits, to be computed again. Between share keys, those that run more
for their weight make room for those that run less.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from tinsmith.engine.generic import CachePool
from tinsmith.engine.kv_cache import PagePool, chain, root
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.model.attention import PAGE
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.sample_requests import SampledSequence, siblings
from tinsmith.engine.shares import Shares
from tinsmith.engine.states import StatePool
from tinsmith.engine.waiting import Waiting

PREFILL_ROWS = {"cpu": 512, "cuda": 8192}  # prompt tokens of a step
RUNNING = 256  # sequences of a step

Plan = list[tuple[SampledSequence, int]]
"""The sequences of a step, and how many new tokens of each it computes."""


class SampleScheduler:
    """Admission, the plan of each step, and making room."""

    def __init__(
        self,
        model: BaseModel,
        pool: PagePool,
        states: StatePool | CachePool | None,
        shares: Shares,
        metrics: Metrics,
        outgrown: Callable[[SampledSequence, str], None],
    ) -> None:
        """outgrown: told of a sequence that has more tokens than the cache has room for, and why."""
        self.model, self.pool, self.states = model, pool, states
        self.shares, self.metrics = shares, metrics
        self.waiting: Waiting[SampledSequence] = Waiting(shares)
        self.running: list[SampledSequence] = []
        self.epoch = 0  # how often something was taken off a sequence that it had
        self._outgrown = outgrown
        self._turns = 0  # places in steps that were given so far
        self._gone = 0  # sequences that have left `running`

    # Admission

    def admit(self) -> None:
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
        self.put_off(next(s for s in reversed(self.running) if s.key == most))
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

    # The plan of a step

    def plan(self, budget: int, most: int | None = None) -> Plan:
        """This step's sequences and up to `budget` prompt tokens, all with their pages; the youngest make
        room for the older. Of more than `most` tokens in all each share key has its part, and of its
        sequences those go first that have waited longest."""
        may = {key: self.shares.may(key) for key in {s.key for s in self.running}}
        running = [s for s in self.running if may[s.key]]
        prompts = self._prefill_budgets(running, budget) if len(may) > 1 else {}
        parts = self._parts(running, budget, most)
        if parts:
            running.sort(key=lambda s: s.advanced)
        plan: Plan = []
        gone = self._gone
        for sequence in running:
            if self._gone != gone and sequence not in self.running:
                continue  # it has made room
            key = sequence.key
            if parts and parts[key] <= 0:
                continue
            if sequence.long != self._is_long(sequence):
                self._begin_again(sequence)
            missing = count = self._wanted(sequence)
            if missing > 1:
                count = min(missing, budget, prompts.get(key, budget))
            if self.states is not None:
                if count < missing:
                    continue  # taken whole or not at all, and so by itself at least
            elif parts:
                count = min(count, parts[key])
            if count == 0:
                continue
            if not self._reserve(sequence, sequence.computed + count):
                continue
            if missing > 1:
                budget -= count
                if key in prompts:
                    prompts[key] -= count
            if parts:
                parts[key] -= count
            self._turns += 1
            sequence.advanced = self._turns
            plan.append((sequence, count))
        return plan if self._gone == gone else [(s, n) for s, n in plan if s in self.running]

    def _prefill_budgets(self, running: list[SampledSequence], budget: int) -> dict[str, int]:
        """What each share key may prefill in this step. Recurrent layers take fixed chunks, whole or not at
        all; there the steps themselves are shared out alone."""
        if self.states is not None:
            return {}
        keys = {s.key for s in running if self._wanted(s) > 1}
        if len(keys) < 2:
            return {}
        total = sum(self.shares.weight(key) for key in keys)
        return {key: max(1, int(budget * self.shares.weight(key) / total)) for key in keys}

    def _parts(self, running: list[SampledSequence], budget: int, most: int | None) -> dict[str, int]:
        """What each share key may compute in this step, prompts or not; nothing where all has room."""
        if most is None:
            return {}
        wanted = Counter[str]()
        for sequence in running:
            wanted[sequence.key] += min(self._wanted(sequence), budget)
        return self.shares.parts(most, wanted) if wanted.total() > most else {}

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
        self.epoch += 1
        for page in sequence.pages:
            self.pool.free(page)
        sequence.pages, sequence.computed = [], 0
        self._take_known_pages(sequence)

    # Pages

    def _reserve(self, sequence: SampledSequence, tokens: int) -> bool:
        while len(sequence.pages) * PAGE < tokens:
            page = self.pool.allocate()
            if page is not None:
                sequence.pages.append(page)
                continue
            youngest = self.running[-1]
            if youngest is sequence and len(self.running) == 1:
                self._outgrown(
                    sequence,
                    f"the sequence has grown to {tokens} tokens, for which the cache of "
                    f"{self.pool.capacity * PAGE} tokens has no room. Set a smaller max_tokens or "
                    "raise --memory",
                )
                return False
            self.put_off(youngest)
            if youngest is sequence:
                return False
        return True

    def put_off(self, sequence: SampledSequence) -> None:
        """Free a sequence's pages; it is computed again when there is room."""
        self.metrics.put_off += 1
        self._free(sequence)
        self.running.remove(sequence)
        self._gone += 1
        self.waiting.appendleft(sequence)

    def _free(self, sequence: SampledSequence) -> None:
        self.epoch += 1
        for page in sequence.pages:
            self.pool.free(page)
        sequence.pages, sequence.computed, sequence.known = [], 0, 0
        if self.states is not None and sequence.slot is not None:
            self.states.free(sequence.slot)
            sequence.slot = None

    def make_known(self, sequence: SampledSequence) -> None:
        """Say what is in the pages that a step has filled."""
        while (sequence.known + 1) * PAGE <= sequence.computed:
            sequence.content = chain(sequence.content, sequence.page(sequence.known))
            self.pool.remember(sequence.pages[sequence.known], sequence.content, sequence.request.serial)
            sequence.known += 1

    def fork(self, sequence: SampledSequence) -> list[SampledSequence]:
        """The other samples of a request whose prompt has just been computed: they begin on its pages."""
        request = sequence.request
        full, rest = divmod(len(request.prompt), PAGE)
        made: list[SampledSequence] = []
        for index in siblings(sequence):
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

    def drop(self, sequence: SampledSequence) -> None:
        """Forget a sequence that has ended."""
        self._free(sequence)
        sequence.request.live.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self._gone += 1
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
