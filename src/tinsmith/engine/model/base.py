"""A base model: loaded by transformers, frozen, its linear layers, experts and attention replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tinsmith.engine.kernels import elementwise, gpu, linear
from tinsmith.engine.model.adapted import has_experts, replace
from tinsmith.engine.model.attention import PADDING
from tinsmith.engine.model.ends import Unembedding, find_scale, find_unembedding
from tinsmith.engine.model.errors import ModelError, short
from tinsmith.engine.model.experts import experts_forward
from tinsmith.engine.model.fused import fuse
from tinsmith.engine.model.interface import MEASURED, OWN, Unknown
from tinsmith.engine.model.loading import fingerprint, load
from tinsmith.engine.model.lora import GateLinear, LoraLinear
from tinsmith.engine.model.packing import Pass, Segment, running
from tinsmith.engine.model.recomputing import make_recomputable
from tinsmith.engine.model.recurrent import cache_argument, find_mixers, take_apart
from tinsmith.engine.model.rotations import find_threshold, long_rows
from tinsmith.engine.model.vision import Expanded, NoImages, Vision, Visual, sees
from tinsmith.wire.images import ImageChunk
from tinsmith.wire.training import ContentError

log = logging.getLogger(__name__)

GENERIC = -1  # stands for a layer where all of them are meant


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What an attention layer keeps per token: `kv_heads` keys of `key_dim` and values of `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int


ALL_EXPERTS_FUNCTIONS.register("tinsmith", experts_forward)


class BaseModel:
    """One base model on one device, shared by all runs and all sampling.

    vocab_size is the number of logits; max_context is in tokens, prompt and output together. Of a model with
    a vision tower only the language model has adapters, under the names that it has by itself. `vision` is
    None where images cannot be taken, and `no_images` says why.
    """

    vision: Vision | None

    def __init__(
        self,
        name: str,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        max_context: int | None = None,
        *,
        room: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads it; `room` is how many bytes there are for its weights. Raises ModelError."""
        try:
            found = load(path, device, dtype, room=room, trust_remote_code=trust_remote_code)
            self._adopt(name, path, found.module, found.tokenizer, device, dtype, max_context)
            self.fingerprint = fingerprint(found.folder)
        except ModelError as error:
            raise error.of(name) from error
        self.folder = found.folder
        if sees(self.module.config):
            try:
                self.vision = Vision(self.module, str(found.folder), self.vocab_size, device)
            except NoImages as reason:
                self.refuse_images(str(reason))

    @classmethod
    def of_shapes(cls, name: str, path: str, module: nn.Module, dtype: torch.dtype) -> BaseModel:
        """A model that knows its shapes alone: `module` lies on the meta device. Raises ModelError."""
        model = cls.__new__(cls)
        model._adopt(name, path, module, None, torch.device("meta"), dtype, None)
        return model

    def _adopt(
        self,
        name: str,
        path: str,
        module: Any,
        tokenizer: Any,
        device: torch.device,
        dtype: torch.dtype,
        max_context: int | None,
    ) -> None:
        """Find the parts of transformers' model and put this server's own in their places."""
        self.name, self.path, self.device, self.dtype = name, path, device, dtype
        self.module, self.tokenizer = module, tokenizer
        self.module.requires_grad_(False).eval()
        self.config = self.module.config.get_text_config()
        has_eyes = sees(self.module.config)
        whole = has_eyes or self.module.base_model is self.module
        self._body = self.module.get_decoder() if whole else self.module.base_model
        if self._body is self.module:  # some name their body otherwise than they say
            self._body = self.module.model
        self._text = self._body if has_eyes else self.module
        self._embed = self.module.get_input_embeddings()
        self._scale: float | None = None  # of embeddings that the body is given
        self._check_config()
        self.mixers = {name: layer for name, layer, _ in find_mixers(self.module)}
        # Whether sequences go through all of the model apart, with transformers' own attention and cache.
        self.generic = False
        if not all(take_apart(layer, self.module.get_submodule(name)) for name, layer in self.mixers.items()):
            self.go_generic()
        self.vision = None
        self.no_images = "this model takes encoded text only"
        # Single tokens go through the mixers in batches of a multiple of this, or alone if 0 (exactness.py).
        self.mixers_padding = 0
        self.attention_layers: dict[int, LayerShape] = {}
        if not self.generic:
            try:
                self.attention_layers = self._measure_layers()
            except Exception as error:
                log.info("%s has no packed path: %s", name, short(error))
                log.debug("%s has no packed path", name, exc_info=error)
                self.go_generic()
        inner = next(n for n, m in self.module.named_modules() if m is self._body) if has_eyes else ""
        self.slots = list(replace(self.module, list(self.mixers), inner, self.generic))
        fuse(self._body, device, dtype)
        limit = int(getattr(self.config, "max_position_embeddings", 0) or 0) or 4096
        self.short: int | None = None  # sequences of more tokens are rotated otherwise
        if device.type != "meta":
            self.short = find_threshold(self._body, self.config, limit, device)
        self.recomputable = make_recomputable(self._body) > 0
        self.has_gates = any(isinstance(m, GateLinear) for m in self._body.modules())
        # (in, out) of the products that routers make with their own weights
        self.routers = {
            (w.shape[1], w.shape[0])
            for m in self._body.modules()
            if not isinstance(m, (nn.Embedding, LoraLinear, GateLinear))
            and isinstance(w := getattr(m, "weight", None), Tensor)
            and w.dim() == 2
        }
        self._head = self.module.get_output_embeddings()
        self.vocab_size = int(self._head.out_features)
        if max_context is not None and max_context > limit:
            raise ModelError(f"{name}: max_context {max_context} exceeds the model's own {limit} positions")
        self.max_context = max_context or limit
        self._stay_short()
        self.eos_token_ids = _eos(self.module, self.tokenizer)
        self.parameters = sum(p.numel() for p in self.module.parameters())
        self.nbytes = sum(p.numel() * p.element_size() for p in self.module.parameters())
        self._unembed: Unembedding = self._head
        if device.type != "meta":
            self._find_ends()

    def _check_config(self) -> None:
        """Raises ModelError for sizes that transformers builds a model with and that cannot be run."""
        file = f"{self.path}: its config.json"
        if (length := getattr(self.config, "max_position_embeddings", None) or 0) < 0:
            raise ModelError(f"{file} has max_position_embeddings {length}")
        chosen = getattr(self.config, "num_experts_per_tok", None)
        for module in self.module.modules():
            if has_experts(module) and chosen is not None and not 1 <= chosen <= len(module.down_proj):
                raise ModelError(
                    f"{file} has num_experts_per_tok {chosen}, of {len(module.down_proj)} experts"
                )

    @property
    def apart(self) -> bool:
        """Whether sequences have state beside the pages, so that a pass must tell them apart."""
        return self.generic or bool(self.mixers)

    @property
    def way(self) -> str:
        """How sequences go through it: "packed" (block-diagonal attention in training, a paged cache in
        sampling), "packed, recurrent" (layers with a state of their own get padded batches of sequences), or
        "generic" (all layers do, through transformers' own attention and cache)."""
        return "generic" if self.generic else "packed, recurrent" if self.mixers else "packed"

    def go_generic(self) -> None:
        """Take the generic path from now on: slower, and right wherever transformers is."""
        self.generic, self.attention_layers, self.mixers_padding = True, {}, 0
        self._text.set_attn_implementation("eager")
        self._stay_short()

    def _stay_short(self) -> None:
        short: int | None = getattr(self, "short", None)
        if self.generic and short is not None and self.max_context > short:
            log.warning("%s is served up to %d tokens, where its rotations change", self.name, short)
            self.max_context = short

    def long_rows(self, spans: Iterable[tuple[int, int, int]], rows: int) -> Tensor | None:
        """See rotations.py."""
        return long_rows(self.short, spans, rows, self.device)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: all but those of experts that it does not go to."""
        chosen = int(getattr(self.config, "num_experts_per_tok", 0) or 0)
        idle = 0
        for module in self.module.modules():
            if hasattr(module, "tinsmith_name"):  # experts, see adapted.py
                own = list(module.parameters(recurse=False))
                idle += sum(p.numel() // p.shape[0] * (p.shape[0] - chosen) for p in own)
        return self.parameters - idle

    def refuse_images(self, reason: str) -> None:
        """Serve text alone from now on."""
        log.warning("%s takes no images: %s", self.name, reason)
        self.vision, self.no_images = None, f"{self.name} takes no images here: {reason}"

    def expand(self, tokens: npt.NDArray[np.int64], images: Sequence[ImageChunk], where: str) -> Expanded:
        """A model input of text `tokens` [n] and images, which raises ContentError where it takes none.

        `where` names the input in errors.
        """
        if self.vision is None:
            raise ContentError(f"{where}.chunks[{images[0].chunk}] is image; {self.no_images}")
        return self.vision.expand(tokens, images, where)

    def hidden(
        self, token_ids: Tensor, positions: Tensor, this: Pass, visual: Visual | None = None
    ) -> Tensor:
        """token_ids: int64 [rows], a padded number of them -> final hidden states [rows, hidden].

        positions: int64 [rows], or [3, rows] where rows are those of images, whose features are `visual`.
        With gradients enabled the result carries a graph whose backward pass fills the blocks' gradients;
        none where no adapter came by.
        """
        extra: dict[str, Any] = {}
        with running(this):
            embedded = self.embed(token_ids)
            if visual is not None:
                embedded = embedded.index_copy(1, visual.rows, visual.features.embeddings.unsqueeze(0))
                if visual.features.deep:
                    mask = torch.zeros_like(token_ids, dtype=torch.bool).index_fill(0, visual.rows, True)
                    extra = {
                        "visual_pos_masks": mask.unsqueeze(0),
                        "deepstack_visual_embeds": list(visual.features.deep),
                    }
            if torch.is_grad_enabled():
                this.anchor = torch.zeros((), requires_grad=True)
            if self.generic:
                assert this.recurrent is not None
                return this.recurrent(GENERIC, self._whole, embedded[0])
            return self.through(embedded, positions, **extra)[0]

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64 [rows] -> [1, rows, hidden]."""
        embedded: Tensor = self._embed(token_ids.unsqueeze(0))
        return embedded if self._scale is None else embedded * self._scale

    def through(self, embedded: Tensor, positions: Tensor, **extra: Any) -> Tensor:
        """Embedded tokens [1, rows, hidden] through the body, inside a pass -> final hidden states, alike."""
        if self.vision is not None:  # text beside an image must get its rotation in the same way
            positions = positions.expand(3, -1).contiguous()
        out = self._body(
            inputs_embeds=embedded, position_ids=positions.unsqueeze(-2), use_cache=False, **extra
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _whole(self, embedded: Tensor, cache: Any) -> Tensor:
        """A batch of sequences [B, L, hidden] through the whole body, behind what is in `cache`."""
        count, length = embedded.shape[:2]
        first = 0 if cache is None else int(cache.get_seq_length())
        positions = torch.arange(first, first + length, device=self.device).expand(count, -1)
        out = self._body(
            inputs_embeds=embedded,
            position_ids=positions,
            use_cache=cache is not None,
            **self._cached(cache),
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _cached(self, cache: Any) -> dict[str, Any]:
        """A cache as the argument of the body that takes one."""
        return {cache_argument(self._body.forward) or "past_key_values": cache}

    @property
    def head(self) -> LoraLinear | None:
        """The layer that makes logits, where nothing else has a part in them."""
        return self._unembed if isinstance(self._unembed, LoraLinear) else None

    def logits(self, hidden: Tensor, this: Pass) -> Tensor:
        """hidden: [n, hidden] of the rows in `this`, n padded -> [n, vocab] in its dtype."""
        with running(this):
            return self._unembed(hidden)

    def _find_ends(self) -> None:
        ids = torch.arange(PADDING.rows, device=self.device) % self.vocab_size
        try:
            with self._attention_by("eager"), running(Pass([Segment(0, len(ids), None)])):
                self._unembed = find_unembedding(self.module, self._body, ids)
                self._scale = find_scale(self._body, self._embed, self.config, ids)
        except Exception as error:
            raise ModelError(
                f"{self.name}: {type(self.module).__name__} cannot be run here: {short(error)}"
            ) from error

    @contextmanager
    def _attention_by(self, name: str) -> Iterator[None]:
        """Attention as transformers knows it by a name, inside; "eager" is its own."""
        self._text.set_attn_implementation(name)
        try:
            yield
        finally:
            self._text.set_attn_implementation("eager" if self.generic else OWN)

    @staticmethod
    def log_softmax(logits: Tensor) -> Tensor:
        """fp32 log-probabilities [n, vocab]: the one function behind every logprob, trained or sampled."""
        if elementwise.usable(logits.device, logits.dtype):
            return elementwise.log_softmax(logits).table()
        return torch.log_softmax(logits.float(), dim=-1)

    def plain(self, token_ids: Tensor, cache: Any = None, noise: Tensor | None = None) -> Tensor:
        """Final hidden states [n, hidden] of one sequence, int64 [n], through transformers' own attention
        and recurrence, without adapters; an empty `cache` is filled. `noise` [n, hidden] is by how much of
        themselves the embeddings are changed."""
        positions = torch.arange(len(token_ids), device=self.device)
        with self._attention_by("eager"), running(self._pass_of_one(len(token_ids))):
            embedded = self.embed(token_ids)
            if noise is not None:
                embedded = embedded + embedded * noise.to(embedded)
            out = self._body(
                inputs_embeds=embedded,
                position_ids=positions.unsqueeze(0),
                use_cache=cache is not None,
                **self._cached(cache),
            )
        hidden: Tensor = out.last_hidden_state
        return hidden[0]

    def _pass_of_one(self, n: int) -> Pass:
        return Pass([Segment(0, n, None)], long=self.long_rows([(0, n, n)], n))

    def plain_logits(self, token_ids: Tensor) -> Tensor:
        """As `plain`, by all of transformers' model from ids to logits [n, vocab]."""
        with self._attention_by("eager"), running(self._pass_of_one(len(token_ids))):
            out = self.module(input_ids=token_ids.unsqueeze(0), use_cache=False)
        logits: Tensor = out.logits
        return logits[0]

    def plain_with_image(
        self, token_ids: Tensor, kinds: Tensor, pixels: Tensor, grid: tuple[int, int, int]
    ) -> Tensor:
        """As `plain`, by all of transformers' model: kinds int64 [n] is 1 at an image's placeholders, whose
        patches are pixels [patches, values] in the shape of `grid`."""
        with self._attention_by("eager"), running(Pass([Segment(0, len(token_ids), None)])):
            out = self.module.base_model(
                input_ids=token_ids.unsqueeze(0).to(self.device),
                mm_token_type_ids=kinds.unsqueeze(0).to(self.device),
                pixel_values=pixels.to(self.device),
                image_grid_thw=torch.tensor([grid], device=self.device),
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden[0]

    @property
    def packed_bytes(self) -> int:
        """What `pack` would take, beside the weights themselves."""
        return sum(linear.packed_bytes(m.weight) for m in self._packable())

    @property
    def packed(self) -> bool:
        """Whether that has been done for all of them."""
        found = self._packable()
        return bool(found) and all(m.packed is not None for m in found)

    def linears(self) -> list[LoraLinear]:
        """The layers that can have adapters."""
        return [m for m in self.module.modules() if isinstance(m, LoraLinear)]

    def pack(self) -> None:
        """Keep copies of the weights as the CPU kernel for few rows reads them, where it has the bits of the
        product that training takes."""
        depths: dict[tuple[int, int, bool], int] = {}
        for module in self._packable():
            shape = module.out_features, module.in_features, module.bias is not None
            if shape not in depths:
                depths[shape] = linear.find_depth(module.weight, module.bias)
            if depths[shape] and module.packed is None:
                module.pack(depths[shape])

    def _packable(self) -> list[LoraLinear]:
        if not linear.usable(self.device, self.dtype) or not self.mixes_rows:
            return []
        return self.linears()

    @property
    def mixes_rows(self) -> bool:
        """Whether rows of different adapters may stand side by side, without padding between them: all of
        their products are a kernel's, which takes each row by itself."""
        if gpu.takes(self.device, self.dtype):
            return not self.apart
        return (
            not self.apart
            and linear.usable(self.device, self.dtype)
            and all(not s.experts and s.in_features % 2 == s.out_features % 2 == 0 for s in self.slots)
        )

    def new_state(self) -> Any:
        """An empty cache of transformers' own class, for the states of recurrent layers."""
        return DynamicCache(config=self.module.config)

    def _measure_layers(self) -> dict[int, LayerShape]:
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
            if layer in shapes:
                raise Unknown("a layer attends more than once, where pages hold its keys once")
            shapes[layer] = LayerShape(k.shape[0], k.shape[-1], v.shape[-1])
            return q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])

        places = torch.arange(PADDING.rows, device=self.device)
        # A mask is made by what positions are: shapes alone give none.
        with torch.no_grad(), self._attention_by(OWN if self.device.type == "meta" else MEASURED):
            self.hidden(torch.zeros_like(places), places, Pass([Segment(0, PADDING.rows, None)], look))
        return {i: shapes[i] for i in sorted(shapes)}


def _eos(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """The generation config's end tokens, and the tokenizer's."""
    ids = getattr(module.generation_config, "eos_token_id", None)
    found = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(i) for i in found))
