"""A base model: loaded by transformers, frozen, its linear layers, experts and attention replaced."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from tinsmith.engine.model.experts import expert_slots, experts_forward
from tinsmith.engine.model.lora import Group, LoraLinear, Slot
from tinsmith.engine.model.packing import Pass, current_pass, running

UNEMBED = "model.unembed_tokens"  # the name that Tinker's adapter format gives the unembedding
_ATTENTION = ("attn", "attention")


class ModelError(Exception):
    """A model cannot be served; the message names the folder and the cause."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What an attention layer keeps per token: `kv_heads` keys of `key_dim` and values of `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, rows, dim] each -> [1, rows, heads, dim]."""
    if softcap is not None:
        raise ModelError(
            f"{type(module).__name__} caps its attention scores; such models cannot be served yet"
        )
    this = current_pass()
    if this is None or this.attention is None:
        raise RuntimeError("attention runs inside a pass only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = this.attention(layer, query[0], key[0], value[0], scale, sliding_window, s_aux)
    return out.unsqueeze(0), None


disable_progress_bar()  # a server's log is no place for it
ALL_ATTENTION_FUNCTIONS.register("tinsmith", _attention)
ALL_EXPERTS_FUNCTIONS.register("tinsmith", experts_forward)


class BaseModel:
    """One base model on one device, shared by all runs and all sampling.

    vocab_size is the number of logits; max_context is in tokens, prompt and output together.
    """

    def __init__(
        self, name: str, path: str, device: torch.device, dtype: torch.dtype, max_context: int | None = None
    ) -> None:
        self.name, self.path, self.device, self.dtype = name, path, device, dtype
        self.module, self.tokenizer = _load(name, path, device, dtype)
        self.module.requires_grad_(False).eval()
        self.config = self.module.config.get_text_config()
        self.slots = list(_replace(self.module))
        self._body = self.module.base_model
        self._embed = self.module.get_input_embeddings()
        self._head = self.module.get_output_embeddings()
        self.vocab_size = int(self._head.out_features)
        limit = int(getattr(self.config, "max_position_embeddings", 0) or 0) or 4096
        if max_context is not None and max_context > limit:
            raise ModelError(f"{name}: max_context {max_context} exceeds the model's own {limit} positions")
        self.max_context = max_context or limit
        self.eos_token_ids = _eos(self.module, self.tokenizer)
        self.parameters = sum(p.numel() for p in self.module.parameters())
        self.nbytes = sum(p.numel() * p.element_size() for p in self.module.parameters())
        self.fingerprint = _fingerprint(_folder(path))
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.attention_layers = self._measure_layers()

    def hidden(self, token_ids: Tensor, positions: Tensor, this: Pass) -> Tensor:
        """token_ids, positions: int64 [rows], a padded number of them -> final hidden states [rows, hidden].

        With gradients enabled the result carries a graph whose backward pass fills the blocks' gradients.
        """
        with running(this):
            embedded = self._embed(token_ids.unsqueeze(0))
            if torch.is_grad_enabled():
                # The adapters are no inputs of autograd: this is what makes backward reach them all.
                embedded = embedded.detach().requires_grad_(True)
            out = self._body(inputs_embeds=embedded, position_ids=positions.unsqueeze(0), use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden[0]

    def logits(self, hidden: Tensor, this: Pass) -> Tensor:
        """hidden: [n, hidden] of the rows in `this`, n padded -> [n, vocab] in its dtype."""
        with running(this):
            logits: Tensor = self._head(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @staticmethod
    def log_softmax(logits: Tensor) -> Tensor:
        """fp32 log-probabilities [n, vocab]: the one function behind every logprob, trained or sampled."""
        return torch.log_softmax(logits.float(), dim=-1)

    def _measure_layers(self) -> list[LayerShape]:
        """Run one token through and look at what each attention layer is given."""
        shapes: dict[int, LayerShape] = {}

        def look(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            scale: float,
            window: int | None,
            sinks: Tensor | None,
        ) -> Tensor:
            shapes[layer] = LayerShape(k.shape[0], k.shape[-1], v.shape[-1])
            return q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])

        from tinsmith.engine.model.attention import PADDING
        from tinsmith.engine.model.packing import Segment

        zeros = torch.zeros(PADDING.rows, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.hidden(zeros, zeros, Pass([Segment(0, PADDING.rows, None)], look))
        return [shapes[i] for i in sorted(shapes)]


def _load(name: str, path: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    local = Path(path)
    if os.path.isabs(path) and not local.is_dir():
        raise ModelError(f"{name}: there is no folder {path}")
    if local.is_dir() and not (local / "config.json").is_file():
        raise ModelError(
            f"{name}: {path} has no config.json, so it is no model folder in Hugging Face layout"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ModelError(f"{name}: no tokenizer could be loaded from {path}: {_short(error)}") from error
    try:
        config = AutoConfig.from_pretrained(path)
        module = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation="tinsmith"
        )
    except Exception as error:
        raise ModelError(f"{name}: the model could not be loaded from {path}: {_short(error)}") from error
    module.config.get_text_config()._experts_implementation = "tinsmith"
    module.config._experts_implementation = "tinsmith"
    return module.to(device), tokenizer  # type: ignore[arg-type]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _replace(module: Any) -> Iterator[Slot]:
    """Put adapters' layers in the place of the linear layers and experts; yields their slots in order."""
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError("the model has no linear unembedding")
    for name, child in list(module.named_modules()):
        if hasattr(child, "_apply_gate") and hasattr(child, "down_proj") and hasattr(child, "is_transposed"):
            child.tinsmith_name = name
            yield from expert_slots(name, child)
        elif isinstance(child, nn.Linear):
            slot = Slot(
                UNEMBED if child is head else name,
                "unembed" if child is head else _group(name),
                child.in_features,
                child.out_features,
            )
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, LoraLinear(child, slot))
            yield slot


def _group(name: str) -> Group:
    """Attention, if a part of the path says so, else MLP."""
    return "attn" if any(word in part for part in name.split(".") for word in _ATTENTION) else "mlp"


def _eos(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """The generation config's end tokens, and the tokenizer's."""
    ids = getattr(module.generation_config, "eos_token_id", None)
    found = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(i) for i in found))


def _folder(path: str) -> Path:
    """Where the model's files lie: the folder itself, or the snapshot that a hub id was loaded from."""
    if Path(path).is_dir():
        return Path(path)
    config = cached_file(path, "config.json")
    if config is None:
        raise ModelError(f"{path} has no config.json")
    return Path(config).parent


def _fingerprint(folder: Path) -> str:
    """Identity of a base: its config, its weight files' names, headers or index, and samples of the data."""
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    fields = {k: v for k, v in config.items() if k not in ("transformers_version", "dtype", "torch_dtype")}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors*")):
        digest.update(file.name.encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
        else:
            with file.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                digest.update(f.read(min(size, 64 << 20)))
                # The header does not change with the values: take a little of the data along.
                for part in range(16):
                    f.seek(8 + size + (file.stat().st_size - 8 - size) * part // 16)
                    digest.update(f.read(4096))
    return digest.hexdigest()[:32]
