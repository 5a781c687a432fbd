"""Runs and snapshots, under one bound of memory: what was used longest ago is put away and comes back when it
is needed, bit for bit."""

from __future__ import annotations

import logging
import uuid
from collections import deque
from pathlib import Path

from tinsmith.engine import adapter_files
from tinsmith.engine.adapter_files import FolderError
from tinsmith.engine.memory import Budget
from tinsmith.engine.runs import Run
from tinsmith.engine.snapshots import Snapshots

log = logging.getLogger(__name__)


class Residents:
    """`turn` has the names of the runs, the one served longest ago first; `clock` counts commands and steps,
    and tells when each was last needed."""

    def __init__(self, budget: Budget, spill_dir: Path) -> None:
        _clear(spill_dir)
        self.budget = budget
        self.runs: dict[str, Run] = {}
        self.snapshots = Snapshots(spill_dir)
        self.turn: deque[str] = deque()
        self.clock = 0

    def add(self, run: Run) -> None:
        """A new run; others make room for it."""
        run.used = self.clock
        self.runs[run.name] = run
        self.turn.append(run.name)
        self.make_room()

    def release(self, run: Run) -> None:
        """Forget a run."""
        self.drop_spill(run)
        del self.runs[run.name]
        self.turn.remove(run.name)

    def served(self, run: Run) -> None:
        """A run has had its turn: it goes behind the others."""
        if run.name in self.runs:
            self.turn.remove(run.name)
            self.turn.append(run.name)

    @property
    def nbytes(self) -> int:
        """Resident bytes of runs and snapshots; weights that several share count once."""
        states = sum(r.state.nbytes for r in self.runs.values() if r.state is not None)
        shared = {id(w): w.nbytes for r in self.runs.values() if (w := r.made_weights) is not None}
        shared |= {id(w): w.nbytes for s in self.snapshots.entries.values() if (w := s.weights) is not None}
        return states + sum(shared.values())

    def make_room(self, keep: str | None = None) -> None:
        """Put away what was used longest ago until runs and snapshots are within their bound."""
        if self.nbytes <= self.budget.adapters:
            return
        idle_runs = [
            (r.used, r.name, True)
            for r in self.runs.values()
            if r.state is not None and not r.busy and r.name != keep
        ]
        snapshots = [
            (s.used, name, False)
            for name, s in self.snapshots.entries.items()
            if s.weights is not None and name != keep
        ]
        for _, name, is_run in sorted(idle_runs + snapshots):
            try:
                if is_run:
                    self.put_away(self.runs[name])
                else:
                    self.snapshots.evict(name)
            except (FolderError, OSError) as error:
                log.warning("%s could not be put away: %s", name, error)
            if self.nbytes <= self.budget.adapters:
                return

    def put_away(self, run: Run) -> None:
        """Write a run whole into a folder and let it leave memory. The folder is of no use after the engine's
        death, and so need not be on the disk. Raises FolderError."""
        path = str(self.snapshots.spill_dir / f"run-{uuid.uuid4().hex}")
        adapter_files.write(
            path, run.model, run.layout, run.live, optimizer=run.optimizer, gradients=True, durable=False
        )
        run.spilled = path
        run.replace(None)

    def bring_back(self, run: Run) -> None:
        """Read a run that was put away; others make room for it. Raises FolderError."""
        if run.state is None and run.spilled is not None:
            run.replace(
                adapter_files.read(run.spilled, run.layout, run.model.device, optimizer=True, gradients=True)
            )
            self.drop_spill(run)
            self.make_room(keep=run.name)

    def drop_spill(self, run: Run) -> None:
        """Delete what a run was put away in, if there is anything."""
        if run.spilled is not None:
            adapter_files.remove(run.spilled)
            run.spilled = None


def _clear(spill_dir: Path) -> None:
    """Delete what an engine that died had put away: it is of no use to anyone."""
    for left in spill_dir.glob("run-*"):
        adapter_files.remove(str(left))
    for left in spill_dir.glob("sampler-*.safetensors"):
        left.unlink(missing_ok=True)
