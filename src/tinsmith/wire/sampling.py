"""The protobuf answer to a sample request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tinsmith.wire import tinsmith_pb2 as pb

EMPTY_TOKEN, EMPTY_LOGPROB = 0, -99999.0  # what stands in a top-k cell that has nothing


@dataclass(frozen=True, slots=True)
class TopK:
    """token_ids int32 [length, k] and logprobs float32 [length, k]."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled sequence: tokens int32 [n], logprobs float32 [n]."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stop_reason: Literal["stop", "length"]
    topk: TopK | None = None


def encode_response(
    sequences: Sequence[Sampled],
    prompt_logprobs: npt.NDArray[np.float32] | None = None,
    topk_prompt: TopK | None = None,
    cached_tokens: int = 0,
) -> bytes:
    """A SampleResponse; `prompt_logprobs` has NaN where there is none."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=cached_tokens)
    for sequence in sequences:
        entry = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=sequence.tokens.astype("<i4").tobytes(),
            logprobs=sequence.logprobs.astype("<f4").tobytes(),
        )
        if sequence.topk is not None:
            _fill(entry.topk_sampled_logprobs, sequence.topk)
    if prompt_logprobs is not None:
        message.prompt_logprobs = prompt_logprobs.astype("<f4").tobytes()
    if topk_prompt is not None:
        _fill(message.topk_prompt_logprobs, topk_prompt)
    data: bytes = message.SerializeToString()
    return data


def _fill(message: pb.TopkLogprobs, topk: TopK) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = topk.token_ids.astype("<i4").tobytes()
    message.logprobs = topk.logprobs.astype("<f4").tobytes()
