"""Whose turn it is on the device: training's, or sampling's.

While samples run, training works in turns: one pass, or commands for PIECE_SECONDS; then sampling goes on for
as long as that took. Between share keys a turn is shorter than that: a pass stands still between two of its
layers where samples of a key that lacks time are waiting, and is not begun in the moment before a key comes
back that would have to wait for all of it.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Mapping

from tinsmith.engine.rounds import Rounds
from tinsmith.engine.sampler import Sampler

PIECE_SECONDS = 0.05  # of commands between two sampling steps, but for what the last of them takes
RECENT = 0.5  # seconds after the last sampling step for which turns stay short

Intake = Callable[[float], bool]
"""Submits the commands that have come; waits up to so many seconds where there is none. Whether there was."""


class Turns:
    """Training and sampling of one engine, one after the other."""

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        rounds: Rounds,
        carry_out: Callable[[float], tuple[bool, bool]],
        device: str,
        now: Callable[[], float],
    ) -> None:
        """carry_out: carries out what is due of all runs' commands until a time, and says whether there were
        any, and whether that was more than making jobs of a few requests; device: "cpu" or "cuda"."""
        self.samplers, self.rounds, self.shares, self.now = samplers, rounds, rounds.shares, now
        self.intake: Intake = lambda seconds: False
        # On a GPU a pass is a piece of 50 ms at most, and this process is far ahead of it.
        self.interrupts = device == "cpu"
        rounds.between = self._between if self.interrupts else None
        self._carry_out = carry_out
        self._stood = 0.0  # seconds that this turn's pass stood still
        self._sampled = -math.inf  # when the last sampling step ended
        self._passes_next = False  # whether training's last turn was one of commands

    def take(self) -> bool:
        """A turn of training, and sampling for as long as that took. Whether anything was done."""
        self._stood, started = 0.0, self.now()
        trained = self._train()
        return self._sample_for(self.now() - started - self._stood) or trained

    def _between(self, may_go_on: Callable[[], bool]) -> None:
        """Between two layers of a pass: take what has come, and sample for those who lack time until somebody
        in the pass may go on."""
        self.intake(0.0)
        started, sampled = self.now(), True
        while sampled and not may_go_on():
            sampled = False
            for sampler in [each for each in self.samplers.values() if each.pending]:
                # In a context of its own: what is set there is about the pass.
                contextvars.Context().run(sampler.step)
                sampled |= not sampler.stuck
        self._stood += self.now() - started

    def _pass(self, short: bool) -> bool:
        """A pass of training, or a moment of waiting for a key that is about to come back and would have to
        wait for all of it. Whether there was either."""
        if self.shares.several or not any(run.jobs for run in self.rounds.residents.runs.values()):
            return self.rounds.run(short)
        if (seconds := self.shares.expects()) > 0:
            started = self.now()
            while not self.shares.several and (left := started + seconds - self.now()) > 0:
                if not self.intake(left):
                    break
            self.shares.idle(self.now() - started)
            if self.shares.several:
                return True
        return self.rounds.run(short)

    def _sample_for(self, seconds: float) -> bool:
        """Sampling steps of all models in turns, one at least of each. Whether there was any."""
        done, started = False, self.now()
        working = [sampler for sampler in self.samplers.values() if sampler.pending]
        while working:
            for sampler in working:
                sampler.step()
                done |= not sampler.stuck
            self._sampled = self.now()
            working = [sampler for sampler in working if sampler.pending and not sampler.stuck]
            if self._sampled - started >= seconds:
                break
        return done

    def _train(self) -> bool:
        """All commands that are due, and a pass. While samples run, it is commands or a pass, in turns where
        there is work for both, so that no decode step waits for more than one. Whether there was anything."""
        short = self._sampling()
        if short and self._passes_next and self._pass(short):
            self._passes_next = False
            return True
        done, heavy = self._carry_out(self.now() + PIECE_SECONDS if short else math.inf)
        self._passes_next = heavy
        if short and heavy:
            return True
        return self._pass(short) or done

    def _sampling(self) -> bool:
        """Whether samples run, or did a moment ago: who asks for one after the other is back soon."""
        if any(sampler.pending for sampler in self.samplers.values()):
            return True
        return self.now() - self._sampled < RECENT
