"""What a request can ask of its prompt, against the trainer's own table of log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.engine.test_sampler import PLENTY, Folder, lps, run, sample
from tests.engine.tiny import load, make_run, tokens
from tinsmith.engine import sampler as module
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment
from tinsmith.engine.sampler import Sampler
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.targets import PromptTargets
from tinsmith.wire.training import ContentError


def table_of(model: BaseModel, prompt: Sequence[int], weights: AdapterWeights | None = None) -> np.ndarray:
    """Row i: log-probabilities of what follows prompt[: i + 1], by a packed pass of the trainer."""
    rows = pad_rows(len(prompt))
    inputs = torch.zeros(rows, dtype=torch.int64)
    inputs[: len(prompt)] = torch.tensor(prompt)
    segment = Segment(0, rows, weights)
    with torch.no_grad():
        backend = PackedSequences([(0, len(prompt))], rows, model.device, model.dtype)
        hidden = model.hidden(inputs, torch.arange(rows), Pass([segment], backend))
        return model.log_softmax(model.logits(hidden, Pass([segment])))[: len(prompt)].numpy()


def array(tensor: pb.Tensor) -> np.ndarray:
    kind = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64}[tensor.dtype]
    return np.frombuffer(tensor.dense, kind).reshape(tuple(tensor.shape))


def dense(ids: np.ndarray) -> PromptTargets:
    return PromptTargets(*ids.shape, ids.astype(np.int64).tobytes())


def sparse(ids: np.ndarray) -> PromptTargets:
    """The cells that are not -1, as the SDK's from_torch_sparse(pad_value=-1) sends them."""
    rows, cols = np.nonzero(ids != -1)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(ids)))])
    return PromptTargets(
        *ids.shape,
        ids[rows, cols].astype(np.int64).tobytes(),
        crow.astype(np.int64).tobytes(),
        cols.astype(np.int64).tobytes(),
    )


PROMPT = tokens(150, 3)  # more than two pages of the cache


@pytest.fixture(scope="module")
def some_ids() -> np.ndarray:
    """Ids in a third of the cells, none before row 60."""
    rng = np.random.default_rng(1)
    ids = np.where(rng.random((149, 5)) < 0.3, rng.integers(0, 512, (149, 5)), -1)
    ids[:60] = -1
    ids[60, 2], ids[148, 0] = 0, 511  # id 0 is an id like any other
    return ids


class TestTargets:
    def test_dense(self, folder: Folder, some_ids: np.ndarray) -> None:
        model = load(folder("qwen3"))
        weights = make_run(model, 8).weights
        (out,) = run(
            Sampler(model, PLENTY), (sample("t", PROMPT, max_tokens=1, targets=dense(some_ids)), weights)
        )
        table = table_of(model, PROMPT, weights)
        expected = np.where(some_ids >= 0, np.take_along_axis(table[:-1], some_ids.clip(0), 1), 0.0)
        assert np.array_equal(array(out.target_prompt_logprobs), expected.astype(np.float32))
        assert not out.HasField("topk_prompt_logprobs")
        assert not out.prompt_logprobs

    def test_sparse_has_the_layout_of_the_request(self, folder: Folder, some_ids: np.ndarray) -> None:
        model = load(folder("qwen3"))
        wanted = sparse(some_ids)
        (full,) = run(
            Sampler(model, PLENTY), (sample("d", PROMPT, max_tokens=1, targets=dense(some_ids)), None)
        )
        (out,) = run(Sampler(model, PLENTY), (sample("s", PROMPT, max_tokens=1, targets=wanted), None))
        tensor = out.target_prompt_logprobs
        assert tensor.WhichOneof("encoding") == "sparse_csr"
        assert list(tensor.shape) == [149, 5]
        assert (tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices) == (wanted.crow, wanted.col)
        values = np.frombuffer(tensor.sparse_csr.values, np.float32)
        assert np.array_equal(values, array(full.target_prompt_logprobs)[some_ids != -1])

    def test_rows_before_the_first_id_may_come_from_the_cache(
        self, folder: Folder, some_ids: np.ndarray
    ) -> None:
        """As the SDK promises: 'Rows before the first one that names an id are not scored.'"""
        model = load(folder("qwen3"))
        late = some_ids.copy()
        late[:128] = -1
        late[128, 0] = 7
        sampler = Sampler(model, PLENTY)
        (fresh,) = run(sampler, (sample("a", PROMPT, max_tokens=1, targets=dense(late)), None))
        (again,) = run(sampler, (sample("b", PROMPT, max_tokens=1, targets=dense(late)), None))
        (early,) = run(sampler, (sample("c", PROMPT, max_tokens=1, targets=dense(some_ids)), None))
        hits = [x.prompt_cache_hit_tokens for x in (fresh, again, early)]
        assert hits == [0, 128, 0]
        assert again.target_prompt_logprobs == fresh.target_prompt_logprobs

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (np.zeros((148, 1)), "has 148 rows; it must have 149"),
            (np.full((149, 2), -1), "names no token id"),
            (np.zeros((149, 0)), "names no token id"),
            (np.full((149, 1), 512), "contains 512; the vocabulary has ids 0 to 511"),
            (np.full((149, 1), -2), "contains -2"),
            (np.zeros((149, 30000)), "has 30000 columns"),
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, folder: Folder, ids: np.ndarray, message: str) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        with pytest.raises(ContentError, match=f"target_prompt_logprobs {message}"):
            sampler.add(sample("x", PROMPT, targets=dense(ids)), None, lambda _: None)
        assert not sampler.requests


