"""Which of transformers' modules the kernel takes over, and that it leaves the others alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.tiny import load, relative, tokens
from tests.families import make
from tinsmith.engine.kernels import elementwise as kernel
from tinsmith.engine.kernels.elementwise import NormStyle
from tinsmith.engine.model.fused import FusedNorm, fuse

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="no C++ compiler here")
BF16 = torch.bfloat16


def styles(module: torch.nn.Module) -> set[NormStyle]:
    return {m.style for m in module.modules() if isinstance(m, FusedNorm)}


@pytest.mark.parametrize(
    ("row", "style", "gates"),
    [
        ("Qwen3", NormStyle.ROUND_THEN_SCALE, True),
        ("Olmo3", NormStyle.SCALE, True),
        ("Qwen3_5MoeText", NormStyle.SCALE_BY_ONE_PLUS, True),
        ("Gemma3Text", NormStyle.SCALE_BY_ONE_PLUS, False),  # its gate is no silu
    ],
)
def test_every_family_gets_its_own_arithmetic(
    tmp_path: Path, row: str, style: NormStyle, gates: bool
) -> None:
    model = load(make(row, tmp_path), BF16)
    assert styles(model.module) == {style}
    mlps = [m for m in model.module.modules() if hasattr(m, "down_proj") and hasattr(m, "act_fn")]
    assert all(bool({"forward", "_apply_gate"} & vars(m).keys()) == gates for m in mlps)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / row, dtype=BF16, attn_implementation="eager")
    ids = torch.tensor(tokens(40, 0))
    with torch.no_grad():
        theirs = reference.base_model(ids[None]).last_hidden_state[0]
    assert relative(model.plain(ids), theirs) < 2e-2


def test_in_fp32_norms_stay_transformers_own(tmp_path: Path) -> None:
    assert styles(load(make("Qwen3", tmp_path)).module) == set()


def test_a_rotation_is_taken_over_inside_passes_alone(tmp_path: Path) -> None:
    model = load(make("GptOss", tmp_path))
    file = sys.modules[type(model.module).__module__]
    taken = file.apply_rotary_pos_emb
    assert taken.shared  # both halves of a head take the same cosines
    q, cos = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 8)
    outside = taken(q, q, cos, cos)
    assert torch.equal(outside[0], taken.original(q, q, cos, cos)[0])


class Odd(torch.nn.Module):
    """Looks like a norm, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(64, dtype=BF16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


def test_what_does_something_else_is_left_alone() -> None:
    root = torch.nn.Sequential(Odd())
    fuse(root, torch.device("cpu"), BF16)
    assert isinstance(root[0], Odd)
