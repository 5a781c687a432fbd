"""Provenance spans: whether they can be, and whether they tell the truth.

Every loss takes datums with spans, and checks that they cover their fields. What they claim is checked
against what was recorded when the sequences were sampled, for the loss that builds on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinsmith.engine.aside import Aside, Recorded
from tinsmith.wire.provenance import Span
from tinsmith.wire.training import Array, ContentError, Datum


def check_spans(datum: Datum, where: str, targets: int) -> None:
    """That the spans, if there are any, cover model_input and `targets` positions. Raises ContentError."""
    if not datum.input_spans and not datum.target_spans:
        return
    for name, spans, length, field in (
        ("model_input_spans", datum.input_spans, datum.tokens.size, "model_input"),
        ("loss_fn_input_spans", datum.target_spans, targets, "target_tokens"),
    ):
        for i, span in enumerate(spans):
            if not span.sequence_id or span.offset < 0 or span.length < 0:
                raise ContentError(
                    f"{where}.{name}[{i}] must have a sequence_id, and an offset and a length of at least 0"
                )
        covered = sum(span.length for span in spans)
        if covered != length:
            raise ContentError(
                f"{where}.{name} cover {covered} positions; they must cover all {length} of {field}, one "
                "after the other"
            )


def sampled_targets(
    datum: Datum, targets: Array, where: str, aside: Aside
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Which of the targets [N] are sampled tokens, and the logprobs that they were sampled with, else 0.

    Sampled tokens, of the input and of the targets, and the input's prompt tokens must be the recorded ones.
    Targets that are a prompt's are nobody's choice and may be anything. Raises ContentError.
    """
    if not datum.target_spans:
        raise ContentError(
            f"{where} has no provenance spans; name the sampled sequences with Datum.with_provenance"
        )
    _compare(datum.tokens, datum.input_spans, f"{where}.model_input_spans", "model_input", aside)
    is_sampled = np.zeros(len(targets), np.bool_)
    logprobs = np.zeros(len(targets), np.float32)
    at = 0
    field = f"{where}.loss_fn_input_spans"
    for i, span in enumerate(datum.target_spans):
        rows = slice(at, at + span.length)
        if span.kind == "sampled" and span.length:
            recorded = aside.sequence(span.sequence_id, f"{field}[{i}]")
            _same(targets[rows], _part(recorded, span, f"{field}[{i}]"), f"{field}[{i}]", "target_tokens", at)
            is_sampled[rows] = True
            logprobs[rows] = recorded.logprobs[span.offset : span.offset + span.length]
        at += span.length
    return is_sampled, logprobs


def _compare(tokens: Array, spans: Sequence[Span], field: str, of: str, aside: Aside) -> None:
    at = 0
    for i, span in enumerate(spans):
        if span.length:
            recorded = _part(aside.sequence(span.sequence_id, f"{field}[{i}]"), span, f"{field}[{i}]")
            _same(tokens[at : at + span.length], recorded, f"{field}[{i}]", of, at)
        at += span.length


def _part(recorded: Recorded, span: Span, where: str) -> Array:
    whole = recorded.tokens if span.kind == "sampled" else recorded.prompt
    if span.offset + span.length > len(whole):
        raise ContentError(
            f"{where} claims {span.length} tokens from {span.offset} on; the {span.kind} tokens of "
            f"{span.sequence_id} are {len(whole)}"
        )
    return whole[span.offset : span.offset + span.length]


def _same(given: Array, recorded: Array, where: str, field: str, at: int) -> None:
    wrong = np.flatnonzero(given != recorded)
    if wrong.size:
        first = int(wrong[0])
        raise ContentError(
            f"{where} does not fit: {field}[{at + first}] is {given[first]}, but {recorded[first]} was "
            "recorded there"
        )
