"""What a model must pass when it is loaded, before a run may trust it.

Which architectures train and sample here is not a list of names: two short sequences are run packed and
apart, and each through transformers' own attention and recurrence. A family that mixes packed sequences
in a way that is not known here, or whose attention has a feature that ours lacks, takes the generic path:
sequences apart in padded batches, with transformers' own attention and cache. One that is wrong even there
is refused by name rather than trained wrongly.
"""

from __future__ import annotations

import io
import logging

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from tinsmith.engine.generic import CachePool, SampledApart
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel, ModelError
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment
from tinsmith.engine.model.recurrent import PackedRecurrence
from tinsmith.engine.model.vision import Vision
from tinsmith.engine.paged_attention import Chunk
from tinsmith.wire.images import ImageChunk

log = logging.getLogger(__name__)

_LENGTHS = (21, 12)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@torch.no_grad()
def check(model: BaseModel) -> None:
    """Put the model on the path that is right for it. Raises ModelError, naming the architecture and what
    disagrees."""
    architecture = type(model.module).__name__
    if not any(slot.group != "unembed" for slot in model.slots):
        raise ModelError(
            f"{model.name}: {architecture} has no linear layer that an adapter could be put on; such models "
            "cannot be served"
        )
    wrong = "" if model.generic else _disagreement(model)
    if wrong:
        log.info("%s takes the generic path: %s", model.name, wrong)
        model.go_generic()
    if model.generic and (wrong := _disagreement(model)):
        raise ModelError(f"{model.name}: {architecture} {wrong}; such models cannot be served")
    if model.vision is not None and model.generic:
        model.refuse_images(f"{architecture} takes the generic path, which is for text alone")
    elif model.vision is not None:
        _check_images(model, model.vision)


def _disagreement(model: BaseModel) -> str:
    """What is wrong with the path that a model is on; empty where nothing is."""
    first, second = _texts(model)
    try:
        together = _hidden(model, [first, second])
        if not together.isfinite().all():
            return f"gives numbers that are not finite{_damaged(model)}"
        for name, text, ours in (
            ("first", first, together[: len(first)]),
            ("second", second, together[len(first) :]),
        ):
            if _differs(ours, _hidden(model, [text]), model.dtype):
                return f"gives the {name} of two packed sequences another result than the sequence by itself"
            if _differs(model.plain(text.to(model.device)), ours, model.dtype):
                return "has an attention or a recurrence that differs from this server's"
        if model.generic:
            held = _held(model)
            _continued(model, first)
            if _held(model) != held:
                return "keeps what it has seen inside its layers, where sequences cannot be told apart"
            for text, ours in ((first, together[: len(first)]), (second, together[len(first) :])):
                if _differs(_continued(model, text), ours, model.dtype):
                    return "goes on from its cache with another result than from the whole sequence"
    except Exception as error:
        log.debug("%s could not be run", model.name, exc_info=error)
        return f"cannot be run here: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _damaged(model: BaseModel) -> str:
    """Which weight is to blame, if any is."""
    for name, weight in model.module.named_parameters():
        if not weight.isfinite().all():
            return f": {name} has such numbers itself, so its file in {model.path} is damaged"
    return ""


def _texts(model: BaseModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, model.vocab_size, (n,), generator=generator) for n in _LENGTHS]


def _held(model: BaseModel) -> dict[tuple[str, str], tuple[int, int]]:
    """Which tensors beside its parameters a model has, and how often each was written."""
    return {
        (name, key): (id(x), x._version)
        for name, module in model.module.named_modules()
        for key, x in {**module._buffers, **vars(module)}.items()
        if isinstance(x, Tensor)
    }


def _continued(model: BaseModel, text: Tensor) -> Tensor:
    """As the sampler goes on the generic path: most of the text, then token after token behind the cache,
    in turns with another sequence."""
    pool = CachePool(model, 2, 1 << 62)
    cut, parts = len(text) - 3, []
    for start, stop in [(0, cut), *((i, i + 1) for i in range(cut, len(text)))]:
        for slot, ids in enumerate((text[start:stop], text.flip(0)[start:stop])):
            n = stop - start
            ids = torch.nn.functional.pad(ids, (0, pad_rows(n) - n)).to(model.device)
            segments = [Segment(0, len(ids), None)]
            recurrent = SampledApart(pool, segments, [(Chunk(0, n, start, ()), slot)])
            hidden = model.hidden(ids, ids, Pass(segments, None, recurrent))[:n]
            if slot == 0:
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
    ours = model.hidden(ids.to(model.device), positions.to(model.device), this, visual)[:n]
    if _differs(ours, theirs, model.dtype):
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
    return model.hidden(ids.to(model.device), positions.to(model.device), this)[:at]


def _differs(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether most rows of [n, hidden] differ. Not all: where a router is about to choose between two
    experts, rounding decides, and that token takes another way."""
    a, b = a.double(), b.double()
    distance = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return not bool(distance.median() <= _TOLERANCE[dtype])
