"""Training requests in the JSON of older SDKs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.errors import WireError
from tinsmith.wire.training import decode_request
from tinsmith.wire.training_json import read_target, to_protobuf


def body(**change: Any) -> bytes:
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}, {"tokens": [4]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [2, 3, 4, 5], "dtype": "int64", "shape": [4]},
            "weights": {"data": [1, 0.5, 1.0, 0], "dtype": "float32"},
            **change.pop("inputs", {}),
        },
    }
    given = {"data": [{**datum, **change.pop("datum", {})}], "loss_fn": "cross_entropy", **change}
    return json.dumps({"forward_backward_input": given, "model_id": "r", "seq_id": 7}).encode()


def message(content: bytes) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest.FromString(to_protobuf(*read_target(content), forward_only=False))


def test_what_comes_as_json_is_what_comes_as_protobuf() -> None:
    content = body(loss_fn_config={"clip": 0.2, "kind": "a", "none": None})
    request = decode_request(message(content).SerializeToString(), "identity", 10**6)
    assert (request.model_id, request.seq_id, request.forward_only) == ("r", 7, False)
    assert (request.loss_fn, request.config) == ("cross_entropy", {"clip": 0.2, "kind": "a"})
    (datum,) = request.data
    assert datum.tokens.tolist() == [1, 2, 3, 4]
    assert datum.inputs["target_tokens"].tolist() == [2, 3, 4, 5]
    assert datum.inputs["weights"].dtype == np.float32
    assert datum.inputs["weights"].tolist() == [1, 0.5, 1, 0]


def test_sparse_tensors_and_images_come_along() -> None:
    sparse = {"data": [5], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 1, 1],
              "sparse_col_indices": [2]}  # fmt: skip
    image = {"type": "image", "data": "aGk=", "format": "png", "expected_tokens": 4}
    got = message(body(inputs={"target_tokens": sparse}, datum={"model_input": {"chunks": [image]}}))
    request = decode_request(got.SerializeToString(), "identity", 10**6)
    assert request.data[0].inputs["target_tokens"].tolist() == [[0, 0, 5], [0, 0, 0]]
    (picture,) = request.data[0].images
    assert (picture.data, picture.format, picture.expected_tokens) == (b"hi", "png", 4)


def test_forward_has_a_field_of_its_own() -> None:
    content = json.loads(body())
    content["forward_input"] = content.pop("forward_backward_input")
    got = to_protobuf(*read_target(json.dumps(content).encode()), forward_only=True)
    assert pb.ForwardBackwardRequest.FromString(got).forward_only


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss_fn": 5}, "forward_backward_input.loss_fn"),
        ({"data": {}}, "forward_backward_input.data"),
        ({"data": [5]}, "data[0]"),
        ({"datum": {"model_input": {"chunks": [{"tokens": [1.5]}]}}}, "model_input.chunks[0].tokens"),
        ({"datum": {"model_input": {"chunks": [{"tokens": [2**40]}]}}}, "model_input.chunks[0].tokens"),
        ({"datum": {"model_input": {"chunks": [{"type": "x"}]}}}, "data[0].model_input.chunks[0].type"),
        ({"datum": {"model_input": {"chunks": [{"type": "image"}]}}}, "data[0].model_input.chunks[0].data"),
        ({"inputs": {"weights": {"data": [1], "dtype": "fp8"}}}, "data[0].loss_fn_inputs.weights.dtype"),
        ({"inputs": {"weights": {"data": [[1]], "dtype": "float32"}}}, "data[0].loss_fn_inputs.weights.data"),
        ({"inputs": {"weights": {"data": [[1], [1, 2]], "dtype": "float32"}}}, "loss_fn_inputs.weights.data"),
        ({"inputs": {"weights": {"data": ["1"], "dtype": "float32"}}}, "loss_fn_inputs.weights.data"),
        ({"inputs": {"target_tokens": {"data": [2**70], "dtype": "int64"}}}, "target_tokens.data"),
        ({"loss_fn_config": {"clip": []}}, "loss_fn_config.clip"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(WireError, match=says.replace("[", r"\[")):
        message(body(**change))
