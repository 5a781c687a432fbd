"""What a model must pass when it is loaded, before a run may trust it.

Which architectures train and sample here is not a list of names: two short sequences are run packed and
apart, and each through transformers' own attention and recurrence. A family that mixes packed sequences
in a way that is not known here, or whose attention has a feature that ours lacks, takes the generic path:
sequences apart in padded batches, with transformers' own attention and cache. One that is wrong even there
is refused by name rather than trained wrongly.
"""

from __future__ import annotations

import functools
import io
import logging
from contextlib import nullcontext

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from tinsmith.engine.generic import CachePool, SampledApart
from tinsmith.engine.kv_cache import NULL, PagePool
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel, ModelError
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment
from tinsmith.engine.model.recurrent import PackedRecurrence
from tinsmith.engine.model.routing import Routing
from tinsmith.engine.model.vision import Vision
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.states import SampledRecurrence, StatePool
from tinsmith.wire.images import ImageChunk

log = logging.getLogger(__name__)

_LENGTHS = (21, 12)
_SINGLE = 3  # tokens that are taken one by one
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_ROUNDINGS = 5  # how many times one rounding's effect is taken for rounding still
_MOST = 0.2  # sequences that see each other, or an attention of another kind, differ by more than this


@torch.no_grad()
def check(model: BaseModel) -> None:
    """Put the model on the path that is right for it. Raises ModelError, naming the architecture and what
    disagrees."""
    architecture = type(model.module).__name__
    if not any(slot.group != "unembed" for slot in model.slots):
        raise ModelError(
            f"{model.path}: {architecture} has no linear layer that an adapter could be put on; such models "
            "cannot be served"
        ).of(model.name)
    wrong = "" if model.generic else _disagreement(model)
    if wrong:
        log.info("%s takes the generic path: %s", model.name, wrong)
        model.go_generic()
    if model.generic and (wrong := _disagreement(model)):
        raise ModelError(f"{model.path}: {architecture} {wrong}; such models cannot be served").of(model.name)
    if model.vision is not None and model.generic:
        model.refuse_images(f"{architecture} takes the generic path, which is for text alone")
    elif model.vision is not None:
        _check_images(model, model.vision)


def _disagreement(model: BaseModel) -> str:
    """What is wrong with the path that a model is on; empty where nothing is."""
    first, second = _texts(model)
    routing = Routing()
    places = (("first", first, 0), ("second", second, len(first)))
    try:
        with routing.recorded():
            together = _hidden(model, [first, second])
        if not together.isfinite().all():
            return "gives numbers that are not finite"
        near = _Near(model, routing, first)
        for name, text, at in places:
            ours = together[at : at + len(text)]
            with routing.again(at):
                if near.differs(ours, _hidden(model, [text])):
                    return (
                        f"gives the {name} of two packed sequences another result than the sequence by itself"
                    )
                if near.differs(model.plain(text.to(model.device)), ours):
                    return "has an attention or a recurrence that differs from this server's"
                if near.differs(_logits(model, ours), model.plain_logits(text.to(model.device))):
                    return "makes logits of tokens in a way that differs from this server's"
        if model.generic:
            held = _held(model)
            _continued(model, first)
            if _held(model) != held:
                return "keeps what it has seen inside its layers, where sequences cannot be told apart"
        for _, text, at in places:
            own = together[at + len(text) - _SINGLE : at + len(text)]
            if near.differs(_continued(model, text, routing, at), own):
                return "goes on from its cache with another result than from the whole sequence"
    except Exception as error:
        log.debug("%s could not be run", model.name, exc_info=error)
        return f"cannot be run here: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _texts(model: BaseModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, model.vocab_size, (n,), generator=generator) for n in _LENGTHS]


def _held(model: BaseModel) -> dict[tuple[str, str], tuple[int, int]]:
    """Which tensors beside its parameters a model has, and how often each was written."""
    return {
        (name, key): (id(x), x._version)
        for name, module in model.module.named_modules()
        if not hasattr(module, "tinsmith_rotates")
        for key, x in {**module._buffers, **vars(module)}.items()
        if isinstance(x, Tensor)
    }


def _continued(model: BaseModel, text: Tensor, routing: Routing | None = None, at: int = 0) -> Tensor:
    """The last _SINGLE hidden states [n, hidden], as the sampler comes to them: most of the text, then token
    after token behind the cache, in turns with another sequence. `routing` knows the experts of the text,
    which stood at row `at`."""
    caches = CachePool(model, 2, 1 << 62) if model.generic else None
    states = StatePool(model, 2, 1 << 62) if model.mixers and not model.generic else None
    pages = PagePool(model, 0)
    own = [pages.allocate() or NULL for _ in range(2)]
    cut, parts = len(text) - _SINGLE, []
    for start, stop in [(0, cut), *((i, i + 1) for i in range(cut, len(text)))]:
        for slot, ids in enumerate((text[start:stop], text.flip(0)[start:stop])):
            n = stop - start
            padding = (0, pad_rows(n) - n)
            ids = torch.nn.functional.pad(ids, padding).to(model.device)
            places = torch.nn.functional.pad(torch.arange(start, stop), padding).to(model.device)
            segments = [Segment(0, len(ids), None)]
            chunk = Chunk(0, n, start, own[slot : slot + 1])
            this = Pass(segments, PagedAttention(pages, [chunk], len(ids)))
            this.long = model.long_rows([(0, n, len(text))], len(ids))
            if caches is not None:
                this.recurrent = SampledApart(caches, segments, [(chunk, slot)])
            elif states is not None:
                this.recurrent = SampledRecurrence(states, segments, [(chunk, slot)])
            known = routing.again(at + start) if routing is not None and slot == 0 else nullcontext()
            with known:
                hidden = model.hidden(ids, places, this)[:n]
            if slot == 0 and start >= cut:
                parts.append(hidden)
    return torch.cat(parts)


