"""A session's requests as a Perfetto trace."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.sdk.versions import package
from tinsmith.wire import perfetto_pb2 as pb
from tinsmith.wire.timeline import Request, encode_timeline

T = 1_700_000_000.0


def slices(data: bytes) -> dict[str, list[tuple[str, int, int, int]]]:
    """(name, depth, begin, end) in the order of their begin, by the name of their track. Checks on the way
    that they nest, as Perfetto wants it."""
    trace = pb.Trace.FromString(data)
    names: dict[int, str] = {}
    open_: dict[int, list[tuple[str, int]]] = defaultdict(list)
    found: dict[str, list[tuple[str, int, int, int]]] = defaultdict(list)
    last = 0
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id
        if packet.WhichOneof("data") == "track_descriptor":
            names[packet.track_descriptor.uuid] = packet.track_descriptor.name
        if packet.WhichOneof("data") != "track_event":
            continue
        assert packet.timestamp >= last
        last = packet.timestamp
        event = packet.track_event
        stack = open_[event.track_uuid]
        if event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
            stack.append((event.name, packet.timestamp))
        elif event.type == pb.TrackEvent.TYPE_SLICE_END:
            name, begin = stack.pop()
            found[names[event.track_uuid]].append((name, len(stack), begin, packet.timestamp))
    assert not any(open_.values())
    return {name: sorted(each, key=lambda s: (s[2], s[1])) for name, each in found.items()}


def counters(data: bytes) -> dict[str, list[int]]:
    trace = pb.Trace.FromString(data)
    names = {p.track_descriptor.uuid: p.track_descriptor.name for p in trace.packet}
    found: dict[str, list[int]] = defaultdict(list)
    for packet in trace.packet:
        if packet.track_event.type == pb.TrackEvent.TYPE_COUNTER:
            found[names[packet.track_event.track_uuid]].append(packet.track_event.counter_value)
    return found


def request(seq: int, at: float, **more: object) -> Request:
    """A request that came at `at` and took five seconds: upload, queue, run, wait, download."""
    values = {
        "started": T + at + 2, "ended": T + at + 3, "fetched": T + at + 4, "sent": T + at + 5,
        "outcome": "done", "usage": {"train": 10}, **more,
    }  # fmt: skip
    return Request(f"r:{seq}", "forward_backward", "r", T + at, T + at + 1, **values)  # type: ignore[arg-type]


def test_a_request_is_a_slice_with_its_phases_inside() -> None:
    found = slices(encode_timeline("s", [request(1, 0)], T + 100))
    second = 10**9
    assert found["r"] == [
        ("forward_backward 1", 0, 0, 5 * second),
        ("upload", 1, 0, 1 * second),
        ("queue", 1, 1 * second, 2 * second),
        ("run", 1, 2 * second, 3 * second),
        ("wait", 1, 3 * second, 4 * second),
        ("download", 1, 4 * second, 5 * second),
    ]


def test_requests_that_overlap_lie_in_lanes_of_their_own() -> None:
    found = slices(encode_timeline("s", [request(i, i * 2.0) for i in range(6)], T + 100))
    assert set(found) == {"r", "r (2)", "r (3)"}
    for lane in found.values():
        outer = [(begin, end) for _, depth, begin, end in lane if depth == 0]
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(outer))


def test_a_pending_request_goes_on_until_now_and_times_that_make_no_sense_do_no_harm() -> None:
    pending = request(1, 0, ended=None, fetched=None, sent=None, outcome="")
    waiting = request(2, 0, started=None, ended=None, fetched=None, sent=None)
    backwards = request(3, 0, started=T - 50, ended=T - 60, fetched=T - 70, sent=T - 80)
    instant = Request("r:4", "optim_step", "q", T, T)
    found = slices(encode_timeline("s", [pending, waiting, backwards, instant], T + 9))
    assert ("run", 1, 2 * 10**9, 9 * 10**9) in found["r"]
    assert ("queue", 1, 10**9, 9 * 10**9) in found["r (2)"]
    assert slices(encode_timeline("s", [], T)) == {}


def test_counters_say_what_waits_and_runs_and_was_computed() -> None:
    found = counters(encode_timeline("s", [request(1, 0), request(2, 0.5)], T + 100))
    assert found["requests waiting"] == [1, 2, 1, 0]
    assert found["requests running"] == [1, 2, 1, 0]
    assert found["train tokens so far"] == [10, 20]


@pytest.mark.slow
def test_perfettos_own_schema_reads_it(tmp_path: Path) -> None:
    """Every field that is written has Perfetto's number, name and type."""
    (tmp_path / "trace").write_bytes(encode_timeline("s", [request(1, 0), request(2, 0.5)], T + 100))
    code = """
import sys
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as theirs
from tinsmith.wire import perfetto_pb2 as ours

def compare(own, other):
    for field in own.fields:
        same = other.fields_by_number[field.number]
        assert (same.name, same.type) == (field.name, field.type), (own.name, field.name)
    for nested in own.nested_types:
        compare(nested, other.nested_types_by_name[nested.name])
    for enum in own.enum_types:
        numbers = {v.name: v.number for v in other.enum_types_by_name[enum.name].values}
        assert all(numbers[v.name] == v.number for v in enum.values)

for name, message in ours.DESCRIPTOR.message_types_by_name.items():
    compare(message, theirs.DESCRIPTOR.message_types_by_name[name])
raw = open(sys.argv[1], "rb").read()
trace = theirs.Trace.FromString(raw)
assert len(trace.packet) == len(ours.Trace.FromString(raw).packet) > 20
trace.DiscardUnknownFields()
assert len(trace.SerializeToString()) == len(raw)
"""
    folder = package("perfetto", "0.59.1")
    environment = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2] / 'src'}", "PATH": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "trace")], env=environment, check=True)
