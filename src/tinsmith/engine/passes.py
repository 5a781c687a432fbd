"""What goes into one training pass: blocks of whatever runs have work, in turns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping

from tinsmith.engine.runs import Run
from tinsmith.engine.shares import Shares
from tinsmith.engine.training import TrainingJob, peak_bytes


def fill_pass(
    runs: Mapping[str, Run], turn: deque[str], shares: Shares, rows_limit: int, bytes_limit: int
) -> list[tuple[TrainingJob, int]]:
    """Jobs and the numbers of their blocks: the runs of a share key in `turn`, which moves on, and the keys
    by what they have of the pass for their weight. The first block goes in whatever its size; where it fits
    only with layers computed again, the others may fill up what that leaves."""
    work: list[tuple[TrainingJob, int]] = []
    longest, recomputed = 0, False
    rows: Counter[str] = Counter()
    ahead = {id(job): job.next for run in runs.values() for job in run.jobs}
    lead: TrainingJob | None = None
    turns: dict[str, deque[str]] = {}
    for name in turn:
        run = runs[name]
        if run.jobs and shares.may(run.share.key):
            turns.setdefault(run.share.key, deque()).append(name)
    while turns:
        key = shares.order(turns, rows)[0] if len(turns) > 1 else next(iter(turns))
        name = turns[key].popleft()
        if not turns[key]:
            del turns[key]
        job = next((j for j in runs[name].jobs if ahead[id(j)] < len(j.cuts)), None)
        if job is None or (lead is not None and not _together(lead, job)):
            continue
        cut = job.cuts[ahead[id(job)]]
        total, grown = rows.total() + cut.rows, max(longest, cut.rows)
        backward = not job.forward_only
        if not work:
            recomputed = peak_bytes(job.model, total, grown, backward) > bytes_limit
        if work and (
            total > rows_limit
            or peak_bytes(job.model, total, grown, backward, recomputed=recomputed) > bytes_limit
            or _has_its_part(shares, key, rows, cut.rows, turns)
        ):
            continue
        lead, job.key = lead or job, key
        work.append((job, ahead[id(job)]))
        ahead[id(job)] += 1
        rows[key] += cut.rows
        longest = grown
        turn.remove(name)
        turn.append(name)
        if job.alone:
            break
        if any(ahead[id(each)] < len(each.cuts) for each in runs[name].jobs):
            turns.setdefault(key, deque()).append(name)
    return work


def _together(lead: TrainingJob, job: TrainingJob) -> bool:
    """Whether two jobs may share a pass."""
    return (
        job.model is lead.model
        and job.forward_only == lead.forward_only
        and (not lead.alone or job is lead)
        and (not job.alone or job is lead)
    )


def _has_its_part(
    shares: Shares, key: str, rows: Mapping[str, int], more: int, turns: Collection[str]
) -> bool:
    """Whether with `more` rows a key would have more of a pass, for its weight, than another one that
    has nothing more to add, and waits for the end of the pass."""
    others = [rows[other] / shares.weight(other) for other in rows if other != key and other not in turns]
    return bool(others) and (rows[key] + more) / shares.weight(key) > max(others)
