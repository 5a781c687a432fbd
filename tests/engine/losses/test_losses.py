"""Every loss: its value and gradient against the published formula, its inputs, and its bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.reference import Reference
from tests.engine.test_training import Folder, job_of, sequences, train
from tests.engine.tiny import load, logprobs, make_run, metrics, relative, request
from tinsmith.engine.losses import LOSSES, Loss
from tinsmith.engine.runs import Run
from tinsmith.engine.training import UNEMBED_ROWS
from tinsmith.wire.training import ContentError

LENGTHS = (20, 50, 330)  # the last one's logits do not exist all at once
Formula = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def ratio(lp: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    return (lp - x["logprobs"]).exp()


def ppo(lp: Tensor, x: Mapping[str, Tensor], low: float | Tensor, high: float | Tensor) -> Tensor:
    r, a = ratio(lp, x), x["advantages"]
    return -torch.minimum(r * a, torch.clamp(r, torch.as_tensor(low), torch.as_tensor(high)) * a).sum()


def gspo(lp: Tensor, x: Mapping[str, Tensor], low: float, high: float) -> Tensor:
    s = (lp - x["logprobs"])[x["sequence_ratio_mask"] != 0].mean().exp().detach()
    token, a = s * (lp - lp.detach()).exp(), x["advantages"]
    return -torch.minimum(token * a, token.clamp(low, high) * a).sum()


# name of the case -> loss, settings, inputs beside logprobs and advantages, formula
CASES: dict[str, tuple[str, dict[str, float], tuple[str, ...], Formula]] = {
    "importance_sampling": (
        "importance_sampling", {}, (), lambda lp, x: -(ratio(lp, x) * x["advantages"]).sum(),
    ),
    "ppo": ("ppo", {}, (), lambda lp, x: ppo(lp, x, 0.8, 1.2)),
    "ppo, own bounds": (
        "ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, (),
        lambda lp, x: ppo(lp, x, 0.9, 1.1),
    ),
    "ppo, bounds by token": (
        "ppo", {"clip_low_threshold": 0.1}, ("clip_low_threshold", "clip_high_threshold"),
        lambda lp, x: ppo(lp, x, x["clip_low_threshold"], x["clip_high_threshold"]),
    ),
    "cispo": (
        "cispo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}, (),
        lambda lp, x: -(ratio(lp, x).clamp(0.5, 1.5).detach() * lp * x["advantages"]).sum(),
    ),
    "cispo, bounds by token": (
        "cispo", {}, ("clip_low_threshold", "clip_high_threshold"),
        lambda lp, x: -(
            torch.clamp(ratio(lp, x), x["clip_low_threshold"], x["clip_high_threshold"]).detach()
            * lp * x["advantages"]
        ).sum(),
    ),
    "dro": (
        "dro", {"beta": 0.1}, (),
        lambda lp, x: -(lp * x["advantages"] - 0.05 * (lp - x["logprobs"]) ** 2).sum(),
    ),
    "gspo": ("gspo", {}, ("sequence_ratio_mask",), lambda lp, x: gspo(lp, x, 0.8, 1.2)),
    "gspo, own bounds": (
        "gspo", {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}, ("sequence_ratio_mask",),
        lambda lp, x: gspo(lp, x, 0.99, 1.01),
    ),
}  # fmt: skip


def inputs_for(
    reference: Reference, ids: list[list[int]], more: tuple[str, ...]
) -> list[dict[str, np.ndarray]]:
    """Inputs near the model's own logprobs, so that some ratios are clipped and others are not."""
    rng = np.random.default_rng(5)
    found = []
    for s in ids:
        n = len(s) - 1
        near = reference.logprobs(s).detach().numpy() + rng.normal(0.1, 0.3, n)
        inputs = {"logprobs": near, "advantages": rng.normal(size=n)}
        if "sequence_ratio_mask" in more:
            inputs["sequence_ratio_mask"] = (np.arange(n) >= n // 3).astype(np.float64)
        if "clip_low_threshold" in more:
            inputs["clip_low_threshold"] = rng.uniform(0.5, 0.9, n)
            inputs["clip_high_threshold"] = rng.uniform(1.1, 1.5, n)
        found.append({k: v.astype(np.float32) for k, v in inputs.items()})
    return found


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_formula_over_peft(folder: Folder, case: str) -> None:
    name, config, more, formula = CASES[case]
    run = make_run(load(folder("qwen3")))
    ids = sequences(3, LENGTHS)
    assert LENGTHS[-1] > UNEMBED_ROWS
    reference = Reference(folder("qwen3"), run)
    inputs = inputs_for(reference, ids, more)
    out = train(run, request(ids, name, inputs=inputs, config=config))
    tensors = [{k: torch.from_numpy(v) for k, v in x.items()} for x in inputs]
    total = reference.run_loss(ids, lambda i, lp: formula(lp, tensors[i]))
    assert set(metrics(out)) == {"loss:sum"}
    assert metrics(out)["loss:sum"] == pytest.approx(total, rel=1e-4)
    for ours, s in zip(logprobs(out), ids, strict=True):
        assert relative(ours, reference.logprobs(s).detach()) < 1e-5
    assert run.live.gradient is not None
    for slot, theirs in reference.gradients().items():
        for mine, other in zip(run.layout.views(run.live.gradient)[slot], theirs, strict=True):
            assert relative(mine, other) < 2e-5, slot


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("cispo", "gspo"))])
def test_gradient_is_the_slope_of_the_value(case: str) -> None:
    """By finite differences, for the losses that stop no gradient (the others' slope is another one)."""
    name, config, more, _ = CASES[case]
    loss = LOSSES[name]
    rng = np.random.default_rng(2)
    n = 40
    x = {"logprobs": rng.normal(-2, 0.5, n), "advantages": rng.normal(size=n)}
    for key, (low, high) in zip(more, ((0.5, 0.9), (1.1, 1.5)), strict=False):
        x[key] = rng.uniform(low, high, n)
    tensors = {k: torch.from_numpy(v) for k, v in x.items()}
    lp = torch.from_numpy(rng.normal(-2, 0.5, n)).requires_grad_(True)
    assert loss.value is not None
    settings = loss.settings(config)
    assert torch.autograd.gradcheck(
        lambda y: loss.value(y, tensors, settings).sum(), (lp,), eps=1e-7, atol=1e-5
    )


