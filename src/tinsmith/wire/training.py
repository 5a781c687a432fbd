"""The protobuf bodies of training: a forward_backward request to numpy arrays, and results back.

Errors name the field as a user of the SDK knows it, e.g. data[3].loss_fn_inputs['weights'].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.compression import decompress
from tinsmith.wire.errors import WireError
from tinsmith.wire.images import ImageChunk
from tinsmith.wire.provenance import Span
from tinsmith.wire.tensors import csr_problem

_DTYPES: dict[int, type[np.generic]] = {
    pb.DTYPE_FLOAT32: np.float32,
    pb.DTYPE_INT64: np.int64,
    pb.DTYPE_INT32: np.int32,
    pb.DTYPE_BFLOAT16: np.uint16,
}

Array = npt.NDArray[np.generic]


class ContentError(ValueError):
    """A request's content is wrong; the message names the field and what would be right."""


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence: int64 text tokens [n], the images among them, and the loss's inputs as dense arrays
    (float32 or int64)."""

    tokens: npt.NDArray[np.int64]
    inputs: Mapping[str, Array]
    images: tuple[ImageChunk, ...] = ()
    input_spans: tuple[Span, ...] = ()
    target_spans: tuple[Span, ...] = ()

    def expanded(self, tokens: npt.NDArray[np.int64]) -> Datum:
        """The same with placeholders, int64 [N], in the place of its images."""
        return replace(self, tokens=tokens, images=())


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """A decoded ForwardBackwardRequest."""

    model_id: str
    seq_id: int
    forward_only: bool
    loss_fn: str
    config: Mapping[str, float | str]
    data: Sequence[Datum]


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """The body as protobuf, at most `limit` bytes of it. Raises ContentError."""
    try:
        if encoding == "zstd":
            return decompress(body, limit)
        if encoding == "identity":
            return body
    except WireError as error:
        raise ContentError(str(error)) from error
    raise ContentError(f"Content-Encoding {encoding!r} is not known; send zstd or identity")


def parse(body: bytes) -> pb.ForwardBackwardRequest:
    """The protobuf message, or ContentError."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise ContentError(f"the request body is not a ForwardBackwardRequest: {error}") from error
    return message


def decode_request(body: bytes, encoding: str, limit: int) -> TrainingRequest:
    """Decode a body as it came off the wire. Raises ContentError."""
    message = parse(unpack(body, encoding, limit))
    if not message.data:
        raise ContentError("data is empty; send at least one datum")
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") is None:
            raise ContentError(f"loss_fn_config[{key!r}] is neither a number nor a text")
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    return TrainingRequest(
        message.model_id,
        message.seq_id,
        message.forward_only,
        message.loss_fn,
        config,
        [_datum(d, f"data[{i}]") for i, d in enumerate(message.data)],
    )


def _datum(message: pb.Datum, where: str) -> Datum:
    parts: list[npt.NDArray[np.int32]] = []
    images: list[ImageChunk] = []
    for i, chunk in enumerate(message.model_input):
        kind = chunk.WhichOneof("chunk")
        if kind == "image":
            images.append(_image(chunk.image, i, sum(p.size for p in parts)))
            continue
        if kind != "encoded_text":
            raise ContentError(
                f"{where}.model_input.chunks[{i}] is {kind or 'empty'}; this server takes encoded text and "
                "images"
            )
        raw = chunk.encoded_text.tokens
        if len(raw) % 4:
            raise ContentError(f"{where}.model_input.chunks[{i}].tokens is no array of int32")
        parts.append(np.frombuffer(raw, dtype="<i4"))
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    if not tokens.size and not images:
        raise ContentError(f"{where}.model_input is empty; it needs at least one token")
    inputs = {k: _tensor(v, f"{where}.loss_fn_inputs[{k!r}]") for k, v in message.loss_fn_inputs.items()}
    return Datum(
        tokens,
        inputs,
        tuple(images),
        _spans(message.model_input_spans, f"{where}.model_input_spans"),
        _spans(message.loss_fn_input_spans, f"{where}.loss_fn_input_spans"),
    )


