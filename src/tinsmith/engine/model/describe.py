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
from tinsmith.engine.model.attention import PADDING
from tinsmith.engine.model.base import BaseModel, ModelError
from tinsmith.engine.model.blueprint import draw
from tinsmith.engine.model.errors import short
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.model.vision import CACHE_BYTES, sees
from tinsmith.engine.states import state_bytes
from tinsmith.engine.training import peak_bytes

MOMENTS = 2  # of AdamW, fp32 as the weights


@dataclass(frozen=True, slots=True)
class Description:
    """Sizes in bytes. `active_parameters` are those that a token meets, `embedding_parameters` of them are an
    embedding's, of which it only looks up a row. `adapter_bytes` is the training state of a run of `rank`:
    weights, gradient, moments. `quantized` is the format of the weights in the files, empty if they are full.
    `way` is BaseModel.way, before the check that a model passes when it is loaded."""

    name: str
    architecture: str
    parameters: int
    active_parameters: int
    embedding_parameters: int
    quantized: str
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
        raise error.of(name) from error
    except Exception as error:
        raise ModelError(f"{name}: its layers cannot be put together here: {short(error)}") from error
    layout = Layout(model.slots, LoraSpec(rank=rank, seed=0))
    per_token = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in model.attention_layers.values())
    images = sees(plan.config)
    total = memory or available_memory(device)
    adapter = (2 + MOMENTS) * 4 * layout.size
    why_not = ""
    try:
        budget = Budget.split(total, model.nbytes + (CACHE_BYTES if images else 0))
        need = peak_bytes(model, PADDING.rows, PADDING.rows, True, recomputed=True)
        if adapter > budget.adapters:
            why_not = f"a run of rank {rank} needs {adapter} bytes, and {budget.adapters} are left for runs"
        elif need > budget.passes:
            why_not = f"a pass needs at least {need} bytes, and {budget.passes} are left for it"
    except ModelError as error:
        why_not = str(error)
    embed, head = plan.module.get_input_embeddings(), plan.module.get_output_embeddings()
    tied = getattr(head, "weight", None) is embed.weight
    return Description(
        name=name,
        architecture=type(plan.module).__name__,
        parameters=model.parameters,
        active_parameters=model.active_parameters,
        embedding_parameters=0 if tied else embed.weight.numel(),
        quantized=plan.quantized,
        dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        weights_bytes=model.nbytes,
        rank=rank,
        adapter_parameters=layout.size,
        adapter_bytes=adapter,
        sampler_bytes=dtype.itemsize * layout.size,
        cache_bytes_per_1k_tokens=1000 * per_token * dtype.itemsize,
        state_bytes_per_sequence=state_bytes(model),
        max_context=model.max_context,
        way=model.way,
        images=images,
        device=str(device),
        device_bytes=total,
        fits=not why_not,
        why_not=why_not,
    )