def test_gspo_moves_each_token_by_its_own_logprob_and_clips_whole_sequences() -> None:
    """The published property: s_t's gradient is s times that of the own token, and 0 where s is clipped."""
    loss = LOSSES["gspo"]
    assert loss.whole is not None
    lp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    for shift, kept in ((0.1, True), (0.5, False)):
        inputs = {
            "logprobs": lp.detach() - shift,
            "advantages": torch.tensor([1.0, 2.0, 0.5]),
            "sequence_ratio_mask": torch.tensor([0.0, 1.0, 1.0]),
        }
        value, _ = loss.whole(lp, inputs, loss.settings({}))
        (gradient,) = torch.autograd.grad(value.sum(), lp)
        expected = -np.exp(shift) * inputs["advantages"] if kept else torch.zeros(3)
        assert torch.allclose(gradient, expected)


@pytest.mark.parametrize("case", CASES)
def test_weights_multiply_the_loss_of_each_token(folder: Folder, case: str) -> None:
    """Of any loss, as the hosted service's documentation sends them along with advantages."""
    name, config, more, _ = CASES[case]
    ids = sequences(3, (20, 50))
    outs = []
    for weights in (None, [0.0, 1.0, 2.0], [1.0] * 3):
        run = make_run(load(folder("qwen3")))
        inputs = inputs_for(Reference(folder("qwen3"), run), ids, more)
        if weights is not None:
            for x in inputs:
                x["weights"] = np.resize(weights, len(x["logprobs"])).astype(np.float32)
        outs.append((metrics(train(run, request(ids, name, inputs=inputs, config=config))), inputs, run))
    (plain, inputs, run), (uneven, _, _), (ones, _, _) = outs
    assert ones == plain
    total = 0.0
    loss = LOSSES[name]
    for i, s in enumerate(ids):
        x = {k: torch.from_numpy(v) for k, v in inputs[i].items()}
        lp = Reference(folder("qwen3"), make_run(load(folder("qwen3")))).logprobs(s).detach()
        settings = loss.settings(config)
        value = loss.value(lp, x, settings) if loss.value else loss.whole(lp, x, settings)[0]  # type: ignore[misc]
        total += float((value * torch.from_numpy(np.resize([0.0, 1.0, 2.0], len(lp)))).sum())
    assert uneven["loss:sum"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "stable_reinforce"])
