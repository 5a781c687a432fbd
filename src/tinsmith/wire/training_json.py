"""Training requests of SDKs before 0.27, which come as JSON: made into the protobuf message that newer
ones send, so that everything behind the API sees one form."""

from __future__ import annotations

import base64
import binascii

import numpy as np
import numpy.typing as npt

from tinsmith.wire import tinsmith_pb2 as pb

from .fields import Fields, parse_object
from .requests import Target

_DTYPES: dict[str, tuple[pb.DType, np.dtype[np.generic]]] = {
    "float32": (pb.DTYPE_FLOAT32, np.dtype("<f4")),
    "int64": (pb.DTYPE_INT64, np.dtype("<i8")),
}
_INT32 = 2**31 - 1


def read_target(body: bytes) -> tuple[Target, Fields]:
    """Whose request it is. Raises WireError where that cannot be told, which refuses the call."""
    fields = parse_object(body)
    return Target.read(fields), fields


def to_protobuf(target: Target, fields: Fields, forward_only: bool) -> bytes:
    """A serialized ForwardBackwardRequest. Raises WireError for content that cannot be put into one."""
    if target.seq_id > _INT32:
        raise fields.error("seq_id", f"must be at most {_INT32}, not {target.seq_id}")
    given = fields.child("forward_input" if forward_only else "forward_backward_input")
    message = pb.ForwardBackwardRequest(
        model_id=target.model_id,
        seq_id=target.seq_id,
        loss_fn=given.text("loss_fn"),
        forward_only=forward_only,
    )
    config = given.optional_child("loss_fn_config")
    for name in config.values() if config is not None else ():
        assert config is not None
        if config.raw(name) is None:
            continue
        value = message.loss_fn_config_v2[name]
        if isinstance(config.raw(name), str):
            value.text = config.text(name)
        else:
            value.number = config.number(name, 0.0)
    for index, item in enumerate(given.array("data")):
        _datum(Fields(item, f"data[{index}]"), message.data.add())
    return bytes(message.SerializeToString())


def _datum(fields: Fields, message: pb.Datum) -> None:
    model_input = fields.child("model_input")
    for index, item in enumerate(model_input.array("chunks")):
        chunk = Fields(item, f"{model_input.where}.chunks[{index}]")
        kind = chunk.raw("type") or "encoded_text"
        if kind == "encoded_text":
            tokens = _numbers(chunk, "tokens", np.dtype("<i8"))
            if tokens.size and (tokens.min() < 0 or tokens.max() > _INT32):
                raise chunk.error("tokens", f"must be token ids: integers from 0 to {_INT32}")
            message.model_input.add().encoded_text.tokens = tokens.astype("<i4").tobytes()
        elif kind == "image":
            _image(chunk, message.model_input.add().image)
        else:
            raise chunk.error(
                "type", f"{kind!r} is not offered by this server; use 'encoded_text' or 'image'"
            )
    inputs = fields.optional_child("loss_fn_inputs")
    for name in inputs.values() if inputs is not None else ():
        assert inputs is not None
        _tensor(inputs.child(name), message.loss_fn_inputs[name])


def _image(fields: Fields, message: pb.ImageChunk) -> None:
    data = fields.raw("data")
    try:
        message.data = base64.b64decode(data if isinstance(data, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise fields.error("data", "must be a text: the image's bytes in base64") from None
    message.format = fields.optional_text("format") or ""
    expected = fields.optional_integer("expected_tokens", least=0, most=_INT32)
    if expected is not None:
        message.expected_tokens = expected


def _tensor(fields: Fields, message: pb.Tensor) -> None:
    kind = fields.raw("dtype")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise fields.error("dtype", f"must be 'float32' or 'int64', not {kind!r}")
    message.dtype, dtype = _DTYPES[kind]
    values = _numbers(fields, "data", dtype)
    if fields.has("sparse_crow_indices") or fields.has("sparse_col_indices"):
        message.sparse_csr.values = values.tobytes()
        message.sparse_csr.crow_indices = _numbers(fields, "sparse_crow_indices", np.dtype("<i8")).tobytes()
        message.sparse_csr.col_indices = _numbers(fields, "sparse_col_indices", np.dtype("<i8")).tobytes()
    else:
        message.dense = values.tobytes()
    shape = _numbers(fields, "shape", np.dtype("<i8")) if fields.has("shape") else np.array([values.size])
    message.shape.extend(shape.tolist())


def _numbers(fields: Fields, name: str, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """A flat list of numbers. What is not finite in float32 is left to whoever judges the content."""
    wanted = "integers" if dtype.kind == "i" else "numbers"
    items = fields.array(name)
    if not items:
        return np.zeros(0, dtype)
    try:
        array = np.asarray(items)
    except (ValueError, OverflowError):
        raise fields.error(name, f"must be a flat list of {wanted}") from None
    if array.ndim != 1 or array.dtype.kind not in ("i" if dtype.kind == "i" else "iuf"):
        raise fields.error(name, f"must be a flat list of {wanted}")
    with np.errstate(over="ignore"):
        return array.astype(dtype)
