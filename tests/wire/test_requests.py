"""Requests as the SDK really serializes them are read; what is wrong is named."""

from __future__ import annotations

import json

import pytest
from tinker import types

from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields, parse_object
from tinsmith.wire.requests import (
    CreateModel,
    CreateSession,
    LoadWeights,
    LoraConfig,
    SaveWeights,
)


def _sent(request: object) -> Fields:
    """As the SDK sends it: without what is None."""
    return parse_object(request.model_dump_json(exclude_none=True).encode())  # type: ignore[attr-defined]


def test_create_model() -> None:
    fields = _sent(
        types.CreateModelRequest(
            session_id="s",
            model_seq_id=3,
            base_model="a/b",
            lora_config=types.LoraConfig(rank=8, train_unembed=False),
            user_metadata={"k": 1},
        )
    )
    assert CreateModel.read(fields) == CreateModel("s", 3, "a/b", {"k": 1})
    assert LoraConfig.read(fields, 128) == LoraConfig(8, None, True, True, False)


def test_saves_and_loads() -> None:
    state = _sent(
        types.SaveWeightsRequest(model_id="m", path="n", seq_id=1, ttl_seconds=3600, overwrite=True)
    )
    assert SaveWeights.read_state(state) == SaveWeights("n", 3600, True, None)
    sampler = _sent(types.SaveWeightsForSamplerRequest(model_id="m", seq_id=1, sampling_session_seq_id=2))
    assert SaveWeights.read_sampler(sampler) == SaveWeights(None, None, False, None, 2)
    load = _sent(
        types.LoadWeightsRequest(session_id="s", model_seq_id=0, path="tinker://r/weights/n", optimizer=True)
    )
    assert LoadWeights.read(load) == LoadWeights("tinker://r/weights/n", True, None)


def test_create_session() -> None:
    fields = _sent(types.CreateSessionRequest(tags=["b"], user_metadata={}, sdk_version="0.38.0"))
    assert CreateSession.read(fields) == CreateSession(("b",), {}, "0.38.0", None, None)


@pytest.mark.parametrize("value", ["x", None, True, [], {}, 1.5, 2**70])
def test_an_integer_is_an_integer(value: object) -> None:
    with pytest.raises(WireError, match="n: "):
        Fields({"n": value}).integer("n")


@pytest.mark.parametrize("value", ["1", True, float("nan"), float("inf"), 10**400, []])
def test_a_number_is_finite(value: object) -> None:
    with pytest.raises(WireError, match="n: must be"):
        Fields({"n": value}).number("n", 0.0)


def test_errors_name_the_way_to_the_field_and_do_not_repeat_everything() -> None:
    fields = Fields({"a": {"b": "x" * 1000}}).child("a")
    with pytest.raises(WireError) as caught:
        fields.integer("b")
    assert str(caught.value).startswith("a.b: must be an integer")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("body", [b"", b"1", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="body"):
        parse_object(body)


def test_metadata_is_bounded_and_of_texts() -> None:
    with pytest.raises(WireError, match="larger"):
        Fields({"m": {"k": "x" * 100_000}}).metadata("m")
    with pytest.raises(WireError, match=r"m\.k"):
        Fields({"m": {"k": 1}}).text_metadata("m")
    assert json.dumps(Fields({"m": {"k": "v"}}).text_metadata("m")) == '{"k": "v"}'
