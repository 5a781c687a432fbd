"""Continuous batching: the trainer's logprobs bit for bit, whatever the company, the cache and the room."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.tiny import load, make_run, tokens
from tinsmith.engine import sample_scheduler as module
from tinsmith.engine.commands import Done, Failed, Reply, Sample, SampleParams
from tinsmith.engine.kernels import attention
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment
from tinsmith.engine.model.recurrent import PackedRecurrence
from tinsmith.engine.sampler import Sampler
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.training import ContentError

Folder = Callable[[str], Path]
PLENTY = 1 << 28


def sample(name: str, prompt: Sequence[int], /, **options: object) -> Sample:
    """A request; options of SampleParams and of Sample together."""
    params = {k: options.pop(k) for k in list(options) if k in SampleParams.__dataclass_fields__}
    params.setdefault("seed", 1)
    return Sample(
        name,
        "m",
        None,
        np.asarray(prompt, np.int32).tobytes(),
        SampleParams(**params),
        **options,  # type: ignore[arg-type]
    )


def run(
    sampler: Sampler, *work: tuple[Sample, AdapterWeights | None], gap: int = 0
) -> list[pb.SampleResponse]:
    """Add all, `gap` steps apart, and step until all are answered."""
    replies: dict[str, Reply] = {}
    for command, weights in work:
        sampler.add(command, weights, lambda r, n=command.request: replies.setdefault(n, r))  # type: ignore[misc]
        for _ in range(gap):
            sampler.step()
    for _ in range(5000):
        if not sampler.step():
            break
    out = []
    for command, _ in work:
        reply = replies[command.request]
        assert isinstance(reply, Done), reply
        out.append(pb.SampleResponse.FromString(reply.payload))  # type: ignore[arg-type]
    assert sampler.pool.used == 0, "pages were left in use"
    return out


def ids(sequence: pb.SampledSequence) -> list[int]:
    return np.frombuffer(sequence.tokens, np.int32).tolist()


def lps(sequence: pb.SampledSequence) -> np.ndarray:
    return np.frombuffer(sequence.logprobs, np.float32)


def test_a_cache_has_its_places_at_once_and_its_memory_as_it_is_used(folder: Folder) -> None:
    """Who samples never waits until it has grown."""
    before = resident()
    sampler = Sampler(load(folder("qwen3")), 1 << 33)
    places = {store.data_ptr() for store in sampler.pool.keys.values()}
    run(sampler, (sample("s", tokens(400, 1), max_tokens=2), None))
    assert {store.data_ptr() for store in sampler.pool.keys.values()} == places
    assert sum(store.nbytes for store in sampler.pool.keys.values()) > 1 << 31
    assert resident() - before < 1 << 30


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def trainer_logprobs(model: BaseModel, weights: AdapterWeights | None, text: Sequence[int]) -> np.ndarray:
    """Logprobs of text[1:] by the trainer's packed pass."""
    n = len(text) - 1
    rows = pad_rows(n)
    inputs = torch.zeros(rows, dtype=torch.int64)
    positions = torch.zeros(rows, dtype=torch.int64)
    inputs[:n], positions[:n] = torch.tensor(text[:-1]), torch.arange(n)
    segment = Segment(0, rows, weights)
    attention = PackedSequences([(0, n)], rows, model.device, model.dtype)
    recurrent = PackedRecurrence([segment], [(0, n)], model.device) if model.apart else None
    with torch.no_grad():
        on = model.device
        this = Pass([segment], attention, recurrent, long=model.long_rows([(0, n, n)], rows))
        hidden = model.hidden(inputs.to(on), positions.to(on), this)
        table = model.log_softmax(model.logits(hidden, Pass([segment]))).cpu()
    return table[:n].gather(1, torch.tensor(text[1:])[:, None])[:, 0].numpy()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_room_that_is_not_used_costs_nothing(folder: Folder) -> None:
    """A model whose layers keep no keys has pages of no size, and so any number of them."""
    model = load(folder("qwen3"))
    model.attention_layers = {}
    pool = PagePool(model, 1 << 50)
    assert [pool.allocate() for _ in range(3)] == [1, 2, 3]
    assert pool.used == 3