class TestLastN:
    def test_scores_the_end_alone_and_takes_the_rest_from_the_cache(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        sampler = Sampler(model, PLENTY)
        asked = {"max_tokens": 1, "prompt_logprobs": True, "topk_prompt": 2}
        (whole,) = run(sampler, (sample("w", PROMPT, **asked), None))
        (last,) = run(sampler, (sample("l", PROMPT, prompt_logprobs_last_n=20, **asked), None))
        full, short = (np.frombuffer(x.prompt_logprobs, np.float32) for x in (whole, last))
        assert np.isnan(short[:130]).all()
        assert np.array_equal(short[130:], full[130:])
        assert (whole.prompt_cache_hit_tokens, last.prompt_cache_hit_tokens) == (0, 128)
        ids, values = (
            [
                np.frombuffer(getattr(x.topk_prompt_logprobs, name), kind).reshape(150, 2)
                for x in (whole, last)
            ]
            for name, kind in (("token_ids", np.int32), ("logprobs", np.float32))
        )
        assert (ids[1][:130] == 0).all()
        assert (values[1][:130] == -99999.0).all()
        assert np.array_equal(ids[1][130:], ids[0][130:])
        assert np.array_equal(values[1][130:], values[0][130:])

    @pytest.mark.parametrize("n", [1, 149])
    def test_from_one_to_all_but_the_first(self, folder: Folder, n: int) -> None:
        asked = {"max_tokens": 1, "prompt_logprobs": True}
        model = load(folder("qwen3"))
        (out,) = run(Sampler(model, PLENTY), (sample("l", PROMPT, prompt_logprobs_last_n=n, **asked), None))
        found = np.frombuffer(out.prompt_logprobs, np.float32)
        assert np.isnan(found).tolist() == [True] * (150 - n) + [False] * n

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt_logprobs_last_n": 1}, "goes with prompt_logprobs"),
            ({"prompt_logprobs_last_n": 0, "prompt_logprobs": True}, "is 0; it must be from 1 to 149"),
            ({"prompt_logprobs_last_n": 150, "prompt_logprobs": True}, "is 150; it must be from 1 to 149"),
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, folder: Folder, options: dict, message: str) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        with pytest.raises(ContentError, match=f"prompt_logprobs_last_n {message}"):
            sampler.add(sample("x", PROMPT, **options), None, lambda _: None)


