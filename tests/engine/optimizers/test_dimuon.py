"""Dimuon against a plain implementation of its formula, and its state wherever a run's state goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.test_training import Folder, sequences, train
from tests.engine.tiny import load, make_run, metrics, relative, request
from tinsmith.engine import adapter_files
from tinsmith.engine.commands import AdamParams, DimuonParams
from tinsmith.engine.optimizers.dimuon import direction, matrix_sign
from tinsmith.engine.runs import Run
from tinsmith.wire.training import ContentError


def dimuon_run(folder: Folder, family: str = "qwen3", rank: int = 8) -> Run:
    run = make_run(load(folder(family)), rank)
    run.optimizer = "dimuon"
    return run


def plain_direction(m: Tensor, damping: float) -> Tensor:
    """One [r, n] matrix, in fp64, as the formula stands."""
    m = m.double()
    square = m**2
    rows = torch.diag((square.mean(1) / square.mean() + damping) ** -0.25)
    columns = torch.diag((square.mean(0) / square.mean() + damping) ** -0.25)
    x = rows @ m @ columns
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    d = rows @ x @ columns
    return d * len(m) ** 0.5 / d.norm()


@pytest.mark.parametrize("shape", [(1, 40), (4, 64), (32, 96), (8, 8), (32, 16)])
def test_direction_is_the_formulas(shape: tuple[int, int]) -> None:
    m = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    found = direction(m, 1e-4)
    assert relative(found, plain_direction(m, 1e-4)) < 1e-5
    assert float(found.norm()) == pytest.approx(shape[0] ** 0.5, rel=1e-5)
    assert float((found * m).sum()) > 0, "a step against it lowers the loss"


def test_direction_does_not_depend_on_the_gradients_scale() -> None:
    m = torch.randn(8, 64)
    for scale in (1e-15, 1e-6, 1e6, 1e15):
        assert relative(direction(m * scale, 1e-4), direction(m, 1e-4)) < 1e-4


def test_no_momentum_is_no_step() -> None:
    assert torch.equal(direction(torch.zeros(3, 4, 8), 1e-4), torch.zeros(3, 4, 8))


def test_experts_are_matrices_of_their_own() -> None:
    stack = torch.randn(5, 4, 24)
    stack[2] = 0
    for each, found in zip(stack, direction(stack, 1e-4), strict=True):
        assert torch.allclose(found, direction(each, 1e-4), atol=1e-6)


def test_the_sign_has_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(matrix_sign(torch.randn(16, 200)))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_steps_of_a_run_are_the_formulas(folder: Folder, family: str) -> None:
    run = dimuon_run(folder, family)
    expected = {n: [a.clone(), b.clone()] for n, (a, b) in run.layout.views(run.live.params).items()}
    momentum = torch.zeros_like(run.live.params)
    rate = 0.02 * (8 / 32) ** 0.175

    def step(weights: Tensor, moment: Tensor) -> None:
        """Of one matrix [r, n], or of one for each expert."""
        for w, m in zip(weights, moment, strict=True) if weights.dim() == 3 else [(weights, moment)]:
            if m.any():
                w -= rate * plain_direction(m, 1e-4)

    for seed in (1, 2):
        train(run, request(sequences(seed, (40, 9))))
        assert run.live.gradient is not None
        momentum = 0.9 * momentum + (1 - 0.9) * run.live.gradient
        for name, (m_a, m_b) in run.layout.views(momentum).items():
            step(expected[name][0], m_a)
            step(expected[name][1].mT, m_b.mT)
        assert run.optimize(DimuonParams(0.02))["unclipped_grad_l2:mean"] > 0
    for name, (a, b) in run.layout.views(run.live.params).items():
        assert relative(a, expected[name][0]) < 1e-4, name
        assert relative(b, expected[name][1]) < 1e-4, name
    assert (run.live.second, run.live.step) == (None, 2)


def test_it_trains(folder: Folder) -> None:
    run = dimuon_run(folder)
    losses = []
    for _ in range(6):
        losses.append(metrics(train(run, request(sequences(0))))["loss:sum"])
        run.optimize(DimuonParams(0.02))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_clipping_is_by_the_global_norm_and_off_at_zero_and_below(folder: Folder) -> None:
    moments = []
    for limit in (0.0, -1.0, 1e9, 0.5):
        run = dimuon_run(folder)
        train(run, request(sequences(0)))
        run.optimize(DimuonParams(0.02, grad_clip_norm=limit))
        assert run.live.first is not None
        moments.append(run.live.first)
    assert torch.equal(moments[0], moments[1])
    assert torch.equal(moments[0], moments[2])
    assert float(moments[3].norm()) == pytest.approx(0.5 * 0.1, rel=1e-3)


def test_nothing_accumulated_is_no_step(folder: Folder) -> None:
    run = dimuon_run(folder)
    before = run.live.params.clone()
    assert run.optimize(DimuonParams(1.0)) == {}
    assert torch.equal(run.live.params, before)
    assert run.live.first is None


@pytest.mark.parametrize("optimizer", ["adamw", "dimuon"])
def test_another_optimizers_parameters_are_refused_and_change_nothing(folder: Folder, optimizer: str) -> None:
    run = dimuon_run(folder)
    run.optimizer = optimizer  # type: ignore[assignment]
    train(run, request(sequences(0)))
    wrong: AdamParams | DimuonParams = DimuonParams(1.0) if optimizer == "adamw" else AdamParams()
    with pytest.raises(ContentError, match=f"of {wrong.family}, but this run .* {optimizer}; send"):
        run.optimize(wrong)
    assert run.live.gradient is not None
    assert run.live.step == 0


def test_a_rate_beyond_fp32_is_refused_and_changes_nothing(folder: Folder) -> None:
    run = dimuon_run(folder)
    train(run, request(sequences(0)))
    with pytest.raises(ContentError, match=r"learning_rate 1e\+300 goes beyond fp32"):
        run.optimize(DimuonParams(1e300))
    assert run.live.gradient is not None


def test_state_goes_on_bit_for_bit_from_a_folder(folder: Folder, tmp_path: Path) -> None:
    run = dimuon_run(folder)
    train(run, request(sequences(1)))
    run.optimize(DimuonParams(0.02))
    train(run, request(sequences(2)))
    path = str(tmp_path / "state")
    adapter_files.write(path, run.model, run.layout, run.live, optimizer="dimuon", gradients=True)
    assert adapter_files.read_optimizer(path) == "dimuon"
    back = dimuon_run(folder)
    back.replace(adapter_files.read(path, back.layout, back.model.device, optimizer=True, gradients=True))
    for each in (run, back):
        each.optimize(DimuonParams(0.02))
        train(each, request(sequences(3)))
        each.optimize(DimuonParams(0.02))
    assert torch.equal(run.live.params, back.live.params)
    assert run.live.first is not None
    assert back.live.first is not None
    assert torch.equal(run.live.first, back.live.first)
    assert (back.live.second, back.live.step) == (None, 3)
