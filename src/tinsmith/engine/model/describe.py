"""What a model would be here, from its config alone: no weights are read, none are needed.

The model is built on torch's meta device, where tensors have shapes and no memory, and goes through the same
code that finds adapters, attention and recurrent layers in a model that is served.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.device import pick_device, pick_dtype
from tinsmith.engine.memory import Budget, available_memory
from tinsmith.engine.model.base import BaseModel, ModelError
from tinsmith.engine.model.blueprint import draw
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.model.vision import sees
from tinsmith.engine.states import state_bytes

MOMENTS = 2  # of AdamW, fp32 as the weights


@dataclass(frozen=True, slots=True)
class Description:
    """Sizes in bytes; `adapter_bytes` is the training state of a run of `rank`: weights, gradient, moments.
    `way` is BaseModel.way, before the check that a model passes when it is loaded."""

    name: str
    architecture: str
    parameters: int
    active_parameters: int
    dtype: str
    weights_bytes: int
    rank: int
    adapter_parameters: int
    adapter_bytes: int
    sampler_bytes: int
    cache_bytes_per_1k_tokens: int
    state_bytes_per_sequence: int
    max_context: int
    way: str
    images: bool
    device: str
    device_bytes: int
    fits: bool
    why_not: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def describe(
    name: str,
    path: str,
    device_name: str,
    dtype_name: str,
    *,
    memory: int | None = None,
    rank: int = 32,
    trust_remote_code: bool = False,
) -> Description:
    """The arguments mean what the settings of their names do. Raises ModelError."""
    device = pick_device(device_name)
    dtype = pick_dtype(dtype_name, device)
    try:
        plan = draw(path, dtype, trust_remote_code=trust_remote_code)
        model = BaseModel.of_shapes(name, path, plan.module, dtype)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    layout = Layout(model.slots, LoraSpec(rank=rank, seed=0))
    per_token = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in model.attention_layers.values())
    total = memory or available_memory(device)
    why_not = ""
    try:
        budget = Budget.split(total, model.nbytes)
        if (2 + MOMENTS) * 4 * layout.size > budget.adapters:
            why_not = (
                f"an adapter of rank {rank} is beyond what is left for adapters: {budget.adapters} bytes"
            )
    except ModelError as error:
        why_not = str(error)
    return Description(
        name=name,
        architecture=type(plan.module).__name__,
        parameters=model.parameters,
        active_parameters=model.parameters - _idle_parameters(model),
        dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        weights_bytes=model.nbytes,
        rank=rank,
        adapter_parameters=layout.size,
        adapter_bytes=(2 + MOMENTS) * 4 * layout.size,
        sampler_bytes=dtype.itemsize * layout.size,
        cache_bytes_per_1k_tokens=1000 * per_token * dtype.itemsize,
        state_bytes_per_sequence=state_bytes(model),
        max_context=model.max_context,
        way=model.way,
        images=sees(plan.config),
        device=str(device),
        device_bytes=total,
        fits=not why_not,
        why_not=why_not,
    )


def _idle_parameters(model: BaseModel) -> int:
    """Parameters of experts that a token does not go to."""
    chosen = int(getattr(model.config, "num_experts_per_tok", 0) or 0)
    idle = 0
    for module in model.module.modules():
        if hasattr(module, "tinsmith_name"):  # experts, see base._replace
            own = list(module.parameters(recurse=False))
            idle += sum(p.numel() // p.shape[0] * (p.shape[0] - chosen) for p in own)
    return idle
