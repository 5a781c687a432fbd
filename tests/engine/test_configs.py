"""Settings of configs that few models have, each of which changes what comes out: none may be overlooked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.reference import Reference
from tests.engine.test_sampler import PLENTY, ids, lps, run, sample, trainer_logprobs
from tests.engine.test_training import sequences, train
from tests.engine.tiny import SIZES, load, logprobs, make_family, make_run, relative, request, tokens
from tinsmith.engine.model.checks import check
from tinsmith.engine.sampler import Sampler

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What it is about: transformers' name of a family, settings of its config, and the path it takes.
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "logits are divided": ("Granite", {**SIZES, **SPECIAL, "logits_scaling": 8.0}, "packed"),
    "logits are multiplied": ("Cohere", {**SIZES, **SPECIAL, "logit_scale": 0.0625}, "packed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("configs")

    def get(row: str) -> Path:
        name, settings, _ = ROWS[row]
        place = root / row.replace(" ", "-")
        return place if place.exists() else make_family(name, "ForCausalLM", place, settings)

    return get


@pytest.mark.parametrize("row", ROWS)
def test_what_comes_out_is_what_transformers_gives(folder: Callable[[str], Path], row: str) -> None:
    model = load(folder(row))
    check(model)
    assert model.way == ROWS[row][2]
    trained = make_run(model)
    texts = sequences(0, (40, 5, 90))
    out = train(trained, request(texts))
    reference = Reference(folder(row), trained)
    reference.run_loss(texts, lambda _, lp: -lp.sum())
    for ours, text in zip(logprobs(out), texts, strict=True):
        assert relative(ours, reference.logprobs(text).detach()) < 1e-5
    assert trained.live.gradient is not None
    views = trained.layout.views(trained.live.gradient)
    for slot, theirs in reference.gradients().items():
        for mine, other in zip(views[slot], theirs, strict=True):
            assert relative(mine, other) < 1e-5, slot
    prompt = tokens(70, 1)
    (drawn,) = run(Sampler(model, PLENTY), (sample("s", prompt, max_tokens=20, stop=()), trained.weights))
    (sequence,) = drawn.sequences
    expected = trainer_logprobs(model, trained.weights, prompt + ids(sequence))[len(prompt) - 1 :]
    if model.way == "packed":
        assert np.array_equal(lps(sequence), expected)
    else:
        assert relative(lps(sequence), expected) < 1e-5
