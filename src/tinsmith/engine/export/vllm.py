"""Adapters as vLLM loads them (vllm serve --enable-lora).

vLLM names modules as the base's own files do, and wants two matrices of every expert of its own. It knows
one scaling, lora_alpha / r, so fused projections, whose factors have a higher rank, set r for all: the
others' matrices may have fewer rows than r. A module that it does not know makes it refuse the whole adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tinsmith.engine.adapter_files import PREFIX
from tinsmith.engine.export.wiring import Adapter, ExportError, Target

UNEMBEDDING = "lm_head"
# Those whose class in vLLM declares lm_head in `embedding_modules`.
_TAKES_UNEMBEDDING = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
        "Lfm2ForCausalLM",
    }
)
# Multi-head latent attention: vLLM makes other matrices of this one before it reads adapters.
_ABSORBED = "kv_b_proj"


def convert(
    adapter: Adapter, *, drop: set[str], keep: set[str]
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors of adapter_model.safetensors, fp32, what adapter_config.json says, and remarks.

    Modules (by the last part of their name) that vLLM refuses or ignores must be named in `drop`, and are
    left out, or in `keep`, for a vLLM that takes them. Raises ExportError, which names them.
    """
    leaves = {_leaf(target) for target in adapter.targets}
    for name in sorted((drop | keep) - leaves):
        raise ExportError(f"this adapter has no module {name!r}; it has: {', '.join(sorted(leaves))}")
    for name in sorted(drop & keep):
        raise ExportError(f"{name}: is in both drop and keep")
    refused = _refused(adapter, leaves)
    if adapter.base.tied and UNEMBEDDING in keep:
        raise ExportError(f"keep: {UNEMBEDDING} cannot be kept: {refused[UNEMBEDDING]}")
    open_ = {name: why for name, why in refused.items() if name not in drop | keep}
    if open_:
        reasons = "; ".join(f"{name}: {why}" for name, why in open_.items())
        flags = " ".join(f"--drop {name}" for name in open_)
        raise ExportError(
            f"vLLM does not take all of this adapter: {reasons}. Leave it out ({flags}; what is served then"
            " is not quite what was trained), or export a whole model (--format merged)"
        )
    targets = [target for target in adapter.targets if _leaf(target) not in drop]
    if not targets:
        raise ExportError("nothing is left of this adapter")
    rank = max(len(target.parts) for target in targets) * adapter.rank
    tensors: dict[str, Tensor] = {}
    for target in targets:
        for name, a, b in _matrices(target, adapter):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.model.name,
        "r": rank,
        "lora_alpha": adapter.alpha * (rank // adapter.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "target_modules": sorted({n.rpartition(".lora_")[0].rpartition(".")[2] for n in tensors}),
    }
    remarks = [f"serve it with --enable-lora --max-lora-rank {rank} or more"]
    if dropped := sorted(drop):
        remarks.append(f"left out: {', '.join(dropped)}. What is served is not quite what was trained")
    if any(target.experts for target in targets):
        remarks.append(
            "experts have two-dimensional matrices each; a model that vLLM keeps in three dimensions"
            " (is_3d_moe_weight) needs --enable-mixed-moe-lora-format for them"
        )
    return tensors, config, remarks


def _refused(adapter: Adapter, leaves: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if UNEMBEDDING in leaves and adapter.base.tied:
        found[UNEMBEDDING] = "the unembedding is tied to the embedding, and vLLM has no adapter of it then"
    elif UNEMBEDDING in leaves and adapter.base.architecture not in _TAKES_UNEMBEDDING:
        found[UNEMBEDDING] = (
            f"vLLM is not known to take an adapter of it for {adapter.base.architecture}"
            f" (--keep {UNEMBEDDING}, if yours does)"
        )
    if _ABSORBED in leaves:
        found[_ABSORBED] = "vLLM absorbs it into other matrices and ignores its adapter"
    return found


def _leaf(target: Target) -> str:
    """What a user calls it."""
    return UNEMBEDDING if target.is_unembedding else target.module.rpartition(".")[2]


def _matrices(target: Target, adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """vLLM's name of each module that a target is there, A [r, in] and B [out, r]."""
    if target.is_unembedding:
        yield (UNEMBEDDING, *adapter.factors(target))
        return
    pieces = adapter.base.pieces(target)
    names = [_renamed(piece.name.removesuffix(".weight"), target.module) for piece in pieces]
    if not target.experts:
        yield (names[0], *adapter.factors(target))
        return
    if len(pieces) == 1:  # experts are one tensor there
        parent = names[0].rpartition(".")[0]
        ups = ("gate_proj", "up_proj")[-len(target.parts) :]
        ends = ups if target.kind == "up" else ("down_proj",)
        names = [f"{parent}.{expert}.{end}" for end in ends for expert in range(target.experts)]
    for index, name in enumerate(names):
        part, expert = divmod(index, target.experts)
        yield (name, *adapter.part(target.parts[part], expert))


def _renamed(name: str, module: str) -> str:
    """A file's name of a module, below what transformers calls the model: so does vLLM."""
    theirs, ours = name.partition(".layers."), module.partition(".layers.")
    return f"{ours[0]}.layers.{theirs[2]}" if theirs[2] and ours[2] else name
