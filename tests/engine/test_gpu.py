"""The engine on a GPU's kernels: on a GPU where there is one, else on the CPU in Triton's interpreter.

What is asked of them is what the CPU gives: losses, gradients, samples. Models and texts are tiny, since the
interpreter takes its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import tiny
from tests.engine.test_sampler import PLENTY, ids, lps, run, sample, trainer_logprobs
from tests.engine.test_training import job_of, train
from tests.engine.tiny import load, logprobs, make_run, relative, request, tokens
from tests.families import make
from tinsmith.engine import exactness_gpu
from tinsmith.engine.commands import AdamParams, Sample
from tinsmith.engine.exactness_gpu import failures_on_gpu
from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.optimizers.adamw import adamw, fused
from tinsmith.engine.runs import Run
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.training import TrainingJob, run_pass

pytest.importorskip("triton")
from tinsmith.engine.kernels import invariant

Folder = Callable[[str], Path]
CUDA = torch.cuda.is_available()
KIND = "cuda" if CUDA else "cpu"
FAMILIES = ("Qwen3", "Qwen3Moe", "DeepseekV3", "GptOss")
SLOW = pytest.mark.slow  # the interpreter takes seconds for what a GPU does in milliseconds
TEXTS = (9, 70)


def but(names: Iterable[str], *fast: str) -> list[Any]:
    """All names, of which `make test` takes these alone."""
    return [name if name in fast else pytest.param(name, marks=SLOW) for name in names]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("families")
    return lambda name: make(name, root)


@pytest.fixture
def on_gpu() -> Iterator[Callable[[], None]]:
    """Call it, and what is loaded from then on is on a GPU."""
    before, entered = tiny.DEVICE, []

    def enter() -> None:
        if CUDA:
            tiny.DEVICE = torch.device("cuda")
        else:
            entered.append(gpu.interpret())
            entered[-1].__enter__()

    yield enter
    tiny.DEVICE = before
    for context in entered:
        context.__exit__(None, None, None)


def texts(seed: int, lengths: tuple[int, ...] = TEXTS) -> list[list[int]]:
    return [tokens(n, 100 * seed + i) for i, n in enumerate(lengths)]


def tenants(model: BaseModel) -> list[tuple[Run, TrainingJob]]:
    """Adapters of several ranks, one of a rank that is no multiple of 16."""
    runs = [make_run(model, rank, rank) for rank in (4, 16, 20)]
    return [(each, job_of(each, request(texts(i)))) for i, each in enumerate(runs)]


@pytest.mark.parametrize("name", but(FAMILIES, "Qwen3", "GptOss"))
def test_three_tenants_in_one_pass_get_what_they_get_on_the_cpu(
    family: Folder, on_gpu: Callable[[], None], name: str
) -> None:
    expected = tenants(load(family(name)))
    for _, job in expected:
        run_pass([(job, cut) for cut in job.cuts])
    on_gpu()
    together = tenants(load(family(name)))
    run_pass([(job, cut) for _, job in together for cut in job.cuts])
    for (_, ours), (tenant, theirs) in zip(together, expected, strict=True):
        assert ours.loss_sums == pytest.approx(theirs.loss_sums, rel=1e-5)
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert relative(a, b) < 1e-5
        assert ours.gradients is not None
        assert theirs.gradients is not None
        mine, others = (tenant.layout.views(g.flat) for g in (ours.gradients, theirs.gradients))
        for slot in mine:
            for a, b in zip(mine[slot], others[slot], strict=True):
                assert relative(a, b) < 2e-5, slot


def test_one_tenant_alone_too(family: Folder, on_gpu: Callable[[], None]) -> None:
    body = request(texts(0))
    theirs = make_run(load(family("Qwen3")))
    expected = logprobs(train(theirs, body))
    on_gpu()
    ours = make_run(load(family("Qwen3")))
    for a, b in zip(logprobs(train(ours, body)), expected, strict=True):
        assert relative(a, b) < 1e-5
    assert relative(ours.live.gradient, theirs.live.gradient) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("GptOss", torch.bfloat16),
        pytest.param("Qwen3", torch.bfloat16, marks=SLOW),
        pytest.param("Qwen3Moe", torch.float32, marks=SLOW),
    ],
    ids=str,
)
def test_deterministic_company_changes_no_bit(
    family: Folder, on_gpu: Callable[[], None], name: str, dtype: torch.dtype
) -> None:
    on_gpu()
    with gpu.deterministic(), invariant.replaced(KIND):
        model = load(family(name), dtype)
        _, alone = tenants(model)[1]
        run_pass([(alone, cut) for cut in alone.cuts])
        company = tenants(model)
        run_pass([(job, cut) for _, job in company for cut in job.cuts])
    _, together = company[1]
    assert alone.loss_sums == together.loss_sums
    for a, b in zip(alone.outputs, together.outputs, strict=True):
        assert np.array_equal(a, b)
    assert alone.gradients is not None
    assert together.gradients is not None
    assert torch.equal(alone.gradients.flat, together.gradients.flat)


class TestSampling:
    """Through captured steps where there is a GPU; their buffers and what is computed from them are the same
    without one."""

    def work(self, model: BaseModel, **options: object) -> list[tuple[Sample, AdapterWeights | None]]:
        """Prompts of several lengths, one beyond a page and the window, on three adapters and none."""
        adapters = [None, *(make_run(model, rank, rank).weights for rank in (4, 20, 16))]
        return [
            (sample(f"s{i}", tokens(n, i), max_tokens=m, stop=(), seed=i, **options), w)
            for i, ((n, m), w) in enumerate(zip(((3, 5), (66, 4), (9, 6), (20, 3)), adapters, strict=True))
        ]

    @pytest.mark.parametrize("name", but(FAMILIES, "DeepseekV3", "GptOss"))
    def test_greedy_is_that_of_the_cpu(self, family: Folder, on_gpu: Callable[[], None], name: str) -> None:
        model = load(family(name))
        expected = run(Sampler(model, PLENTY), *self.work(model, temperature=0.0), gap=1)
        on_gpu()
        model = load(family(name))
        sampler = Sampler(model, PLENTY)
        for ours, theirs in zip(
            run(sampler, *self.work(model, temperature=0.0), gap=1), expected, strict=True
        ):
            assert ids(ours.sequences[0]) == ids(theirs.sequences[0])
            assert relative(lps(ours.sequences[0]), lps(theirs.sequences[0])) < 1e-5
        assert sampler.runner.decoder is not None
        assert sampler.runner.decoder._steps, "the decode steps went through it"
        assert not sampler.runner.decoder.trouble

    def test_draws_and_the_likeliest_tokens_too(self, family: Folder, on_gpu: Callable[[], None]) -> None:
        options = {"temperature": 0.7, "num_samples": 2, "topk_sample": 3, "prompt_logprobs": True}
        model = load(family("Qwen3"))
        expected = run(Sampler(model, PLENTY), self.work(model, **options)[2])
        on_gpu()
        model = load(family("Qwen3"))
        ours = run(Sampler(model, PLENTY), self.work(model, **options)[2])
        for a, b in zip(ours[0].sequences, expected[0].sequences, strict=True):
            assert ids(a) == ids(b), "the same uniforms give the same tokens"
            assert relative(lps(a), lps(b)) < 1e-5
            for field in ("token_ids", "logprobs"):
                kind = np.int32 if field == "token_ids" else np.float32
                mine, theirs = (np.frombuffer(getattr(x.topk_sampled_logprobs, field), kind) for x in (a, b))
                assert relative(mine, theirs) < 1e-5
        prompts = [np.frombuffer(x[0].prompt_logprobs, np.float32)[1:] for x in (ours, expected)]
        assert relative(*prompts) < 1e-5

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [pytest.param("Qwen3", torch.bfloat16, marks=SLOW), ("GptOss", torch.float32)],
        ids=str,
    )
    def test_deterministic_logprobs_are_the_trainers_bit_for_bit(
        self, family: Folder, on_gpu: Callable[[], None], name: str, dtype: torch.dtype
    ) -> None:
        on_gpu()
        with gpu.deterministic(), invariant.replaced(KIND):
            model = load(family(name), dtype)
            work = self.work(model, prompt_logprobs=True)[1:3]
            for (command, weights), out in zip(work, run(Sampler(model, PLENTY), *work, gap=2), strict=True):
                prompt = np.frombuffer(command.prompt, np.int32).tolist()
                (sequence,) = out.sequences
                expected = trainer_logprobs(model, weights, prompt + ids(sequence))
                assert np.array_equal(lps(sequence), expected[len(prompt) - 1 :])
                of_prompt = np.frombuffer(out.prompt_logprobs, np.float32)
                assert np.array_equal(of_prompt[1:], expected[: len(prompt) - 1])


@SLOW
def test_what_a_gpu_is_asked_at_start_holds_in_the_interpreter(
    family: Folder, on_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu()
    model = load(family("Qwen3"), torch.bfloat16)
    (reason,) = failures_on_gpu(model, 32)
    assert "without --deterministic" in reason
    monkeypatch.setattr(exactness_gpu, "failures", lambda *_: [])  # minutes in the interpreter
    with gpu.deterministic(), invariant.replaced(KIND):
        assert failures_on_gpu(model, 32) == []
        real = torch.nn.functional.linear
        monkeypatch.setattr(
            "tinsmith.engine.kernels.gpu_lora.F.linear",
            lambda x, *rest: real(x, *rest) * (1 + 1e-2 * (len(x) > 100)),
        )
        assert {"gradients", "logprobs in training"} <= set(failures_on_gpu(model, 32))


def test_adamw_by_torchs_fused_kernel_is_ours() -> None:
    settings = AdamParams(1e-2, 0.9, 0.95, 1e-8, 0.1)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(1000, generator=generator) for _ in range(2)]
    ours, theirs = ([start[0].clone(), torch.zeros(1000), torch.zeros(1000)] for _ in range(2))
    for step in (1, 2, 3):
        adamw(ours[0], start[1] * step, ours[1], ours[2], step, settings)
        fused(theirs[0], start[1] * step, theirs[1], theirs[2], step, settings)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-6