def _check_images(model: BaseModel, vision: Vision) -> None:
    """Serve text alone where an image among text gives something else than transformers' own model."""
    text = _texts(model)[0]
    special = {getattr(model.module.config, name, None) for name in ("image_token_id", "video_token_id")}
    tokens = np.array([0 if t in special else t for t in text.tolist()], np.int64)
    png = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    PIL.Image.fromarray(noise).save(png, "PNG")
    try:
        made = vision.expand(tokens, [ImageChunk(1, 5, png.getvalue(), "png")], "check")
        ((first, image),) = made.images
        kinds = torch.zeros(len(made.tokens), dtype=torch.int64)
        kinds[first : first + image.tokens] = 1
        routing = Routing()
        with routing.recorded():
            theirs = model.plain_with_image(
                torch.from_numpy(made.tokens), kinds, vision.pixels(image), image.grid
            )
    except Exception as error:
        model.refuse_images(f"trying one failed: {type(error).__name__}: {error}")
        return
    n = len(made.tokens)
    rows = pad_rows(n)
    ids = torch.nn.functional.pad(torch.from_numpy(made.tokens), (0, rows - n))
    positions = torch.nn.functional.pad(made.positions, (0, rows - n))
    segments = [Segment(0, rows, None)]
    recurrent = PackedRecurrence(segments, [(0, n)], model.device) if model.apart else None
    this = Pass(segments, PackedSequences([(0, n)], rows, model.device, model.dtype), recurrent)
    visual = vision.visual(made.within(0, 0, n))
    with routing.again(0):
        ours = model.hidden(ids.to(model.device), positions.to(model.device), this, visual)[:n]
    if not _distance(ours, theirs) <= _TOLERANCE[model.dtype]:
        model.refuse_images(
            f"{type(model.module).__name__} treats them in a way that this server does not know"
        )


def _hidden(model: BaseModel, texts: list[Tensor]) -> Tensor:
    """Hidden states of the texts' tokens, packed."""
    tokens = torch.cat(texts)
    rows = pad_rows(len(tokens))
    ids, positions = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    spans, at = [], 0
    for text in texts:
        spans.append((at, len(text)))
        ids[at : at + len(text)], positions[at : at + len(text)] = text, torch.arange(len(text))
        at += len(text)
    segments = [Segment(0, rows, None)]
    recurrent = PackedRecurrence(segments, spans, model.device) if model.apart else None
    this = Pass(segments, PackedSequences(spans, rows, model.device, model.dtype), recurrent)
    this.long = model.long_rows([(start, n, n) for start, n in spans], rows)
    return model.hidden(ids.to(model.device), positions.to(model.device), this)[:at]


def _logits(model: BaseModel, hidden: Tensor) -> Tensor:
    """Logits [n, vocab] of hidden states [n, hidden]."""
    n = len(hidden)
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, pad_rows(n) - n))
    return model.logits(padded, Pass([Segment(0, len(padded), None)]))[:n]


class _Near:
    """Whether two results of one model differ by more than rounding, which deep and large models amplify: by
    how much is seen where embeddings are changed in their last bit."""

    def __init__(self, model: BaseModel, routing: Routing, text: Tensor) -> None:
        """text: the tokens that stood at row 0 when `routing` was recorded."""
        self.model, self.routing, self.text = model, routing, text

    @functools.cached_property
    def rounding(self) -> float:
        """What a change of embeddings by one rounding becomes behind the last layer."""
        text = self.text.to(self.model.device)
        width = int(self.model.config.hidden_size)
        random = torch.randn(len(text), width, generator=torch.Generator().manual_seed(0))
        noise = random * torch.finfo(self.model.dtype).eps
        with self.routing.again(0):
            return _distance(self.model.plain(text, noise=noise), self.model.plain(text))

    def differs(self, a: Tensor, b: Tensor) -> bool:
        """Whether most rows of [n, hidden] differ."""
        distance = _distance(a, b)
        if distance <= _TOLERANCE[self.model.dtype]:
            return False
        return not distance <= min(_ROUNDINGS * self.rounding, _MOST)


def _distance(a: Tensor, b: Tensor) -> float:
    """The median over rows of [n, hidden] of the norm of the difference over the norm."""
    a, b = a.double(), b.double()
    apart = (a - b).norm(dim=-1)
    return float(torch.where(apart == 0, 0.0, apart / b.norm(dim=-1)).median())
