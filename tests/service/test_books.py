"""The books: the ledger's sum equals an independent count, whatever happened in between."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

import pytest

from tests.harness import MODEL, Raw, Server, training_body, wait_for
from tinsmith.cli import main
from tinsmith.wire import tinsmith_pb2 as pb


def usage(server: Server, *words: str) -> list[dict[str, str]]:
    """What the operator's program exports."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["usage", "--data", str(server.data), "--csv", "-", *words]) == 0
    return list(csv.DictReader(io.StringIO(out.getvalue())))


def tokens(rows: list[dict[str, str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in rows:
        for kind in ("train", "prefill", "cached_prefill", "sample", "checkpoints"):
            found[kind] += int(row[kind])
    return +found


@dataclass
class Tenant:
    """A client that keeps its own count of what it has got."""

    raw: Raw
    session: str = ""
    run: str = ""
    sampler: str = ""
    seq: int = 0
    sample_seq: int = 0
    passes: dict[str, int] = field(default_factory=dict)  # request id: tokens
    samples: dict[str, int] = field(default_factory=dict)  # request id: prompt tokens
    got: Counter[str] = field(default_factory=Counter)

    def begin(self) -> Tenant:
        self.session = self.raw.session()
        self.run = self.raw.run(self.session)
        body = {"session_id": self.session, "sampling_session_seq_id": 0, "base_model": MODEL}
        self.sampler = str(self.raw.ok("create_sampling_session", body)["sampling_session_id"])
        self.seq = 0
        return self

    def train(self, *lengths: int, again: bool = False, forward_only: bool = False) -> str:
        self.seq += 1
        body = training_body(self.run, self.seq, lengths)
        if forward_only:
            message = pb.ForwardBackwardRequest.FromString(body)
            message.forward_only = True
            body = message.SerializeToString()
        request = self.raw.forward_backward(self.run, self.seq, body)
        if again:
            assert self.raw.forward_backward(self.run, self.seq, body) == request
        self.passes[request] = sum(lengths)
        return request

    def sample(self, prompt: int, max_tokens: int, *, again: bool = False, n: int = 1) -> str:
        self.sample_seq += 1
        body = {
            "sampling_session_id": self.sampler,
            "seq_id": self.sample_seq,
            "prompt": {
                "chunks": [{"type": "encoded_text", "tokens": [(prompt + i) % 256 for i in range(prompt)]}]
            },
            "num_samples": n,
            "sampling_params": {"max_tokens": max_tokens, "stop": [], "seed": 1},
        }
        request = str(self.raw.ok("asample", body)["request_id"])
        if again:
            assert self.raw.ok("asample", body)["request_id"] == request
        self.samples[request] = prompt
        return request

    def fetch(self, request: str) -> bool:
        """Count what came of a request, once; whether it was done."""
        while (answer := self.raw.retrieve(request)).status_code == 408:
            pass
        done = answer.headers["content-type"] == "application/x-protobuf"
        if request in self.passes:
            self.got["train"] += self.passes.pop(request) * done
        elif request in self.samples:
            prompt = self.samples.pop(request)
            if done:
                response = pb.SampleResponse.FromString(answer.content)
                cached = response.prompt_cache_hit_tokens
                self.got["prefill"] += prompt - cached
                self.got["cached_prefill"] += cached
                self.got["sample"] += sum(len(s.tokens) // 4 for s in response.sequences)
        return done

    def fetch_all(self) -> list[bool]:
        return [self.fetch(request) for request in [*self.passes, *self.samples]]


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server("--poll-hold", "5").start()


def engine_counts(server: Server) -> dict[str, int]:
    counts: dict[str, int] = server.raw().get("status").json()["engine"]["tokens"]
    return counts


def test_the_ledger_is_what_the_clients_got(server: Server) -> None:
    """Retries, refusals, cancellations, an engine's death and a server's, and two tenants all the while."""
    first, second = (Tenant(server.raw(server.new_key(name))).begin() for name in ("first", "second"))

    # In peace: requests sent twice, forward alone, several samples of one prompt, a prefix that is cached.
    for tenant in (first, second):
        for lengths in ((8,), (20, 30), (5, 5, 5)):
            tenant.train(*lengths, again=True)
        tenant.train(16, forward_only=True)
        tenant.raw.optim(tenant.run, tenant.seq + 1)
        tenant.seq += 1
        tenant.sample(100, 9, again=True, n=3)
        assert all(tenant.fetch_all())
        tenant.sample(100, 4)
        assert all(tenant.fetch_all())
    assert first.got["cached_prefill"] == 64

    # What is refused costs nothing.
    first.seq += 1
    bad = first.raw.forward_backward(
        first.run, first.seq, training_body(first.run, first.seq, (4,), "no_loss")
    )
    assert "error" in first.raw.result(bad)
    too_long = {"sampling_session_id": first.sampler, "seq_id": 999, "num_samples": 1,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1] * 600}]},
                "sampling_params": {"max_tokens": 8}}  # fmt: skip
    assert first.raw.post("asample", too_long).status_code == 400

    # What is cancelled costs what was computed: the engine counts each token where it is made.
    before = engine_counts(server)
    request = second.sample(70, 400, n=4)
    wait_for(lambda: engine_counts(server)["sample"] > before["sample"] + 8, what="some tokens")
    second.raw.ok("cancel_future", {"request_id": request})
    assert not second.fetch(request)
    wait_for(lambda: server.raw().get("status").json()["engine"]["samples_pending"] == 0)
    after = engine_counts(server)
    cancelled = Counter({kind: after[kind] - before[kind] for kind in ("prefill", "sample")})
    assert cancelled["sample"] < 1600
    second.got += cancelled

    # The engine dies in the middle. Training is carried out by the next one, and counted once, whichever did
    # it; samples are lost, and cost nothing.
    for tenant in (first, second):
        for _ in range(6):
            tenant.train(30, 30)
            tenant.sample(40, 400, n=8)
    server.kill_engine()
    for tenant in (first, second):
        assert all(tenant.fetch(request) for request in list(tenant.passes))
    assert not all([*first.fetch_all(), *second.fetch_all()])
    server.wait_until_ready()

    # The server dies in the middle, and comes back. So it is then, too.
    for tenant in (first, second):
        tenant.begin()
        for _ in range(6):
            tenant.train(25, 25)
            tenant.sample(30, 40)
        tenant.fetch(next(iter(tenant.passes)))
        tenant.fetch(next(iter(tenant.samples)))
    server.kill()
    server.start()
    for tenant in (first, second):
        assert all(tenant.fetch(request) for request in list(tenant.passes))
        tenant.fetch_all()
        tenant.begin()
        tenant.train(7, again=True)
        tenant.sample(33, 3)
        assert all(tenant.fetch_all())

    for name, tenant in (("first", first), ("second", second)):
        rows = usage(server, "--org", name)
        assert tokens(rows) == +tenant.got
        cost = sum(Decimal(row["cost_usd"]) for row in rows)
        rates = {"train": "0.03", "prefill": "0.03", "cached_prefill": "0.006", "sample": "0.03"}
        assert cost == sum(Decimal(rates[kind]) * n / 1_000_000 for kind, n in tenant.got.items())
    # However it is added up, it is the same.
    whole = first.got + second.got
    for by in ("hour,org,project,session,user,key,model", "day", "key"):
        assert tokens(usage(server, "--by", by)) == +whole
    assert tokens(usage(server, "--kind", "train")) == Counter(train=whole["train"])
    assert usage(server, "--model", "another") == []
    assert usage(server, "--since", "2020-01-01", "--until", "2020-02-01") == []