class TestExact:
    @pytest.mark.parametrize("family", ["qwen3", "llama-tied", "qwen3-moe"])
    def test_logprobs_are_the_trainers_bit_for_bit(
        self, folder: Folder, family: str, dtype: torch.dtype
    ) -> None:
        model = load(folder(family), dtype)
        adapters = [None, *(make_run(model, r, seed=r).weights for r in (4, 8, 16))]
        work = [
            (sample(f"r{i}", tokens(n, i), max_tokens=20 + 9 * i, stop=(), seed=i, prompt_logprobs=True), w)
            for i, (n, w) in enumerate(zip((3, 150, 64, 65), adapters, strict=True))
        ]
        for (command, weights), out in zip(work, run(Sampler(model, PLENTY), *work, gap=3), strict=True):
            prompt = np.frombuffer(command.prompt, np.int32).tolist()
            (sequence,) = out.sequences
            expected = trainer_logprobs(model, weights, prompt + ids(sequence))
            assert np.array_equal(lps(sequence), expected[len(prompt) - 1 :])
            of_prompt = np.frombuffer(out.prompt_logprobs, np.float32)
            assert np.isnan(of_prompt[0])
            assert np.array_equal(of_prompt[1:], expected[: len(prompt) - 1])

    def test_company_chunks_and_room_change_no_token_and_no_bit(
        self, folder: Folder, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder("qwen3"), dtype)
        weights = make_run(model, 8).weights
        command = sample("me", tokens(140, 1), max_tokens=90, stop=(), seed=5, num_samples=3)
        (alone,) = run(Sampler(model, PLENTY), (command, weights))
        others = [
            (sample(f"o{i}", tokens(20 * i + 5, i), max_tokens=100, stop=(), seed=i), w)
            for i, w in enumerate((None, weights, make_run(model, 4, 9).weights, None))
        ]
        monkeypatch.setitem(module.PREFILL_ROWS, "cpu", 48)
        tight = Sampler(model, 14 * Sampler(model, PLENTY).pool.page_bytes)
        put_off: list[object] = []
        real = tight.scheduler.put_off
        monkeypatch.setattr(tight.scheduler, "put_off", lambda s: (put_off.append(s), real(s)))
        beside = run(tight, *others[:2], (command, weights), *others[2:], gap=2)[2]
        assert put_off, "the test wants a sequence that had to make room"
        for a, b in zip(alone.sequences, beside.sequences, strict=True):
            assert a.tokens == b.tokens
            assert a.logprobs == b.logprobs

    @pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "torch"])
    def test_numbers_that_are_not_finite_stay_with_their_sequence(
        self, folder: Folder, dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pages are used again: what a broken adapter left in them is nothing to who comes after."""
        if not by_kernel:
            monkeypatch.setattr(attention, "usable", lambda *_: False)
        model = load(folder("qwen3"), dtype)
        broken = make_run(model, 4)
        for name, (_, b) in broken.layout.views(broken.live.params).items():
            if name.endswith("v_proj"):
                b.fill_(float("inf"))
        weights = AdapterWeights(broken.layout, broken.live.params, dtype, model.device)
        command = sample("me", tokens(70, 1), max_tokens=20, stop=(), seed=5)
        (alone,) = run(Sampler(model, PLENTY), (command, None))
        sampler = Sampler(model, 4 * Sampler(model, PLENTY).pool.page_bytes)
        run(sampler, (sample("broken", tokens(150, 2), max_tokens=30, stop=(), seed=1), weights))
        sampler.release(weights)
        (after,) = run(sampler, (command, None))
        assert after.sequences[0].tokens == alone.sequences[0].tokens
        assert after.sequences[0].logprobs == alone.sequences[0].logprobs

    def test_a_cached_prefix_changes_no_bit(self, folder: Folder, dtype: torch.dtype) -> None:
        model = load(folder("qwen3"), dtype)
        sampler = Sampler(model, PLENTY)
        prompt = tokens(200, 1)
        first, second = (
            run(sampler, (sample(name, prompt, max_tokens=70, stop=(), seed=3), None))[0] for name in "ab"
        )
        assert first.prompt_cache_hit_tokens == 0
        assert second.prompt_cache_hit_tokens == 192
        assert first.sequences[0].logprobs == second.sequences[0].logprobs
        (longer,) = run(sampler, (sample("c", prompt + ids(first.sequences[0]), max_tokens=1), None))
        assert longer.prompt_cache_hit_tokens == 256
        (other,) = run(sampler, (sample("d", prompt, max_tokens=1), make_run(model, 4).weights))
        assert other.prompt_cache_hit_tokens == 0, "another adapter's pages"

    def test_samples_of_one_request_differ_and_repeat(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        outs = [
            run(Sampler(model, PLENTY), (sample("x", [1, 2, 3], num_samples=8, max_tokens=6, stop=()), None))[
                0
            ]
            for _ in range(2)
        ]
        texts = [[ids(s) for s in out.sequences] for out in outs]
        assert texts[0] == texts[1]
        assert len({tuple(t) for t in texts[0]}) > 4


class TestDecoding:
    @pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3-moe"])
    def test_greedy_is_transformers_generate(self, folder: Folder, family: str) -> None:
        model = load(folder(family))
        reference = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32)
        work = [
            (sample(f"g{i}", tokens(n, 50 + i), max_tokens=24 + 8 * i, stop=(), temperature=0.0), None)
            for i, n in enumerate((1, 63, 64, 129, 17))
        ]
        for (command, _), out in zip(work, run(Sampler(model, PLENTY), *work, gap=4), strict=True):
            prompt = torch.from_numpy(np.frombuffer(command.prompt, np.int32).astype(np.int64))[None]
            expected = reference.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=command.params.max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, prompt.shape[1] :]
            assert ids(out.sequences[0]) == expected.tolist()

    def test_top_k_top_p_and_temperature_shape_the_distribution(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        prompt = tokens(5, 2)
        table = model_table(model, prompt)
        order = np.argsort(-table)
        n = 600

        def draw(**options: object) -> list[int]:
            (out,) = run(
                Sampler(model, PLENTY), (sample("x", prompt, num_samples=n, max_tokens=1, **options), None)
            )
            return [ids(s)[0] for s in out.sequences]

        assert set(draw(top_k=3)) == set(order[:3].tolist())
        p = np.exp(table[order]).cumsum()
        nucleus = int(np.searchsorted(p, 0.3)) + 1
        assert set(draw(top_p=0.3)) <= set(order[:nucleus].tolist())
        assert set(draw(top_k=1)) == {int(order[0])}
        hot = np.bincount(draw(), minlength=512) / n
        assert np.abs(hot - np.exp(table)).max() < 0.08
        cold = draw(temperature=0.25)
        assert cold.count(int(order[0])) > 2 * n * np.exp(table[order[0]])

    def test_logprobs_are_of_the_distribution_at_the_temperature(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        prompt = tokens(9, 3)
        (out,) = run(
            Sampler(model, PLENTY), (sample("t", prompt, max_tokens=1, temperature=0.5, topk_sample=4), None)
        )
        table = torch.log_softmax(torch.from_numpy(model_table(model, prompt)) / 0.5, -1).numpy()
        (sequence,) = out.sequences
        assert lps(sequence)[0] == pytest.approx(table[ids(sequence)[0]], abs=1e-5)
        topk = sequence.topk_sampled_logprobs
        assert (topk.length, topk.k) == (1, 4)
        assert np.frombuffer(topk.logprobs, np.float32) == pytest.approx(np.sort(table)[::-1][:4], abs=1e-5)

    def test_topk_of_the_prompt(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        prompt = tokens(70, 3)
        (out,) = run(Sampler(model, PLENTY), (sample("t", prompt, max_tokens=1, topk_prompt=3), None))
        topk = out.topk_prompt_logprobs
        token_ids = np.frombuffer(topk.token_ids, np.int32).reshape(topk.length, topk.k)
        values = np.frombuffer(topk.logprobs, np.float32).reshape(topk.length, topk.k)
        assert token_ids.shape == (70, 3)
        assert (token_ids[0] == 0).all()
        assert (values[0] == -99999.0).all()
        expected = model_table(model, prompt[:-1])
        assert token_ids[-1].tolist() == np.argsort(-expected)[:3].tolist()


class TestStop:
    def greedy(self, model: BaseModel, **options: object) -> pb.SampleResponse:
        work = sample("s", tokens(12, 8), temperature=0.0, max_tokens=30, **options)
        return run(Sampler(model, PLENTY), (work, None))[0]

    def test_by_token_by_string_and_not_at_all(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        whole = ids(self.greedy(model, stop=()).sequences[0])
        assert len(whole) == 30
        stop = whole[10]
        out = self.greedy(model, stop=(stop,)).sequences[0]
        assert ids(out) == whole[: whole.index(stop) + 1]
        assert out.stop_reason == pb.STOP_REASON_STOP
        text = model.tokenizer.decode(whole[5:8])
        cut = ids(self.greedy(model, stop=(text,)).sequences[0])
        assert text in model.tokenizer.decode(cut)
        assert text not in model.tokenizer.decode(cut[:-1])
        model.eos_token_ids = (whole[4],)
        assert ids(self.greedy(model).sequences[0]) == whole[: whole.index(whole[4]) + 1]

    def test_without_max_tokens_it_goes_to_the_end_of_the_context(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        model.max_context = 90
        (out,) = run(Sampler(model, PLENTY), (sample("s", tokens(12, 8), stop=()), None))
        assert len(ids(out.sequences[0])) == 78
        assert out.sequences[0].stop_reason == pb.STOP_REASON_LENGTH


class TestRoom:
    def test_samples_share_the_prompts_pages(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        sampler = Sampler(model, PLENTY)
        sampler.add(sample("x", tokens(200, 1), num_samples=16, max_tokens=4, stop=()), None, lambda _: None)
        sampler.step()
        assert len(sampler.running) == 16
        assert sampler.pool.used == 3 + 16  # three full pages for all, a partial one each

    def test_cancel_frees_everything_at_once(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        sampler = Sampler(model, PLENTY)
        replies: list[Reply] = []
        sampler.add(sample("x", tokens(100, 1), num_samples=4, stop=()), None, replies.append)
        for _ in range(5):
            sampler.step()
        sampler.cancel("x")
        (reply,) = replies
        assert isinstance(reply, Failed)
        assert (reply.message, reply.category) == ("cancelled", "user")
        assert sampler.pool.used == 0
        assert sampler.pending == 0
        assert not sampler.step()

    def test_a_sequence_that_outgrows_the_cache_fails_with_the_numbers(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        sampler = Sampler(model, 0)  # four pages
        replies: list[Reply] = []
        sampler.add(sample("x", tokens(100, 1), max_tokens=300, stop=()), None, replies.append)
        while sampler.step():
            pass
        assert isinstance(replies[0], Failed)
        assert "256 tokens has no room" in replies[0].message
        run(sampler, (sample("y", tokens(100, 1), max_tokens=5, stop=()), None))
        with pytest.raises(ContentError, match="prompt of 300 tokens needs"):
            sampler.add(sample("z", tokens(300, 1), max_tokens=5), None, replies.append)

    def test_more_samples_than_run_at_a_time(self, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(folder("qwen3"))
        command = sample("x", tokens(70, 1), num_samples=20, max_tokens=5, stop=())
        (many,) = run(Sampler(model, PLENTY), (command, None))
        monkeypatch.setattr(module, "RUNNING", 6)
        (few,) = run(Sampler(model, PLENTY), (command, None))
        assert [s.logprobs for s in many.sequences] == [s.logprobs for s in few.sequences]

    def test_released_weights_leave_the_cache(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        sampler, weights = Sampler(model, PLENTY), make_run(model, 4).weights
        run(sampler, (sample("x", tokens(130, 1), max_tokens=2), weights))
        sampler.release(weights)
        (out,) = run(sampler, (sample("y", tokens(130, 1), max_tokens=2), weights))
        assert out.prompt_cache_hit_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 512]}, "prompt contains token 512"),
        ({"prompt": [-1]}, "prompt contains token -1"),
        (
            {"prompt": [1] * 500, "max_tokens": 13},
            "500 tokens and max_tokens is 13.*context of tests/qwen3, 512",
        ),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -5}, "top_k is -5"),
        ({"topk_sample": 513}, "topk_sample_logprobs is 513; .* from 0 to 512"),
        (
            {"topk_sample": 512, "max_tokens": 400, "num_samples": 400},
            "topk_sample_logprobs is 512; .* to 419",
        ),
        ({"stop": ("",)}, "stop contains an empty string"),
    ],
)
def test_bad_requests_are_refused_by_name(folder: Folder, options: dict, message: str) -> None:
    sampler = Sampler(load(folder("qwen3")), PLENTY)
    prompt = options.pop("prompt", [1, 2, 3])
    with pytest.raises(ContentError, match=message):
        sampler.add(sample("x", prompt, **options), None, lambda _: None)
    assert not sampler.pending


def model_table(model: BaseModel, prompt: Sequence[int]) -> np.ndarray:
    """Log-probabilities of what follows the prompt."""
    rows = pad_rows(len(prompt))
    inputs = torch.zeros(rows, dtype=torch.int64)
    inputs[: len(prompt)] = torch.tensor(prompt)
    positions = torch.arange(rows)
    segment = Segment(0, rows, None)
    with torch.no_grad():
        backend = PackedSequences([(0, len(prompt))], rows, model.device, model.dtype)
        hidden = model.hidden(inputs, positions, Pass([segment], backend))
        return model.log_softmax(model.logits(hidden, Pass([segment])))[len(prompt) - 1].numpy()


class TestUsage:
    """Every token is counted once, where it is computed."""

    def usage(self, sampler: Sampler, command: Sample) -> dict[str, int]:
        replies: list[Reply] = []
        sampler.add(command, None, replies.append)
        while not replies:
            sampler.step()
        return dict(replies[0].usage)

    def test_samples_of_one_prompt_share_its_prefill(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        wanted = sample("x", tokens(100, 1), num_samples=5, max_tokens=7, stop=())
        assert self.usage(sampler, wanted) == {"prefill": 100, "cached_prefill": 0, "sample": 35}

    def test_a_prefix_that_the_cache_has_is_counted_as_such(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        prompt = tokens(150, 1)
        self.usage(sampler, sample("x", prompt, max_tokens=1, stop=()))
        again = self.usage(sampler, sample("y", prompt, max_tokens=3, num_samples=2, stop=()))
        assert again == {"prefill": 150 - 128, "cached_prefill": 128, "sample": 6}

    def test_scoring_a_prompt_computes_all_of_it(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        prompt = tokens(150, 1)
        self.usage(sampler, sample("x", prompt, max_tokens=1, stop=()))
        again = self.usage(sampler, sample("y", prompt, max_tokens=1, stop=(), prompt_logprobs=True))
        assert again == {"prefill": 150, "cached_prefill": 0, "sample": 1}

    def test_what_had_to_make_room_and_was_computed_anew_counts_once(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), 0)
        sampler.pool.capacity = 6  # pages: two sequences of 250 tokens take turns
        replies: dict[str, Reply] = {}
        for name in "ab":
            command = sample(name, tokens(180, ord(name)), max_tokens=60, stop=())
            sampler.add(command, None, lambda r, n=name: replies.setdefault(n, r))  # type: ignore[misc]
        put_off = 0
        while len(replies) < 2:
            sampler.step()
            put_off += any(s.logprobs for s in sampler.waiting)
        assert put_off, "nothing had to make room"
        for reply in replies.values():
            assert isinstance(reply, Done)
            assert reply.usage == {"prefill": 180, "cached_prefill": 0, "sample": 60}
            assert pb.SampleResponse.FromString(reply.payload).prompt_cache_hit_tokens == 0  # type: ignore[arg-type]

    def test_a_cancelled_sample_counts_what_was_computed(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(module.PREFILL_ROWS, "cpu", 64)
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        replies: list[Reply] = []
        sampler.add(sample("x", tokens(100, 1), num_samples=4, stop=()), None, replies.append)
        sampler.add(sample("y", tokens(100, 2), stop=()), None, replies.append)
        sampler.add(sample("z", tokens(100, 3), stop=()), None, replies.append)
        sampler.step()  # 64 tokens of x
        sampler.step()  # 36 of x, which samples; 28 of y
        sampler.step()  # x samples; 64 of y
        for name in "xyz":
            sampler.cancel(name)
        assert [dict(reply.usage) for reply in replies] == [
            {"prefill": 100, "cached_prefill": 0, "sample": 8},
            {"prefill": 92, "cached_prefill": 0, "sample": 0},
            {"prefill": 0, "cached_prefill": 0, "sample": 0},
        ]

    def test_the_servers_own_fault_is_nobodys_usage(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        replies: list[Reply] = []
        sampler.add(sample("x", tokens(100, 1), stop=()), None, replies.append)
        sampler.step()
        monkeypatch.setattr(sampler, "_advance", lambda plan: 1 / 0)
        sampler.step()
        (reply,) = replies
        assert isinstance(reply, Failed)
        assert reply.category == "server"
        assert reply.usage == {}

    def test_when_it_was_started_and_when_its_first_token_came(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        replies: list[Reply] = []
        before = time.time()
        sampler.add(sample("x", tokens(100, 1), max_tokens=3, stop=()), None, replies.append)
        while not replies:
            sampler.step()
        times = replies[0].times
        assert before <= times["started"] <= times["first_token"] <= time.time()
