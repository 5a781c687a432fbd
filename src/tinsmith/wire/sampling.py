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
    """token_ids int32 (int64 for draws) [length, k] and logprobs float32 [length, k]."""

    token_ids: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TargetLogprobs:
    """Logprobs of the ids that a request names, in the layout that it has: `values` are all cells of `shape`,
    row by row, or, with `crow` and `col` (int64 as bytes), those that a CSR tensor lists."""

    values: npt.NDArray[np.float32]
    shape: tuple[int, int]
    crow: bytes | None = None
    col: bytes | None = None


@dataclass(frozen=True, slots=True)
class PromptAnswers:
    """What a request asked of its prompt of n tokens. logprobs float32 [n], NaN where there is none;
    topk [n, k], EMPTY_TOKEN and EMPTY_LOGPROB where there is none; drawn [n - 1, k], int64 ids."""

    logprobs: npt.NDArray[np.float32] | None = None
    topk: TopK | None = None
    targets: TargetLogprobs | None = None
    drawn: TopK | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled sequence: tokens int32 [n], logprobs float32 [n]."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stop_reason: Literal["stop", "length"]
    topk: TopK | None = None


def encode_response(sequences: Sequence[Sampled], prompt: PromptAnswers, cached_tokens: int = 0) -> bytes:
    """A SampleResponse."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=cached_tokens)
    for sequence in sequences:
        entry = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=sequence.tokens.astype("<i4").tobytes(),
            logprobs=sequence.logprobs.astype("<f4").tobytes(),
        )
        if sequence.topk is not None:
            _fill(entry.topk_sampled_logprobs, sequence.topk)
    if prompt.logprobs is not None:
        message.prompt_logprobs = prompt.logprobs.astype("<f4").tobytes()
    if prompt.topk is not None:
        _fill(message.topk_prompt_logprobs, prompt.topk)
    if (targets := prompt.targets) is not None:
        tensor = message.target_prompt_logprobs
        tensor.dtype, tensor.shape[:] = pb.DTYPE_FLOAT32, targets.shape
        values = targets.values.astype("<f4").tobytes()
        if targets.crow is None:
            tensor.dense = values
        else:
            tensor.sparse_csr.values = values
            tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices = targets.crow, targets.col or b""
    if (drawn := prompt.drawn) is not None:
        for tensor, values, dtype in (
            (message.prompt_alt_tokens.tokens, drawn.token_ids.astype("<i8").tobytes(), pb.DTYPE_INT64),
            (message.prompt_alt_tokens.logprobs, drawn.logprobs.astype("<f4").tobytes(), pb.DTYPE_FLOAT32),
        ):
            tensor.dtype, tensor.shape[:], tensor.dense = dtype, drawn.token_ids.shape, values
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _fill(message: pb.TopkLogprobs, topk: TopK) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = topk.token_ids.astype("<i4").tobytes()
    message.logprobs = topk.logprobs.astype("<f4").tobytes()
