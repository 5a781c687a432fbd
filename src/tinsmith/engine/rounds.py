"""Rounds of training: forward_backwards become jobs, a pass takes blocks of whatever runs have work, and
finished jobs are answered in order."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from tinsmith.engine.aside import Aside
from tinsmith.engine.commands import Done, Failed, ForwardBackward
from tinsmith.engine.failures import failed, text
from tinsmith.engine.metrics import Metrics
from tinsmith.engine.pace import Pace
from tinsmith.engine.passes import fill_pass
from tinsmith.engine.residents import Residents
from tinsmith.engine.runs import Answer, Run
from tinsmith.engine.shares import Costs, Shares
from tinsmith.engine.training import TrainingJob, peak_bytes, run_pass
from tinsmith.wire.training import ContentError, decode_request

log = logging.getLogger(__name__)

BODY_LIMIT = 256 << 20  # bytes of a decompressed forward_backward body
PASS_ROWS = {"cpu": 4096, "cuda": 32768}  # rows of a training pass
# The same while samples or several share keys are running; on a GPU at most, see pace.py.
SHARED_PASS_ROWS = {"cpu": 512, "cuda": 8192}
PIECE = 0.004  # seconds of a pass before others may have a turn within it


class Rounds:
    """All training passes of an engine."""

    def __init__(
        self,
        residents: Residents,
        shares: Shares,
        metrics: Metrics,
        device: str,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """device: its type, "cpu" or "cuda"; now: the clock that passes are timed by, in seconds."""
        self.residents, self.shares, self.metrics, self.device = residents, shares, metrics, device
        self.now = now
        self.between: Callable[[Callable[[], bool]], None] | None = None
        self._costs = {False: Costs(), True: Costs()}  # by forward_only
        self._pace = Pace()

    def start(self, run: Run, command: ForwardBackward, answer: Answer) -> None:
        """Check a request and make it a job of its run; one that is wrong is answered at once."""
        try:
            request = decode_request(command.body, command.encoding, BODY_LIMIT)
            self.residents.bring_back(run)
            aside = Aside(command.aside, command.arrived_at)
            job = TrainingJob(request, run.model, run.layout, run.weights, aside)
            self._fits(job)
        except Exception as error:
            answer(failed(f"forward_backward {command.seq_id} of run {run.name}", error))
        else:
            job.answer = answer
            run.jobs.append(job)

    def _fits(self, job: TrainingJob) -> None:
        """Refuse a sequence whose pass would not fit by itself."""
        for index, sequence in enumerate(job.sequences):
            length = sequence.tokens.numel()
            need = peak_bytes(job.model, length, length, not job.forward_only, recomputed=True)
            have = self.residents.budget.passes
            if need > have:
                raise ContentError(
                    f"data[{index}] has {length} tokens, for which a pass needs about {need} bytes; this "
                    f"server has {have} for it. Send a shorter sequence or raise --memory"
                )

    def run(self, busy: bool) -> bool:
        """One pass over blocks of the runs that have work, in turns; a short one while samplers are `busy`.
        False if there was none."""
        residents = self.residents
        short = busy or self.shares.contended
        limit = (SHARED_PASS_ROWS if short else PASS_ROWS)[self.device]
        if short and self.device == "cuda":
            limit = self._pace.rows(limit)
        work = fill_pass(residents.runs, residents.turn, self.shares, limit, residents.budget.passes)
        if not work:
            return False
        jobs = list({id(job): job for job, _ in work}.values())
        rows: Counter[str] = Counter()
        for job, index in work:
            rows[job.key] += job.cuts[index].rows
        costs = self._costs[jobs[0].forward_only]
        bill = _Bill(self, costs, rows)
        broken = False
        for job in jobs:
            job.started = job.started or time.time()
        try:
            cuts = [(job, job.cuts[index]) for job, index in work]
            run_pass(cuts, residents.budget.passes, bill.pause if self.between is not None else None)
        except Exception as error:
            self._pass_failed(jobs, error)
            broken = True
        else:
            for job, index in work:
                job.next = index + 1
        seconds = bill.close()
        costs.observe(rows.total(), seconds)
        if not jobs[0].forward_only and not broken:
            self._pace.observe(rows.total(), seconds)
        self.metrics.train_pass_seconds.observe(seconds)
        self.metrics.train_pass_fill.observe(rows.total() / limit)
        for run in residents.runs.values():
            self._finish(run)
        return True

    def _pass_failed(self, jobs: list[TrainingJob], error: Exception) -> None:
        """A pass changed nothing but its own jobs: start them anew, each alone. One that was has failed."""
        if len(jobs) == 1 and jobs[0].alone:
            log.error("a training pass failed", exc_info=error)
            jobs[0].failure = f"forward_backward failed: {text(error)}. Nothing was accumulated"
            return
        log.warning("a training pass of %d requests failed, trying each alone: %s", len(jobs), text(error))
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
                run.accumulate(job.gradients, job.norm)
                self.residents.make_room(keep=run.name)
            self.metrics.tokens["train"] += job.tokens
            job.answer(Done(payload, {"train": job.tokens}, {"started": job.started}))


class _Bill:
    """What a pass costs the share keys in it, charged a part at a time: it may pause between its layers."""

    def __init__(self, rounds: Rounds, costs: Costs, rows: Mapping[str, int]) -> None:
        self._rounds, self._rows = rounds, rows
        self._since, self._seconds = rounds.now(), 0.0
        whole = sum(rows.values())
        known = costs.seconds(whole)
        self._parts = {
            key: costs.estimate(own, whole, known) / known if known else own / whole
            for key, own in rows.items()
        }

    def pause(self) -> None:
        """Let others work who lack time, for as long as nobody in this pass may."""
        rounds = self._rounds
        if rounds.now() - self._since < PIECE:
            return
        assert rounds.between is not None
        self._charge()
        rounds.between(lambda: any(map(rounds.shares.may, self._rows)))
        self._since = rounds.now()

    def close(self) -> float:
        """Charge the rest; returns the seconds of all parts."""
        self._charge()
        return self._seconds

    def _charge(self) -> None:
        seconds = self._rounds.now() - self._since
        self._seconds += seconds
        self._rounds.shares.charge(seconds, {key: seconds * part for key, part in self._parts.items()})