def test_a_sample_that_nobody_fetched_is_entered_when_it_is_forgotten(
    make_server: Callable[..., Server],
) -> None:
    server = make_server("--result-ttl", "1").start()
    tenant = Tenant(server.raw(server.new_key("idle"))).begin()
    tenant.sample(20, 5)
    assert tokens(usage(server)) == Counter()
    wait_for(lambda: tokens(usage(server)) == Counter(prefill=20, sample=5), what="it to be entered")


def test_storage_is_counted_while_a_checkpoint_is_there(hardy: Server) -> None:
    raw = hardy.raw(hardy.new_key("saver"))
    run = raw.run(raw.session())
    for seq, name in ((1, "kept"), (2, "deleted")):
        raw.result(raw.save(run, seq, name))
    begin = time.time()
    time.sleep(1.2)
    assert raw.http.delete(f"training_runs/{run}/checkpoints/weights/deleted").status_code == 200
    deleted = time.time()
    size = raw.get("checkpoints").json()["checkpoints"][0]["size_bytes"]
    time.sleep(0.5)
    rows = usage(hardy, "--org", "saver")
    now = time.time()
    (row,) = rows
    assert row["checkpoints"] == "2"
    counted = float(row["gb_hours"]) * 3600e9 / size  # seconds of one checkpoint
    least, most = (deleted - begin) + (deleted - begin + 0.5), (deleted - begin + 1) + (now - begin + 1)
    assert least - 1.5 <= counted <= most
    assert Decimal(row["cost_usd"]) > 0
