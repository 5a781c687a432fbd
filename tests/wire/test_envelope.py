"""The envelope says the same as the real decoder, and broken messages are refused."""

from __future__ import annotations

import pytest

from tests.harness import training_body
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.envelope import Envelope, read_envelope
from tinsmith.wire.errors import WireError


@pytest.mark.parametrize("seq_id", [1, 127, 128, 2**31 - 1])
@pytest.mark.parametrize("forward_only", [True, False])
def test_it_reads_what_the_decoder_reads(seq_id: int, forward_only: bool) -> None:
    message = pb.ForwardBackwardRequest.FromString(training_body("a:train:0", seq_id, (5, 300)))
    message.forward_only = forward_only
    assert read_envelope(message.SerializeToString()) == Envelope("a:train:0", seq_id, forward_only)


def test_the_last_one_of_a_repeated_field_counts() -> None:
    first = pb.ForwardBackwardRequest(model_id="a", seq_id=1).SerializeToString()
    second = pb.ForwardBackwardRequest(model_id="b", seq_id=2).SerializeToString()
    assert read_envelope(first + second) == Envelope("b", 2, False)


def test_unknown_fields_are_skipped() -> None:
    body = pb.ForwardBackwardRequest(model_id="a", seq_id=1).SerializeToString()
    unknown = b"\xf8\x07\x05" + b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4) + b"\xfa\x07\x02xy"
    assert read_envelope(unknown + body) == Envelope("a", 1, False)


def test_the_beginning_of_a_body_is_enough() -> None:
    body = training_body("a:train:0", 7, (300,))
    assert read_envelope(body[:60], cut=True) == Envelope("a:train:0", 7, False)
    with pytest.raises(WireError, match="middle"):
        read_envelope(body[:60])


@pytest.mark.parametrize("seq_id", [0, -1])
def test_a_place_that_is_none_is_refused(seq_id: int) -> None:
    body = pb.ForwardBackwardRequest(model_id="a", seq_id=seq_id).SerializeToString()
    with pytest.raises(WireError, match=f"seq_id.*{seq_id}"):
        read_envelope(body)


@pytest.mark.parametrize(
    "body", [b"\xff" * 20, b"\x0a", b"\x0a\x02a", b"\x0b", b"\x00\x00", b"\x0a\x01\xff\x10\x01"]
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        read_envelope(body)


def test_every_cut_of_a_body_is_refused_or_read_but_never_a_crash() -> None:
    body = training_body("a:train:0", 7, (3,))
    for end in range(len(body)):
        try:
            read_envelope(body[:end])
        except WireError:
            continue
