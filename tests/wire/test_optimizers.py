"""Optimizers as the SDK really serializes them; what is wrong is named."""

from __future__ import annotations

import pytest
from tinker import types

from tests.wire.test_requests import _sent
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields
from tinsmith.wire.optimizers import (
    AdamParams,
    DimuonParams,
    Params,
    config_of,
    from_log,
    read_family,
    read_params,
    to_log,
)


def sent(params: object) -> Fields:
    return _sent(types.OptimStepRequest(optim_params=params, model_id="m", seq_id=4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "read"),
    [
        (types.AdamParams(learning_rate=2.0), AdamParams(2.0, 0.9, 0.95, 1e-12, 0.0, 0.0)),
        (types.AdamParams(beta1=0.5, weight_decay=0.1), AdamParams(1e-4, 0.5, 0.95, 1e-12, 0.1, 0.0)),
        (types.DimuonParams(learning_rate=1.0), DimuonParams(1.0, 0.0, 0.9, 1e-4, 0.175)),
        (types.DimuonParams(learning_rate=0, grad_clip_norm=-1, beta1=0), DimuonParams(0.0, -1.0, 0.0)),
    ],
)
def test_params_of_a_step(params: object, read: Params) -> None:
    assert read_params(sent(params)) == read
    assert from_log(to_log(read)) == read  # type: ignore[arg-type]


def test_a_step_that_was_logged_before_there_were_families_is_adamws() -> None:
    assert from_log({"learning_rate": 0.5}) == AdamParams(0.5)


def test_the_params_of_older_sdks() -> None:
    body = {"type": "dimuon", "learning_rate": 1, "damping": 0.01, "rank_lr_correction_exponent": 0}
    assert read_params(Fields({"optimizer_params": body})) == DimuonParams(1.0, 0.0, 0.9, 0.01, 0.0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "adam_params: is missing"),
        ({"adam_params": {"learning_rate": -1}}, "adam_params.learning_rate: must be at least 0"),
        ({"adam_params": {"beta1": 1.0}}, "adam_params.beta1"),
        ({"optimizer_params": {"type": "lion"}}, "optimizer_params.type: 'lion' is not offered"),
        ({"optimizer_params": {"type": {}}}, "optimizer_params.type"),
        ({"optimizer_params": {"type": "dimuon"}}, "optimizer_params.learning_rate: is missing"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": -1}}, "learning_rate: must be at least 0"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1, "beta1": 1}}, "beta1"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1, "damping": 0}}, "damping: must be grea"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": "x"}}, "learning_rate: must be a number"),
    ],
)
def test_wrong_params_are_named(body: dict[str, object], says: str) -> None:
    with pytest.raises(WireError, match=says):
        read_params(Fields(body))


@pytest.mark.parametrize(
    ("config", "family"),
    [(types.AdamOptimizerConfig(), "adamw"), (types.DimuonOptimizerConfig(), "dimuon")],
)
def test_the_family_of_a_run(config: types.OptimizerConfig, family: str) -> None:
    fields = _sent(
        types.CreateModelRequest(session_id="s", model_seq_id=0, base_model="m", optimizer_config=config)
    )
    assert read_family(fields) == family
    assert config_of(read_family(fields) or "adamw") == config.model_dump()


def test_no_family_is_no_wish() -> None:
    assert read_family(Fields({})) is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"type": "lion"}, "optimizer_config.type: 'lion' is not offered"),
        ({"type": "dimuon", "version": 2}, "optimizer_config.version: must be 1, not 2"),
        ("adamw", "optimizer_config: must be a JSON object"),
    ],
)
def test_a_wrong_family_is_named(config: object, says: str) -> None:
    with pytest.raises(WireError, match=says):
        read_family(Fields({"optimizer_config": config}))
