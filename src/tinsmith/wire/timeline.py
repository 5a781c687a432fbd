"""A session's requests as a Perfetto trace (.pftrace), to be opened in ui.perfetto.dev.

Every training run and sampling client has a track, every request on it a slice from its arrival to its
end, and inside of that one slice for each phase: upload, queue, run, wait (for the client to ask for the
result) and download. Requests that overlap lie in lanes of their own. Counters show how many requests
wait and run, and how many tokens were computed so far.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tinsmith.wire import perfetto_pb2 as pb

_SEQUENCE = 1
_CLEARED = 1  # SEQ_INCREMENTAL_STATE_CLEARED
_BOOTTIME, _REALTIME = 6, 1  # Perfetto's numbers of the two clocks
_Event = pb.TrackEvent


@dataclass(slots=True)
class Request:
    """When a request came, and what became of it. Times are seconds since 1970; None: it did not happen, or
    is not known."""

    request_id: str
    kind: str  # forward_backward, optim_step, sample, ...
    track: str  # its training run or sampling session
    began: float  # its first byte came
    accepted: float  # it was read, checked and written down
    started: float | None = None  # the engine began with it
    ended: float | None = None
    fetched: float | None = None  # somebody asked for its outcome, which was there
    sent: float | None = None  # the outcome was on its way
    outcome: str = ""  # done, failed, lost
    sent_bytes: int = 0
    received_bytes: int = 0
    usage: dict[str, int] = field(default_factory=dict)

    def phases(self, now: float) -> Iterator[tuple[str, float, float]]:
        """(name, start, end) of what it went through, in order and without holes."""
        marks = [("upload", self.accepted)]
        if self.started is not None:
            marks += [("queue", self.started), ("run", self.ended if self.ended is not None else now)]
        else:
            marks.append(("queue", self.ended if self.ended is not None else now))
        if self.fetched is not None and self.sent is not None:
            marks += [("wait", self.fetched), ("download", self.sent)]
        at = self.began
        for name, end in marks:
            end = max(end, at)
            if end > at or name in ("queue", "run"):
                yield name, at, end
            at = end

    def end(self, now: float) -> float:
        return max(self.began, *(end for _, _, end in self.phases(now)))


def encode_timeline(name: str, requests: Sequence[Request], now: float) -> bytes:
    """A serialized Perfetto trace. Requests without an end go on until `now`."""
    requests = sorted(requests, key=lambda each: each.began)
    zero = requests[0].began if requests else now
    trace = pb.Trace()
    _clocks(trace, zero)
    uuids = itertools.count(1)
    process = next(uuids)
    packet = trace.packet.add(trusted_packet_sequence_id=_SEQUENCE, sequence_flags=_CLEARED)
    packet.track_descriptor.uuid = process
    packet.track_descriptor.process.pid = 1
    packet.track_descriptor.process.process_name = name
    rank = itertools.count(1)
    packets: list[tuple[int, int, pb.TracePacket]] = []
    for track, members in _by_track(requests).items():
        for number, lane in enumerate(_lanes(members, zero, now)):
            uuid = next(uuids)
            _describe(trace, uuid, process, track if not number else f"{track} ({number + 1})", next(rank))
            for request in lane:
                packets += _slices(request, uuid, zero, now)
    for title, unit, steps in _counters(requests, now):
        uuid = next(uuids)
        _describe(trace, uuid, process, title, next(rank), unit)
        packets += [(_ns(when - zero), 0, _count(uuid, value, _ns(when - zero))) for when, value in steps]
    for _, _, each in sorted(packets, key=lambda entry: entry[:2]):
        trace.packet.append(each)
    return bytes(trace.SerializeToString())


def _clocks(trace: pb.Trace, zero: float) -> None:
    """The trace's own clock begins at 0; the snapshot says what time of day that was."""
    snapshot = trace.packet.add(trusted_packet_sequence_id=_SEQUENCE).clock_snapshot
    snapshot.clocks.add(clock_id=_BOOTTIME, timestamp=0)
    snapshot.clocks.add(clock_id=_REALTIME, timestamp=_ns(zero))


def _describe(trace: pb.Trace, uuid: int, parent: int, name: str, rank: int, unit: str | None = None) -> None:
    track = trace.packet.add(trusted_packet_sequence_id=_SEQUENCE).track_descriptor
    track.uuid, track.parent_uuid, track.name, track.sibling_order_rank = uuid, parent, name, rank
    if unit is not None:
        track.counter.unit_name = unit