class TestDraws:
    def test_have_the_models_logprobs_and_follow_its_distribution(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        prompt, k = tokens(6, 3), 4000
        (out,) = run(Sampler(model, PLENTY), (sample("d", prompt, max_tokens=1, alt_tokens=k), None))
        drawn, logprobs = array(out.prompt_alt_tokens.tokens), array(out.prompt_alt_tokens.logprobs)
        assert drawn.shape == logprobs.shape == (5, k)
        table = table_of(model, prompt)[:-1]
        assert np.array_equal(logprobs, np.take_along_axis(table, drawn, 1))
        for row, expected in zip(drawn, np.exp(table), strict=True):
            assert np.abs(np.bincount(row, minlength=512) / k - expected).max() < 0.03
        assert len({tuple(row[:8]) for row in drawn}) == 5

    def test_temperature_applies_to_the_draws_and_zero_is_the_most_likely(self, folder: Folder) -> None:
        model = load(folder("qwen3"))
        prompt = tokens(6, 3)
        best = table_of(model, prompt)[:-1].argmax(1)

        def share(temperature: float) -> float:
            options = {"max_tokens": 1, "alt_tokens": 500, "temperature": temperature}
            (out,) = run(Sampler(model, PLENTY), (sample("d", prompt, **options), None))
            return float((array(out.prompt_alt_tokens.tokens) == best[:, None]).mean())

        assert share(0.0) == 1.0
        assert share(0.2) > 2 * share(1.0)

    def test_the_seed_decides_and_sampling_draws_other_numbers(self, folder: Folder) -> None:
        model = load(folder("qwen3"))

        def draw(seed: int, **more: object) -> pb.SampleResponse:
            command = sample("d", PROMPT, seed=seed, max_tokens=8, stop=(), alt_tokens=3, **more)
            return run(Sampler(model, PLENTY), (command, None))[0]

        first = draw(1)
        assert draw(1).prompt_alt_tokens == first.prompt_alt_tokens
        assert draw(2).prompt_alt_tokens != first.prompt_alt_tokens
        plain = run(Sampler(model, PLENTY), (sample("p", PROMPT, seed=1, max_tokens=8, stop=()), None))[0]
        assert plain.sequences[0].tokens == first.sequences[0].tokens
        many = draw(1, num_samples=3)
        assert many.prompt_alt_tokens == first.prompt_alt_tokens

    def test_a_width_beyond_bounds_is_refused_by_name(self, folder: Folder) -> None:
        sampler = Sampler(load(folder("qwen3")), PLENTY)
        with pytest.raises(ContentError, match="prompt_alt_tokens_k is 1000000; for a prompt of 150 tokens"):
            sampler.add(sample("x", PROMPT, alt_tokens=10**6), None, lambda _: None)
        with pytest.raises(ContentError, match=r"topk_prompt_logprobs is 513; .* from 0 to 512"):
            sampler.add(sample("x", PROMPT, topk_prompt=513), None, lambda _: None)


ALL = {
    "max_tokens": 4,
    "stop": (),
    "prompt_logprobs": True,
    "topk_prompt": 3,
    "alt_tokens": 2,
    "num_samples": 2,
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "qwen3.5"])
def test_chunks_company_and_room_change_nothing(
    folder: Folder, family: str, some_ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder(family), torch.bfloat16)
    command = sample("me", PROMPT, targets=sparse(some_ids), **ALL)
    (alone,) = run(Sampler(model, PLENTY), (command, None))
    others = [
        (sample(f"o{i}", tokens(30 + 40 * i, i), max_tokens=60, stop=(), seed=i, alt_tokens=1), None)
        for i in range(5)
    ]
    if family != "qwen3.5":  # whose prompts go in chunks of one size, whatever the budget
        monkeypatch.setattr(module, "PREFILL_ROWS", {"cpu": 48})
    crowded = Sampler(model, 9 * Sampler(model, PLENTY).pool.page_bytes if family == "qwen3" else PLENTY)
    together = run(crowded, *others[:3], (command, None), *others[3:], gap=2)[3]
    together.prompt_cache_hit_tokens = alone.prompt_cache_hit_tokens
    assert together == alone


def test_a_prompt_of_one_token_has_nothing_to_score(folder: Folder) -> None:
    model = load(folder("qwen3"))
    asked = {"max_tokens": 1, "prompt_logprobs": True, "topk_prompt": 2, "alt_tokens": 3}
    (out,) = run(Sampler(model, PLENTY), (sample("one", [5], **asked), None))
    assert np.isnan(np.frombuffer(out.prompt_logprobs, np.float32)).tolist() == [True]
    assert (out.topk_prompt_logprobs.length, out.topk_prompt_logprobs.k) == (1, 2)
    assert array(out.prompt_alt_tokens.tokens).shape == (0, 3)
    assert len(lps(out.sequences[0])) == 1
