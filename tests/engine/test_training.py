"""Training against transformers + PEFT, and against itself in other company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.reference import Reference
from tests.engine.tiny import FAMILIES, load, logprobs, make_run, metrics, relative, request, threads, tokens
from tinsmith.engine.commands import AdamParams
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.runs import Run
from tinsmith.engine.training import TrainingJob, run_pass
from tinsmith.wire.training import ContentError, decode_request

Folder = Callable[[str], Path]
LENGTHS = (5, 70, 34, 2, 130)


def job_of(run: Run, body: bytes) -> TrainingJob:
    return TrainingJob(decode_request(body, "identity", 1 << 28), run.model, run.layout, run.weights)


def train(run: Run, body: bytes) -> bytes:
    """One request from beginning to end, by itself."""
    job = job_of(run, body)
    for cut in job.cuts:
        run_pass([(job, cut)])
        job.next += 1
    result = job.result()
    if job.gradients is not None:
        run.accumulate(job.gradients)
    return result


def sequences(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [tokens(n, seed * 100 + i) for i, n in enumerate(lengths)]


def weights_for(ids: list[list[int]], seed: int = 7) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=len(s) - 1).astype(np.float32) for s in ids]


class TestAgainstPeft:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_loss_logprobs_and_every_gradient_are_those_of_peft(self, folder: Folder, family: str) -> None:
        run = make_run(load(folder(family)))
        ids, weights = sequences(), weights_for(sequences())
        out = train(run, request(ids, inputs=[{"weights": w} for w in weights]))
        reference = Reference(folder(family), run)
        total = reference.run_loss(ids, lambda i, lp: -(lp * torch.from_numpy(weights[i])).sum())
        assert metrics(out)["loss:sum"] == pytest.approx(total, rel=1e-5)
        for ours, s in zip(logprobs(out), ids, strict=True):
            assert relative(ours, reference.logprobs(s).detach()) < 1e-5
        assert run.live.gradient is not None
        ours_by_slot = run.layout.views(run.live.gradient)
        for name, theirs in reference.gradients().items():
            for mine, other in zip(ours_by_slot[name], theirs, strict=True):
                assert other.norm() > 0
                assert relative(mine, other) < 1e-5, name

    @pytest.mark.parametrize("family", ["llama-tied", "qwen3", "qwen3-moe"])
    def test_several_adamw_steps_stay_with_torchs(self, folder: Folder, family: str) -> None:
        run = make_run(load(folder(family)))
        reference = Reference(folder(family), run)
        optimizer = torch.optim.AdamW(
            reference.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01
        )
        params = AdamParams(1e-3, 0.9, 0.95, 1e-8, 0.01, grad_clip_norm=1.0)
        for step in range(4):
            ids = sequences(step, (40, 9))
            train(run, request(ids))
            run.optimize(params)
            reference.run_loss(ids, lambda _, lp: -lp.sum())
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ours = run.layout.views(run.live.params)
        for name, pair in reference.leaves.items():
            for mine, other in zip(ours[name], pair, strict=True):
                assert relative(mine, other.detach()) < 1e-4, name

    def test_bf16_is_close_to_transformers_in_bf16(self, folder: Folder) -> None:
        run = make_run(load(folder("qwen3"), torch.bfloat16))
        ids = sequences()
        out = train(run, request(ids))
        reference = Reference(folder("qwen3"), run, torch.bfloat16)
        reference.run_loss(ids, lambda _, lp: -lp.sum())
        for ours, s in zip(logprobs(out), ids, strict=True):
            assert relative(ours, reference.logprobs(s).detach()) < 2e-2
        assert run.live.gradient is not None
        mine = torch.cat([x.flatten() for p in run.layout.views(run.live.gradient).values() for x in p])
        other = torch.cat([x.flatten() for p in reference.gradients().values() for x in p])
        assert relative(mine, other) < 2e-2


class TestExactness:
    """What a request computes is bitwise its own affair."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llama-tied", "qwen3", "qwen3-moe"])
    @pytest.mark.parametrize("count", [1, 2])
    def test_seven_other_tenants_change_no_bit(
        self, folder: Folder, family: str, dtype: torch.dtype, count: int
    ) -> None:
        with threads(count):
            self.seven_other_tenants(load(folder(family), dtype))

    def seven_other_tenants(self, model: BaseModel) -> None:
        body = request(sequences(0))

        def tenant(seed: int, rank: int) -> tuple[Run, TrainingJob]:
            run = make_run(model, rank, seed)
            other = body if seed == 1 else request(sequences(seed, (11 * seed, 3, 90)))
            return run, job_of(run, other)

        _, alone = tenant(1, 8)
        for cut in alone.cuts:
            run_pass([(alone, cut)])
        company = [
            tenant(s, r) for s, r in zip((5, 3, 1, 2, 8, 6, 7, 4), (4, 16, 8, 1, 8, 3, 32, 8), strict=True)
        ]
        run_pass([(job, cut) for _, job in company for cut in job.cuts])
        together = company[2][1]
        assert alone.loss_sums == together.loss_sums
        for a, b in zip(alone.outputs, together.outputs, strict=True):
            assert np.array_equal(a, b)
        assert alone.gradients is not None
        assert together.gradients is not None
        assert torch.equal(alone.gradients.flat, together.gradients.flat)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_chunks_of_a_call_give_the_same_outputs_and_the_same_sum(
        self, folder: Folder, dtype: torch.dtype
    ) -> None:
        model, ids = load(folder("qwen3"), dtype), sequences(2)
        whole, split = make_run(model), make_run(model)
        first = logprobs(train(whole, request(ids)))
        second = [x for part in (ids[:2], ids[2:]) for x in logprobs(train(split, request(part)))]
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert relative(split.live.gradient, whole.live.gradient) < 1e-6

    def test_forward_gives_the_logprobs_of_forward_backward(self, folder: Folder) -> None:
        run = make_run(load(folder("qwen3"), torch.bfloat16))
        ids = sequences(4)
        forward = logprobs(train(run, request(ids, forward_only=True)))
        assert run.live.gradient is None
        backward = logprobs(train(run, request(ids)))
        assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