def _by_track(requests: Iterable[Request]) -> dict[str, list[Request]]:
    found: dict[str, list[Request]] = {}
    for request in requests:
        found.setdefault(request.track, []).append(request)
    return found


def _lanes(requests: Iterable[Request], zero: float, now: float) -> list[list[Request]]:
    """As few lanes as possible in which nothing overlaps; `requests` come in the order of their begin."""
    lanes: list[list[Request]] = []
    free: list[int] = []  # lanes in which nothing lies any more, the lowest one first
    busy: list[tuple[int, int]] = []  # (when it is free, lane)
    for request in requests:
        begin, end = _bounds(request, zero, now)
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            lanes.append([])
            free.append(len(lanes) - 1)
        lane = heapq.heappop(free)
        lanes[lane].append(request)
        heapq.heappush(busy, (end, lane))
    return lanes


def _bounds(request: Request, zero: float, now: float) -> tuple[int, int]:
    """Where its slice begins and ends, at least a nanosecond later."""
    begin = _ns(request.began - zero)
    return begin, max(_ns(request.end(now) - zero), begin + 1)


def _slices(
    request: Request, track: int, zero: float, now: float
) -> Iterator[tuple[int, int, pb.TracePacket]]:
    """(time, order at one time, packet): a slice begins after those that end, and the outer one first."""
    begin, end = _bounds(request, zero, now)
    arguments: dict[str, str | int] = {
        "request_id": request.request_id,
        "outcome": request.outcome or "pending",
    }
    arguments |= {f"{kind}_tokens": count for kind, count in request.usage.items()}
    for name, size in (("received_bytes", request.received_bytes), ("sent_bytes", request.sent_bytes)):
        if size:
            arguments[name] = size
    yield begin, 1, _begin(track, f"{request.kind} {request.request_id.rpartition(':')[2]}", begin, arguments)
    for name, start, stop in request.phases(now):
        at, until = _ns(start - zero), _ns(stop - zero)
        if at < until:
            yield at, 2, _begin(track, name, at, {})
            yield until, -1, _end(track, until)
    yield end, 0, _end(track, end)


def _begin(track: int, name: str, at: int, arguments: Mapping[str, str | int]) -> pb.TracePacket:
    packet = _packet(at)
    event = packet.track_event
    event.type, event.track_uuid, event.name = _Event.TYPE_SLICE_BEGIN, track, name
    event.categories.append("request" if arguments else "phase")
    for key, value in arguments.items():
        if isinstance(value, int):
            event.debug_annotations.add(name=key, int_value=value)
        else:
            event.debug_annotations.add(name=key, string_value=value)
    return packet


def _end(track: int, at: int) -> pb.TracePacket:
    packet = _packet(at)
    packet.track_event.type, packet.track_event.track_uuid = _Event.TYPE_SLICE_END, track
    return packet


def _count(track: int, value: int, at: int) -> pb.TracePacket:
    packet = _packet(at)
    event = packet.track_event
    event.type, event.track_uuid, event.counter_value = _Event.TYPE_COUNTER, track, value
    return packet


def _packet(at: int) -> pb.TracePacket:
    return pb.TracePacket(timestamp=at, timestamp_clock_id=_BOOTTIME, trusted_packet_sequence_id=_SEQUENCE)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _counters(requests: Sequence[Request], now: float) -> Iterator[tuple[str, str, list[tuple[float, int]]]]:
    """(title, unit, [(when, value)])."""
    waiting: Counter[float] = Counter()
    running: Counter[float] = Counter()
    tokens: dict[str, Counter[float]] = {}
    for request in requests:
        for name, start, end in request.phases(now):
            change = {"queue": waiting, "run": running}.get(name)
            if change is not None and end > start:
                change[start] += 1
                change[end] -= 1
        if request.ended is not None:
            for kind, count in request.usage.items():
                tokens.setdefault(kind, Counter())[max(request.ended, request.began)] += count
    yield "requests waiting", "requests", _sums(waiting)
    yield "requests running", "requests", _sums(running)
    for kind, change in sorted(tokens.items()):
        yield f"{kind} tokens so far", "tokens", _sums(change)


def _sums(changes: Mapping[float, int]) -> list[tuple[float, int]]:
    times = sorted(changes)
    return list(zip(times, itertools.accumulate(changes[time] for time in times), strict=True))
