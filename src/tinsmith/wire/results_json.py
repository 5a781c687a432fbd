"""Results of passes and samples as JSON, for SDKs before 0.19, which read no protobuf."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from tinsmith.wire import tinsmith_pb2 as pb

_NUMPY: dict[int, np.dtype[np.generic]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}
_STOP = {pb.STOP_REASON_STOP: "stop", pb.STOP_REASON_LENGTH: "length"}


def pass_as_json(payload: bytes) -> dict[str, object]:
    """A serialized ForwardBackwardOutput."""
    message = pb.ForwardBackwardOutput.FromString(payload)
    outputs: list[dict[str, object]] = []
    for record in message.loss_fn_outputs:
        fields = {name: _of_datums(batch) for name, batch in record.fields.items()}
        outputs += [{name: of[i] for name, of in fields.items()} for i in range(record.num_datums)]
    return {
        "loss_fn_output_type": message.loss_fn_output_type,
        "loss_fn_outputs": outputs,
        "metrics": dict(message.metrics),
    }


def _of_datums(batch: pb.BatchedTensor) -> list[dict[str, object]]:
    dtype = _NUMPY[batch.dtype]
    offsets = np.frombuffer(batch.offsets, "<i8").tolist()
    trailing = list(batch.trailing_shape)
    answer: list[dict[str, object]] = []
    for start, stop in itertools.pairwise(offsets):
        values = np.frombuffer(batch.data[start:stop], dtype)
        first = values.size // (int(np.prod(trailing)) or 1)
        answer.append(
            {
                "data": _finite(values),
                "dtype": "float32" if dtype.kind == "f" else "int64",
                "shape": [first, *trailing],
            }
        )
    return answer


def sample_as_json(payload: bytes) -> dict[str, object]:
    """A serialized SampleResponse."""
    message = pb.SampleResponse.FromString(payload)
    answer: dict[str, object] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": _STOP[sequence.stop_reason],
                "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
                "logprobs": _floats(sequence.logprobs) if sequence.HasField("logprobs") else None,
            }
            for sequence in message.sequences
        ],
        "prompt_logprobs": _floats(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None,
        "topk_prompt_logprobs": None,
        "prompt_cache_hit_tokens": message.prompt_cache_hit_tokens,
    }
    if message.HasField("topk_prompt_logprobs"):
        top = message.topk_prompt_logprobs
        ids = np.frombuffer(top.token_ids, "<i4").reshape(top.length, top.k).tolist()
        values = np.frombuffer(top.logprobs, "<f4").reshape(top.length, top.k).tolist()
        rows = [
            [pair for pair in zip(*row, strict=True) if pair[1] > _EMPTY]
            for row in zip(ids, values, strict=True)
        ]
        answer["topk_prompt_logprobs"] = [row or None for row in rows]
    return answer


_EMPTY = -99999.0  # what a cell of a top-k table holds where there is nothing


def _floats(raw: bytes) -> list[float | None]:
    return _finite(np.frombuffer(raw, "<f4"))


def _finite(values: npt.NDArray[np.generic]) -> list[float | None]:
    """As a list; what is no number (the first token's logprob) is null, since JSON has no NaN."""
    items: list[float | None] = values.tolist()
    return [None if item is not None and item != item else item for item in items]
