"""What a sampling request wants to know of its prompt: logprobs of its own tokens, of the most likely ones,
of ids that the request names, and tokens drawn in their places.

Prompt position p is scored by row p - 1, which has seen what is before it; position 0 has no such row.
Everything is of one row alone, so chunks, company and being computed again change nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinsmith.engine.commands import Sample
from tinsmith.engine.sampling import draw, top, uniforms
from tinsmith.wire.sampling import (
    EMPTY_LOGPROB,
    EMPTY_TOKEN,
    PromptAnswers,
    TargetLogprobs,
    TopK,
)
from tinsmith.wire.targets import PromptTargets
from tinsmith.wire.training import ContentError

MOST_CELLS = 1 << 22  # token ids or logprobs that a request may ask of its prompt, of each kind
DRAWS = 1 << 32  # prompt draws take this and the following numbers in the place of a sample's


class PromptScores:
    """Filled position by position while the prompt is computed. `first` is the first position that is scored,
    the prompt's length where none is: what is before it may come out of the prefix cache."""

    def __init__(self, command: Sample, prompt: list[int], vocab: int) -> None:
        """Raises ContentError, naming the field."""
        self.command = command
        self.prompt = np.array(prompt, np.int64)
        n = len(prompt)
        _check_width("topk_prompt_logprobs", command.topk_prompt, n, vocab)
        _check_width("prompt_alt_tokens_k", command.alt_tokens, n, None)
        self._own = _first_own(command, n)
        self._targets = _Targets(command.targets, n, vocab) if command.targets is not None else None
        self._logprobs = np.full(n, np.nan, np.float32) if command.prompt_logprobs else None
        k = command.topk_prompt
        self._topk = (
            TopK(np.full((n, k), EMPTY_TOKEN, np.int32), np.full((n, k), EMPTY_LOGPROB, np.float32))
            if k
            else None
        )
        k = command.alt_tokens
        self._drawn = TopK(np.zeros((n - 1, k), np.int64), np.zeros((n - 1, k), np.float32)) if k else None
        self.first = min(
            self._own if command.prompt_logprobs or command.topk_prompt else n,
            self._targets.first if self._targets is not None else n,
            1 if command.alt_tokens else n,
        )

    def rows(self, computed: int, count: int) -> range:
        """Which of the rows [computed, computed + count) score a position."""
        return range(max(computed, self.first - 1), min(computed + count, len(self.prompt) - 1))

    def take(self, row: int, table: Tensor) -> None:
        """`table`: log-probabilities at temperature 1, fp32 [n, vocab], of the rows from `row` on."""
        position = row + 1
        own = slice(max(position, self._own), position + len(table))
        if own.start < own.stop:
            mine = table[own.start - position :]
            if self._logprobs is not None:
                chosen = torch.from_numpy(self.prompt[own]).to(table.device)[:, None]
                self._logprobs[own] = mine.gather(1, chosen)[:, 0].cpu().numpy()
            if self._topk is not None:
                self._topk.token_ids[own], self._topk.logprobs[own] = top(mine, self.command.topk_prompt)
        if self._targets is not None:
            self._targets.take(position, table)
        if self._drawn is not None:
            self._draw(row, table)

    def _draw(self, row: int, table: Tensor) -> None:
        """k tokens for each row, at the request's temperature, by numbers that no sample uses."""
        assert self._drawn is not None
        params, (n, k) = self.command.params, (len(table), self.command.alt_tokens)
        if params.temperature == 0:
            chosen = table.argmax(-1, keepdim=True).expand(n, k)
        else:
            draws, positions = np.tile(np.arange(k) + DRAWS, n), np.repeat(np.arange(n) + row + 1, k)
            numbers = uniforms([params.seed] * (n * k), draws, positions)
            p = torch.softmax(table / params.temperature, -1).double()
            chosen = draw(p, torch.from_numpy(numbers.reshape(n, k)).to(table.device))
        rows = slice(row, row + n)
        self._drawn.token_ids[rows] = chosen.cpu().numpy()
        self._drawn.logprobs[rows] = table.gather(1, chosen).cpu().numpy()

    def answers(self) -> PromptAnswers:
        return PromptAnswers(
            self._logprobs,
            self._topk,
            self._targets.answer() if self._targets is not None else None,
            self._drawn,
        )


class _Targets:
    """The cells of a [length - 1, K] matrix of token ids that name one, in the order of their rows."""

    def __init__(self, wanted: PromptTargets, length: int, vocab: int) -> None:
        self._wanted = wanted
        if wanted.rows != length - 1:
            raise ContentError(
                f"target_prompt_logprobs has {wanted.rows} rows; it must have {length - 1}, one less than "
                f"the prompt's {length} tokens, for the first of which there is no logprob"
            )
        if length * max(wanted.columns, 1) > MOST_CELLS and wanted.crow is None:
            raise _too_many("target_prompt_logprobs", wanted.columns, length)
        ids = np.frombuffer(wanted.ids, np.int64)
        if wanted.crow is None:
            rows = np.repeat(np.arange(wanted.rows), wanted.columns)
        else:
            crow: npt.NDArray[np.int64] = np.frombuffer(wanted.crow, np.int64)
            rows = np.repeat(np.arange(wanted.rows), crow[1:] - crow[:-1])
        if ids.size > MOST_CELLS:
            raise _too_many("target_prompt_logprobs", wanted.columns, length)
        outside = (ids < -1) | (ids >= vocab)
        if outside.any():
            raise ContentError(
                f"target_prompt_logprobs contains {ids[outside][0]}; the vocabulary has ids 0 to "
                f"{vocab - 1}, and -1 asks for nothing"
            )
        self._cells = np.flatnonzero(ids >= 0)
        if not self._cells.size:
            raise ContentError("target_prompt_logprobs names no token id; name at least one, or leave it out")
        self._rows, self._ids = rows[self._cells], ids[self._cells]
        self._values = np.zeros(ids.size, np.float32)
        self.first = int(self._rows[0]) + 1

    def take(self, position: int, table: Tensor) -> None:
        start, stop = np.searchsorted(self._rows, [position - 1, position - 1 + len(table)])
        if start == stop:
            return
        rows = torch.from_numpy(self._rows[start:stop] - (position - 1)).to(table.device)
        ids = torch.from_numpy(self._ids[start:stop]).to(table.device)
        self._values[self._cells[start:stop]] = table[rows, ids].cpu().numpy()

    def answer(self) -> TargetLogprobs:
        wanted = self._wanted
        return TargetLogprobs(self._values, (wanted.rows, wanted.columns), wanted.crow, wanted.col)


def _first_own(command: Sample, length: int) -> int:
    """The first position of which the prompt's own logprob is wanted."""
    last = command.prompt_logprobs_last_n
    if last is None:
        return 1
    if not command.prompt_logprobs:
        raise ContentError("prompt_logprobs_last_n goes with prompt_logprobs; ask for those too")
    if not 1 <= last <= length - 1:
        raise ContentError(
            f"prompt_logprobs_last_n is {last}; it must be from 1 to {length - 1}, one less than the "
            f"prompt's {length} tokens"
        )
    return length - last


def _check_width(name: str, k: int, length: int, vocab: int | None) -> None:
    most = MOST_CELLS // length
    if vocab is not None:
        most = min(most, vocab)
    if not 0 <= k <= most:
        raise ContentError(f"{name} is {k}; for a prompt of {length} tokens it must be from 0 to {most}")


def _too_many(name: str, columns: int, length: int) -> ContentError:
    return ContentError(
        f"{name} has {columns} columns for a prompt of {length} tokens; at most {MOST_CELLS} cells are "
        "allowed"
    )
