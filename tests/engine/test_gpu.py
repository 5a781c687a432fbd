"""The engine on a GPU's kernels: on a GPU where there is one, else on the CPU in Triton's interpreter.

What is asked of them is what the CPU gives: losses, gradients, samples. Models and texts are tiny, since the
interpreter takes its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine import tiny
from tests.engine.test_training import job_of, train
from tests.engine.tiny import load, logprobs, make_run, relative, request, tokens
from tests.families import make
from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.runs import Run
from tinsmith.engine.training import TrainingJob, run_pass

pytest.importorskip("triton")
Folder = Callable[[str], Path]
CUDA = torch.cuda.is_available()
FAMILIES = ("Qwen3", "Qwen3Moe", "DeepseekV3", "GptOss")
TEXTS = (9, 70)


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
    return [(run, job_of(run, request(texts(i)))) for i, run in enumerate(runs)]


@pytest.mark.parametrize("name", FAMILIES)
def test_three_tenants_in_one_pass_get_what_they_get_on_the_cpu(
    family: Folder, on_gpu: Callable[[], None], name: str
) -> None:
    expected = tenants(load(family(name)))
    for _, job in expected:
        run_pass([(job, cut) for cut in job.cuts])
    on_gpu()
    together = tenants(load(family(name)))
    run_pass([(job, cut) for _, job in together for cut in job.cuts])
    for (_, ours), (run, theirs) in zip(together, expected, strict=True):
        assert ours.loss_sums == pytest.approx(theirs.loss_sums, rel=1e-5)
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert relative(a, b) < 1e-5
        assert ours.gradients is not None
        assert theirs.gradients is not None
        mine, others = (run.layout.views(g.flat) for g in (ours.gradients, theirs.gradients))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_deterministic_company_changes_no_bit(
    family: Folder, on_gpu: Callable[[], None], dtype: torch.dtype
) -> None:
    on_gpu()
    with gpu.deterministic():
        model = load(family("Qwen3"), dtype)
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
