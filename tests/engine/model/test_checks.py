"""Which architectures are served is found out at load; what would be computed wrongly is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.tiny import SIZES, load, make_family
from tests.families import FAMILIES
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


@pytest.mark.parametrize("row", ["Qwen3Moe", "DeepseekV3", "GptOss"])
def test_routers_that_rounding_decides_change_no_path(row: str, tmp_path: Path) -> None:
    """In bf16 the experts of random routers are about equal, and other experts are another result."""
    larger = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    model = load(make_family(row, "ForCausalLM", tmp_path / row, {**FAMILIES[row], **larger}), torch.bfloat16)
    check(model)
    assert model.way == "packed"


def test_a_deep_model_may_round_more(tmp_path: Path) -> None:
    deep = {**FAMILIES["Qwen3"], "num_hidden_layers": 40, "initializer_range": 0.3}
    model = load(make_family("Qwen3", "ForCausalLM", tmp_path / "deep", deep), torch.bfloat16)
    check(model)
    assert model.way == "packed"
