"""Which layers of a model have adapters, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tinsmith.engine.model.errors import ModelError
from tinsmith.engine.model.experts import expert_slots
from tinsmith.engine.model.lora import GateLinear, Group, LoraLinear, Slot

UNEMBED = "model.unembed_tokens"  # the name that Tinker's adapter format gives the unembedding


def replace(module: Any, mixers: Sequence[str], inner: str, generic: bool) -> Iterator[Slot]:
    """Put adapters' layers in the place of the linear layers and experts; yields their slots in order.

    `inner` names the language model where that is a part among others: nothing else is replaced then, and
    its slots are called as if it were the whole. What lies inside a mixer, or a module that has called the
    attention interface, counts as attention; on the generic path, what is called so.
    """
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError("the model has no linear unembedding")
    attention = [
        *mixers,
        *(
            name
            for name, child in module.named_modules()
            if hasattr(child, "tinsmith_attends") or (generic and "Attention" in type(child).__name__)
        ),
    ]
    routers = set(_routers(module))
    for name, child in list(module.named_modules()):
        if name in routers:
            continue
        if inner and child is not head and not name.startswith(f"{inner}."):
            continue
        public = f"model{name[len(inner) :]}" if inner else name
        if has_experts(child):
            child.tinsmith_name = public
            yield from expert_slots(public, child)
        elif type(child).forward is nn.Linear.forward:  # a router may be one with a forward of its own
            parent, _, leaf = name.rpartition(".")
            if leaf.endswith("gate") and child.out_features == 1:
                # It weighs a shared expert, as a router does: no adapter.
                setattr(module.get_submodule(parent), leaf, GateLinear(child))
                continue
            owner = next((a for a in attention if name.startswith(f"{a}.")), None)
            group: Group = "unembed" if child is head else "mlp" if owner is None else "attn"
            parts = {UNEMBED: child.out_features} if child is head else {public: child.out_features}
            if owner in mixers:
                parts = _parts(public, child, module.get_submodule(owner))
            slots = [Slot(part, group, child.in_features, size) for part, size in parts.items()]
            setattr(module.get_submodule(parent), leaf, LoraLinear(child, slots))
            yield from slots


def has_experts(module: Any) -> bool:
    """Whether a module is transformers' experts of a layer, its weights of three dimensions."""
    return all(hasattr(module, name) for name in ("_apply_gate", "down_proj", "is_transposed"))


def _routers(module: nn.Module) -> Iterator[str]:
    """The linear layers beside experts with an output for each of them, and what is called a router."""
    for name, parent in module.named_modules():
        counts = {len(child.down_proj) for child in parent.children() if has_experts(child)}
        for leaf, child in parent.named_children():
            called = "router" in (*name.split("."), leaf)
            if isinstance(child, nn.Linear) and (called or child.out_features in counts):
                yield f"{name}.{leaf}"


def _parts(name: str, linear: nn.Linear, mixer: nn.Module) -> dict[str, int]:
    """The adapters of one projection of a mixer and the outputs of each, as Tinker's format has them: a
    fused q, k and v have their own ones; of Mamba-2's input projection the gate and x have one."""
    prefix, _, leaf = name.rpartition(".")
    if leaf == "in_proj_qkv" and hasattr(mixer, "key_dim"):
        sizes = {"in_proj_q": mixer.key_dim, "in_proj_k": mixer.key_dim, "in_proj_v": mixer.value_dim}
    elif leaf == "in_proj" and {"intermediate_size", "conv_dim", "num_heads"} <= vars(mixer).keys():
        sizes = {"gate_proj": mixer.intermediate_size, "x_proj": mixer.intermediate_size}
    else:
        return {name: linear.out_features}
    return {f"{prefix}.{part}": int(size) for part, size in sizes.items()}  # type: ignore[arg-type]
