"""Adapters as PEFT (0.17 and later) loads them over transformers' own model.

Linear layers have the usual two matrices. Weights of experts are three-dimensional parameters of one
module; PEFT targets them by `target_parameters`, as two matrices A [experts * r, in] and
B [out, r * experts], the expert being the slower index of A's rows and the faster one of B's columns.

PEFT renames some `target_modules` of models with experts, as if they were of transformers 4, and then
finds dense layers of those names no more. Such layers are targeted by their weight parameter, which gives
the same keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tinsmith.engine.adapter_files import PREFIX
from tinsmith.engine.export.wiring import Adapter, Target

_RENAMED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
# PEFT takes no adapter of these in models of these types, whose fast kernels would go past it. It takes a
# whole weight in the place of theirs.
_REFUSED_IN = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_REFUSED = frozenset({"out_proj", "conv1d"})


def convert(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors of adapter_model.safetensors, what adapter_config.json says, and remarks."""
    whole = [t for t in adapter.targets if _is_refused(t, adapter)]
    by_parameter = [t for t in adapter.targets if t not in whole and _by_parameter(t, adapter)]
    by_module = [t for t in adapter.targets if t not in whole and t not in by_parameter]
    tensors: dict[str, Tensor] = {}
    for target in (*by_parameter, *by_module):
        prefix = f"{PREFIX}{target.module}{'.base_layer' * _depth(target, adapter)}"
        a, b = adapter.factors(target)
        if target.experts:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1, 2)
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
    for target in whole:
        tensors[f"{PREFIX}{target.parameter}"] = adapter.base.read(target) + adapter.delta(target, None)
    names = {name for name, _ in adapter.model.module.named_modules()}
    parameters = {name for name, _ in adapter.model.module.named_parameters()}
    ranks = {
        **_patterns({t.module: len(t.parts) for t in by_module}, names, 1),
        **_patterns({t.parameter: len(t.parts) for t in by_parameter}, parameters, 2),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.model.name,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": short((t.module for t in by_module), names, 1),
        "target_parameters": short((t.parameter for t in by_parameter), parameters, 2),
        "modules_to_save": short((t.module for t in whole), names, 1) or None,
        "rank_pattern": {name: adapter.rank * parts for name, parts in ranks.items()},
        "alpha_pattern": {name: adapter.alpha * parts for name, parts in ranks.items()},
    }
    return tensors, config, _remarks(adapter, whole)


def _remarks(adapter: Adapter, whole: list[Target]) -> list[str]:
    found: list[str] = []
    if adapter.base.tied and any(t.is_unembedding for t in adapter.targets):
        found.append(
            "this model's unembedding is tied to its embedding: PEFT applies the adapter to the former alone,"
            " as it was trained, but merge_and_unload() would change both (--format merged does not)"
        )
    if whole:
        leaves = sorted({t.module.rpartition(".")[2] for t in whole})
        found.append(
            f"PEFT takes no adapter of {', '.join(leaves)} in this model; those weights are in the file whole"
        )
    return found


def short(wanted: Iterable[str], known: Iterable[str], parts: int) -> list[str]:
    """`wanted` by their last `parts` parts, where these mean the wanted ones and no others of `known`."""
    chosen = set(wanted)
    others = {_tail(name, parts) for name in set(known) - chosen}
    return sorted({tail if (tail := _tail(name, parts)) not in others else name for name in chosen})


def _patterns(parts_of: Mapping[str, int], known: Iterable[str], parts: int) -> dict[str, int]:
    """Those whose rank is another than the adapter's, by as few names as can be."""
    everything = set(known)
    found: dict[str, int] = {}
    for count in set(parts_of.values()) - {1}:
        of_count = (name for name, parts_there in parts_of.items() if parts_there == count)
        found.update(dict.fromkeys(short(of_count, everything, parts), count))
    return found


def _tail(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def _is_refused(target: Target, adapter: Adapter) -> bool:
    kind = getattr(adapter.model.module.config, "model_type", None)
    return kind in _REFUSED_IN and target.module.rpartition(".")[2] in _REFUSED


def _by_parameter(target: Target, adapter: Adapter) -> bool:
    has_experts = any(t.experts for t in adapter.targets)
    return bool(target.experts) or (has_experts and target.module.rpartition(".")[2] in _RENAMED)


def _depth(target: Target, adapter: Adapter) -> int:
    """How many wrappers lie around this one: the parameters of a module are wrapped in their own order."""
    module = adapter.model.module.get_submodule(target.module)
    order = [name for name, _ in module.named_parameters(recurse=False)]
    later = order[order.index(target.weight) + 1 :]
    return sum(t.module == target.module and t.weight in later for t in adapter.targets)