class TestContent:
    """Bad content is refused with its field and the remedy, and nothing is accumulated."""

    @pytest.fixture
    def run(self, folder: Folder) -> Run:
        return make_run(load(folder("qwen3")))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"loss_fn": "hinge"}, "loss_fn 'hinge' is not known"),
            ({"config": {"beta": 1.0}}, r"loss_fn_config\['beta'\] is not known to cross_entropy"),
            ({"inputs": [{"weights": [np.nan] * 4}]}, r"\['weights'\] contains NaN"),
            ({"inputs": [{"weights": [1.0] * 3}]}, r"\['weights'\] has shape \[3\]; it must have that of"),
            ({"inputs": [{"advantages": [1.0] * 4}]}, r"\['advantages'\] is not known to cross_entropy"),
            ({"inputs": [{"a": [1.0] * 4, "b": [1.0] * 4}]}, r"\['a', 'b'\] is not known to cross_entropy"),
            (
                {"loss_fn": "importance_sampling"},
                "lacks 'logprobs', 'advantages', which importance_sampling needs",
            ),
            ({"sequences": [[1, 2, 600, 3, 4]]}, "contains token 600; the vocabulary"),
            ({"sequences": [[1, 2, 3, 4, 512]]}, r"\['target_tokens'\] contains 512"),
            ({"sequences": [[1] * 600]}, "has 599 tokens; the context of tests/qwen3 is 512"),
            ({"sequences": [[1]]}, r"data\[0\].model_input is empty"),
            ({"sequences": []}, "data is empty"),
        ],
    )
    def test_is_refused_by_name(self, run: Run, change: dict, message: str) -> None:
        arguments = {"sequences": [[1, 2, 3, 4, 5]], **change}
        with pytest.raises(ContentError, match=message):
            job_of(run, request(**arguments))

    def test_a_loss_that_overflows_accumulates_nothing(self, run: Run) -> None:
        inputs = [{"logprobs": [-1000.0] * 4, "advantages": [1.0] * 4}]
        with pytest.raises(ContentError, match="is not finite"):
            train(run, request([[1, 2, 3, 4, 5]], "importance_sampling", inputs=inputs))
        assert run.live.gradient is None


def test_targets_may_be_several_per_position(folder: Folder) -> None:
    model: BaseModel = load(folder("qwen3"))
    run = make_run(model)
    ids = tokens(6, 1)
    from tests.engine.tiny import tensor
    from tinsmith.wire import tinsmith_pb2 as pb

    message = pb.ForwardBackwardRequest.FromString(request([ids]))
    single = logprobs(train(run, request([ids])))[0]
    both = np.stack([ids[1:], ids[:-1]], axis=1)
    message.data[0].loss_fn_inputs["target_tokens"].CopyFrom(tensor(both, np.int64))
    message.data[0].loss_fn_inputs["weights"].CopyFrom(tensor(np.tile([1.0, 0.0], (5, 1))))
    run.live.gradient = None
    out = logprobs(train(run, message.SerializeToString()))[0]
    assert out.shape == (5, 2)
    assert np.array_equal(out[:, 0], single)