def test_chunks_of_a_call_have_the_same_metrics(folder: Folder, name: str) -> None:
    run = make_run(load(folder("qwen3")))
    loss = LOSSES[name]
    keys = []
    for ids in (sequences(1, (9, 4)), sequences(2, (30,))):
        inputs = [{key: [-0.5] * (len(s) - 1) for key in loss.required} for s in ids]
        keys.append(set(metrics(train(run, request(ids, name, inputs=inputs)))))
    assert keys[0] == keys[1]
    assert "loss:sum" in keys[0]
    assert all(key.count(":") == 1 for key in keys[0])


def test_a_datum_without_bounds_of_its_own_takes_the_calls(folder: Folder) -> None:
    """Also beside a datum that has them."""
    run = make_run(load(folder("qwen3")))
    ids = sequences(1, (9, 9))
    base = {"logprobs": [-9.0] * 8, "advantages": [1.0] * 8}
    bounds = {"clip_low_threshold": [0.5] * 8, "clip_high_threshold": [1.5] * 8}
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}
    mixed = metrics(train(run, request(ids, "ppo", inputs=[base, {**base, **bounds}], config=config)))
    plain = metrics(train(run, request(ids, "ppo", inputs=[base, base], config=config)))
    assert mixed == plain


class TestGspoInputs:
    @pytest.fixture
    def run(self, folder: Folder) -> Run:
        return make_run(load(folder("qwen3")))

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (None, "lacks 'sequence_ratio_mask', which gspo needs"),
            ([0.0] * 4, r"data\[0\].*'sequence_ratio_mask'\] is 0 everywhere; mark the sampled tokens"),
            ([1.0] * 3, r"'sequence_ratio_mask'\] has shape \[3\]"),
        ],
    )
    def test_a_wrong_mask_is_refused_by_name(self, run: Run, mask: list[float] | None, message: str) -> None:
        inputs: dict = {"logprobs": [-1.0] * 4, "advantages": [1.0] * 4}
        if mask is not None:
            inputs["sequence_ratio_mask"] = mask
        with pytest.raises(ContentError, match=message):
            job_of(run, request([[1, 2, 3, 4, 5]], "gspo", inputs=[inputs]))

    def test_a_ratio_that_overflows_accumulates_nothing(self, run: Run) -> None:
        inputs = {"logprobs": [-1000.0] * 4, "advantages": [-1.0] * 4, "sequence_ratio_mask": [1.0] * 4}
        with pytest.raises(ContentError, match="is not finite"):
            train(run, request([[1, 2, 3, 4, 5]], "gspo", inputs=[inputs]))
        assert run.live.gradient is None


def test_a_datums_result_does_not_depend_on_what_is_beside_it(folder: Folder) -> None:
    """A whole-datum loss too: bit for bit, in forward and in backward."""
    model = load(folder("qwen3"), torch.bfloat16)
    ids = sequences(4, (70, 300, 40))
    inputs = [
        {
            "logprobs": np.full(len(s) - 1, -6.0),
            "advantages": np.linspace(-1, 1, len(s) - 1),
            "sequence_ratio_mask": np.ones(len(s) - 1),
        }
        for s in ids
    ]
    together = logprobs(train(make_run(model), request(ids, "gspo", inputs=inputs)))
    for i, alone in enumerate(ids):
        run = make_run(model)
        out = logprobs(train(run, request([alone], "gspo", inputs=[inputs[i]])))[0]
        assert np.array_equal(out, together[i])


def test_every_loss_is_of_one_kind() -> None:
    for loss in LOSSES.values():
        assert isinstance(loss, Loss)
        assert (loss.value is None) != (loss.whole is None)