def _spans(messages: Sequence[pb.ProvenanceSpan], where: str) -> tuple[Span, ...]:
    spans: list[Span] = []
    for i, message in enumerate(messages):
        kind = message.WhichOneof("span")
        if kind is None:
            raise ContentError(f"{where}[{i}] is empty; it must be a span of prompt_tokens or sampled_tokens")
        span = message.prompt_tokens if kind == "prompt_tokens" else message.sampled_tokens
        name: Literal["prompt", "sampled"] = "prompt" if kind == "prompt_tokens" else "sampled"
        spans.append(Span(name, span.sequence_id, span.offset, span.length))
    return tuple(spans)


def _image(message: pb.ImageChunk, chunk: int, at: int) -> ImageChunk:
    override = message.override_dimensions
    return ImageChunk(
        chunk,
        at,
        message.data,
        message.format,
        message.expected_tokens if message.HasField("expected_tokens") else None,
        (override.width, override.height) if message.HasField("override_dimensions") else None,
    )


def _values(raw: bytes, dtype: int, where: str) -> Array:
    kind = _DTYPES.get(dtype)
    if kind is None:
        raise ContentError(f"{where} has an unknown dtype {dtype}; send float32 or int64")
    if len(raw) % np.dtype(kind).itemsize:
        raise ContentError(f"{where} holds {len(raw)} bytes, no whole number of {np.dtype(kind).name} values")
    array = np.frombuffer(raw, dtype=kind)
    if dtype == pb.DTYPE_BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.int64) if dtype == pb.DTYPE_INT32 else array


def _tensor(message: pb.Tensor, where: str) -> Array:
    """Dense float32 or int64 array; the cells that a CSR tensor does not list are zero."""
    shape = tuple(message.shape)
    if any(n < 0 for n in shape):
        raise ContentError(f"{where} has a negative dimension: shape {list(shape)}")
    if message.WhichOneof("encoding") != "sparse_csr":
        values = _values(message.dense, message.dtype, where)
        if shape and int(np.prod(shape, dtype=np.float64)) != values.size:
            raise ContentError(
                f"{where} holds {values.size} values, which is not what its shape {list(shape)} needs"
            )
        return values.reshape(shape) if shape else values
    csr = message.sparse_csr
    values = _values(csr.values, message.dtype, where)
    if len(csr.crow_indices) % 8 or len(csr.col_indices) % 8:
        raise ContentError(f"{where}: CSR indices must be int64")
    crow = np.frombuffer(csr.crow_indices, dtype="<i8")
    col = np.frombuffer(csr.col_indices, dtype="<i8")
    if len(shape) != 2:
        raise ContentError(f"{where} is sparse, so its shape must be [rows, columns], not {list(shape)}")
    rows, columns = shape
    problem = csr_problem(rows, columns, crow, col, values.size)
    if problem:
        raise ContentError(f"{where}: {problem}")
    if rows * columns > 1 << 28:
        raise ContentError(f"{where}: shape {list(shape)} has more than 2^28 cells")
    dense = np.zeros((rows, columns), dtype=values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return dense


def encode_output(
    outputs: Sequence[Mapping[str, Array]], metrics: Mapping[str, float], kind: str = "ArrayRecord"
) -> bytes:
    """A ForwardBackwardOutput: per-datum arrays (float32 or int64), one ArrayRecord for each run of datums
    whose arrays agree in everything but their first dimension."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=kind)
    for key, value in metrics.items():
        message.metrics[key] = value
    start = 0
    while start < len(outputs):
        stop = start + 1
        shape = {k: v.shape[1:] for k, v in outputs[start].items()}
        while stop < len(outputs) and {k: v.shape[1:] for k, v in outputs[stop].items()} == shape:
            stop += 1
        record = message.loss_fn_outputs.add(type_tag=kind, num_datums=stop - start)
        for key, trailing in shape.items():
            arrays = [np.ascontiguousarray(o[key]) for o in outputs[start:stop]]
            offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
            np.cumsum([a.nbytes for a in arrays], out=offsets[1:])
            field = record.fields[key]
            field.data = b"".join(a.tobytes() for a in arrays)
            field.offsets = offsets.tobytes()
            field.dtype = pb.DTYPE_INT64 if arrays[0].dtype == np.int64 else pb.DTYPE_FLOAT32
            field.trailing_shape.extend(trailing)
        start = stop
    data: bytes = message.SerializeToString(deterministic=True)
    return data
