"""Layers that are computed again in the backward pass: the same bits, once each, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.engine.test_training import job_of, sequences
from tests.engine.tiny import load, make_run, request
from tests.families import make
from tinsmith.engine.commands import (
    CreateAdapter,
    Done,
    EngineConfig,
    Failed,
    ForwardBackward,
    LoraSpec,
    ModelSource,
    Reply,
)
from tinsmith.engine.engine import Engine
from tinsmith.engine.memory import Budget
from tinsmith.engine.model import recomputing
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.training import TrainingJob, peak_bytes, run_pass

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return lambda name: make(name, root)


def trained(model: BaseModel, most_bytes: int | None) -> list[TrainingJob]:
    """Two tenants in one pass."""
    runs = [make_run(model, rank, rank) for rank in (4, 20)]
    jobs = [job_of(run, request(sequences(i, (40, 5, 90)))) for i, run in enumerate(runs)]
    run_pass([(job, cut) for job in jobs for cut in job.cuts], most_bytes)
    return jobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["Qwen3", "GptOss", "DeepseekV3", "Qwen3_5Text", "Gemma2"])
def test_gradients_have_the_same_bits(family: Folder, name: str, dtype: torch.dtype) -> None:
    """Attention, experts, recurrent layers and the generic path: nothing is added twice or left out."""
    model = load(family(name), dtype)
    for kept, again in zip(trained(model, None), trained(model, 1), strict=True):
        assert kept.loss_sums == again.loss_sums
        assert all(np.array_equal(a, b) for a, b in zip(kept.outputs, again.outputs, strict=True))
        assert kept.gradients is not None
        assert again.gradients is not None
        assert kept.gradients.flat.any()
        assert torch.equal(kept.gradients.flat, again.gradients.flat)


def test_only_the_layers_inputs_are_kept(folder: Folder) -> None:
    model = load(folder("qwen3"))

    def kept(most_bytes: int | None) -> int:
        seen: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            trained(model, most_bytes)
        return sum(seen.values())

    # torch's checkpoint keeps what it is given in hooks of its own, so what is seen here is the rest.
    assert kept(1) < kept(None) / 2
    rows = 4096
    assert peak_bytes(model, rows, 512, True, recomputed=True) < peak_bytes(model, rows, 512, True)


class TestEngine:
    @pytest.fixture
    def engine(self, folder: Folder, tmp_path: Path) -> Engine:
        source = ModelSource("m", str(folder("qwen3")))
        return Engine(EngineConfig((source,), str(tmp_path), device="cpu", dtype="fp32", memory=1 << 30))

    def test_a_sequence_that_fits_in_no_other_way_is_computed_again(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = engine.models["m"]
        ids = sequences(0, (200,))
        need = peak_bytes(model, 208, 208, True)
        less = peak_bytes(model, 208, 208, True, recomputed=True)
        engine.residents.budget = Budget(engine.budget.adapters, engine.budget.cache, (need + less) // 2)
        replies: list[Reply] = []
        used: list[int] = []
        real = recomputing.checkpoint
        monkeypatch.setattr(recomputing, "checkpoint", lambda *a, **k: (used.append(1), real(*a, **k))[1])
        engine.submit(CreateAdapter("r", "m", LoraSpec(4, 1)), replies.append)
        engine.submit(ForwardBackward("r", 1, request(ids)), replies.append)
        while engine.step():
            pass
        assert all(isinstance(r, Done) for r in replies), replies
        assert used
        least = peak_bytes(model, 199, 199, True, recomputed=True)
        engine.residents.budget = Budget(engine.budget.adapters, engine.budget.cache, least - 1)
        engine.submit(ForwardBackward("r", 2, request(ids)), replies.append)
        while engine.step():
            pass
        assert isinstance(replies[-1], Failed)
        assert "has 199 tokens, for which a pass needs about" in replies[-1].message
