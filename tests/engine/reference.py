"""The same losses and gradients by transformers and PEFT, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tinsmith.engine.model.adapted import UNEMBED
from tinsmith.engine.runs import Run

# Where the parts of fused projections stand: the module's name, and the parts before this one.
FUSED = {
    "in_proj_q": ("in_proj_qkv", ()),
    "in_proj_k": ("in_proj_qkv", ("in_proj_q",)),
    "in_proj_v": ("in_proj_qkv", ("in_proj_q", "in_proj_k")),
    "gate_proj": ("in_proj", ()),
    "x_proj": ("in_proj", ("gate_proj",)),
}
LossOf = Callable[[int, Tensor], Tensor]  # (index of the sequence, its target logprobs) -> scalar loss


class Reference:
    """transformers' model with the run's adapter: PEFT's own layers, or, for experts, fused projections and
    models with a vision tower, merged weights."""

    def __init__(
        self, folder: Path, run: Run, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM
    ) -> None:
        self.run = run
        spec = run.layout.spec
        base = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        own = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)} | {UNEMBED}
        self.merges = any(s.experts or s.name not in own for s in run.layout.slots)
        if self.merges:
            base._experts_implementation = "eager"
            base.config._experts_implementation = "eager"
            self.model = base.requires_grad_(False)
            self.leaves = {
                n: (a.clone().requires_grad_(True), b.clone().requires_grad_(True))
                for n, (a, b) in run.layout.views(run.live.params).items()
            }
            return
        names = [("lm_head" if s.name == UNEMBED else s.name) for s in run.layout.slots]
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=names, lora_dropout=0.0)
        self.model = get_peft_model(base, config)
        modules = dict(self.model.named_modules())
        self.leaves = {}
        for slot, name in zip(run.layout.slots, names, strict=True):
            layer = modules[f"base_model.model.{name}"]
            a, b = run.layout.views(run.live.params)[slot.name]
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
            self.leaves[slot.name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def logprobs(self, ids: Sequence[int], **images: Tensor) -> Tensor:
        """Logprobs of ids[1:], each given what is before it, and images as the model's forward takes them."""
        inputs = torch.tensor([ids[:-1]])
        if self.merges:
            options = {"input_ids": inputs, "use_cache": False, **images}
            logits = functional_call(self.model, self._merged(), (), options).logits[0]
        else:
            logits = self.model(inputs, use_cache=False).logits[0]
        table = torch.log_softmax(logits.float(), -1)
        return table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def run_loss(self, sequences: Sequence[Sequence[int]], loss: LossOf) -> float:
        """Add the gradients of all sequences to the leaves; returns the summed loss."""
        total = 0.0
        for i, ids in enumerate(sequences):
            value = loss(i, self.logprobs(ids))
            value.backward()
            total += float(value.detach())
        return total

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        zero = torch.zeros_like
        return {
            n: tuple(x.grad if x.grad is not None else zero(x) for x in pair)  # type: ignore[misc]
            for n, pair in self.leaves.items()
        }

    def parameters(self) -> list[Tensor]:
        return [x for pair in self.leaves.values() for x in pair]

    def _merged(self) -> dict[str, Tensor]:
        scale = self.run.layout.spec.alpha / self.run.layout.spec.rank
        real = {n.replace(".language_model.", "."): n for n, _ in self.model.named_parameters()}
        weights = {n: self.model.get_parameter(name) for n, name in real.items()}
        merged: dict[str, Tensor] = {}
        pending: dict[str, dict[str, Tensor]] = {}
        for slot in self.run.layout.slots:
            a, b = self.leaves[slot.name]
            if slot.experts:
                prefix, _, part = slot.name.rpartition(".")
                a3 = a if a.dim() == 3 else a.expand(slot.experts, *a.shape)
                b3 = b if b.dim() == 3 else b.expand(slot.experts, *b.shape)
                pending.setdefault(prefix, {})[part] = torch.matmul(b3, a3) * scale
            else:
                name = "lm_head.weight" if slot.name == UNEMBED else f"{slot.name}.weight"
                first = 0
                if name not in weights:  # a part of a fused projection
                    prefix, _, part = slot.name.rpartition(".")
                    name, before = FUSED[part]
                    name = f"{prefix}.{name}.weight"
                    first = sum(self.leaves[f"{prefix}.{p}"][1].shape[0] for p in before)
                old = merged.get(name, weights[name])
                rows = torch.arange(first, first + b.shape[0])
                merged[name] = old.index_add(0, rows, scale * b @ a)
        modules = {n.replace(".language_model.", "."): m for n, m in self.model.named_modules()}
        for prefix, parts in pending.items():
            module = modules[prefix]
            if "w3" not in parts:  # no gate
                merged[f"{prefix}.up_proj"] = weights[f"{prefix}.up_proj"] + parts["w1"]
                merged[f"{prefix}.down_proj"] = weights[f"{prefix}.down_proj"] + parts["w2"]
                continue
            up, down = torch.cat([parts["w1"], parts["w3"]], dim=1), parts["w2"]
            if not module.is_concatenated:  # gate and up in turns
                up = torch.stack([parts["w1"], parts["w3"]], dim=2).flatten(1, 2)
            if module.is_transposed:
                up, down = up.transpose(1, 2), down.transpose(1, 2)
            merged[f"{prefix}.gate_up_proj"] = weights[f"{prefix}.gate_up_proj"] + up
            merged[f"{prefix}.down_proj"] = weights[f"{prefix}.down_proj"] + down
        return {real[n]: x for n, x in merged.items()}
