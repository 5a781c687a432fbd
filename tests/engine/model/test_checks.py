"""Which architectures are served is found out at load; what would be computed wrongly is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.tiny import SIZES, load, make_family
from tinsmith.engine.model.base import ModelError
from tinsmith.engine.model.checks import check

HEAD = {"head_dim": 16}


@pytest.mark.parametrize(
    ("name", "suffix", "settings", "why"),
    [
        ("RecurrentGemma", "ForCausalLM", {**SIZES, **HEAD, "lru_width": 64}, "inside its layers"),
        ("MiniMax", "ForCausalLM", {**SIZES, **HEAD, "num_local_experts": 4}, "uses cache of its own"),
        (
            "GPT2",
            "LMHeadModel",
            {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 512},
            "no linear layer that an adapter could be put on",
        ),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(
    name: str, suffix: str, settings: dict, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=why) as refused:
        check(load(make_family(name, suffix, tmp_path / name, settings)))
    assert name in str(refused.value)
