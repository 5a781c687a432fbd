"""Images: from a request's bytes to rows of the language model's input.

An image becomes as many placeholder tokens as the model's own image processor and vision tower make of it.
Their embeddings are the tower's features, their positions the family's own three-dimensional ones. The tower
is frozen and sees one image at a time, so an image's features depend on the image alone. What counts as such
a family is found by its interface, not by its name, and held against transformers when the model is loaded
(see checks.py).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText

from tinsmith.wire.images import ImageChunk
from tinsmith.wire.training import ContentError

MOST_TOKENS = 4096  # placeholder tokens of one image
MOST_PIXELS = 1 << 26  # of a decoded image
CACHE_BYTES = 256 << 20  # prepared images and features that are kept for their next use
FORMATS = ("png", "jpeg")


class NoImages(Exception):
    """Why a model cannot take images here."""


def sees(config: Any) -> bool:
    """Whether a config is that of a model with a vision tower beside its language model."""
    return hasattr(config, "vision_config") and type(config) in AutoModelForImageTextToText._model_mapping


def auto_class(config: Any) -> Any:
    """The auto class that loads all of the model that `config` describes."""
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def attention_of(config: Any) -> str | dict[str, str]:
    """The attention to load a model with: this server's for the language model, torch's for a tower."""
    return (
        {"": "tinsmith", "text_config": "tinsmith", "vision_config": "sdpa"} if sees(config) else "tinsmith"
    )


@dataclass(frozen=True, slots=True)
class Image:
    """A checked image: how many tokens it is, and the patches [frames, height, width] that they come from."""

    chunk: ImageChunk
    digest: bytes
    tokens: int
    grid: tuple[int, int, int]

    def numbers(self) -> list[int]:
        """A number below zero for each of its tokens, which stand for the content of the whole image."""
        bits = np.frombuffer(hashlib.shake_128(self.digest).digest(8 * self.tokens), np.int64)
        return (bits | np.int64(-(2**63))).tolist()


@dataclass(frozen=True, slots=True)
class Expanded:
    """A model input with images: each of its images as so many placeholder tokens.

    tokens: int64 [N]; positions: int64 [3, N] for the rotary embedding; what follows the input at index i
    has the position i + delta. images: (first row, image) in order.
    """

    tokens: npt.NDArray[np.int64]
    positions: Tensor
    delta: int
    images: tuple[tuple[int, Image], ...]

    def content(self) -> list[int]:
        """The tokens, with numbers that tell images apart in the place of placeholders."""
        found: list[int] = self.tokens.tolist()
        for first, image in self.images:
            found[first : first + image.tokens] = image.numbers()
        return found

    def places(self, first: int, count: int) -> Tensor:
        """Positions int64 [3, count] of what stands from index `first` on, in the input or behind it."""
        own = self.positions[:, first : first + count]
        behind = torch.arange(first + own.shape[1], first + count) + self.delta
        return torch.cat([own, behind.expand(3, -1)], dim=1)

    def within(self, row: int, first: int, count: int) -> list[Part]:
        """The parts of images among its tokens [first, first + count), which stand at `row`."""
        parts: list[Part] = []
        for start, image in self.images:
            begin, end = max(start, first), min(start + image.tokens, first + count)
            if begin < end:
                parts.append(Part(row + begin - first, image, begin - start, end - start))
        return parts


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [first, last) of an image, which stand at the rows of a pass from `row` on."""

    row: int
    image: Image
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Features:
    """What the tower makes of an image: embeddings [tokens, H], and what some families add behind their first
    layers, each [tokens, H]; in the model's dtype, on its device."""

    embeddings: Tensor
    deep: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.embeddings, *self.deep))


@dataclass(frozen=True, slots=True)
class Visual:
    """The rows of a pass that are images': int64 [n], ascending, and their features [n, H]."""

    rows: Tensor
    features: Features


@dataclass(slots=True)
class _Entry:
    """What is kept of an image, by its digest."""

    tokens: int
    grid: tuple[int, int, int]
    pixels: Tensor | None  # what the processor made of it, until the tower has seen it
    features: Features | None = None

    @property
    def nbytes(self) -> int:
        pixels = 0 if self.pixels is None else self.pixels.numel() * self.pixels.element_size()
        return pixels + (0 if self.features is None else self.features.nbytes)


class Vision:
    """A model's eyes: its image processor, its tower, its positions, and what they made of recent images."""

    def __init__(self, module: Any, path: str, vocab_size: int, device: torch.device) -> None:
        """Raises NoImages."""
        self._model, self._device = module.base_model, device
        kind = type(module).__name__
        language = {
            id(p) for m in (module.get_decoder(), module.get_output_embeddings()) for p in m.parameters()
        }
        own = {name for name, p in module.named_parameters() if id(p) not in language}
        if own & module.tinsmith_missing:
            raise NoImages("its folder has no weights for its vision tower")
        token = getattr(module.config, "image_token_id", None)
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise NoImages(f"{kind} has no image token")
        if not hasattr(self._model, "get_rope_index") or not hasattr(self._model, "get_image_features"):
            raise NoImages(f"{kind} lays images out in a way that this server does not know")
        try:
            # torchvision gives slightly other pixels: what is installed must not decide.
            self._processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        except Exception as error:
            raise NoImages(f"its image processor could not be loaded: {_short(error)}") from error
        if "image_grid_thw" not in self._processor.model_input_names or not all(
            hasattr(self._processor, name)
            for name in ("get_number_of_image_patches", "patch_size", "temporal_patch_size", "merge_size")
        ):
            raise NoImages(f"{kind} lays images out in a way that this server does not know")
        self.token = token
        tower, width = module.config.vision_config, int(module.config.get_text_config().hidden_size)
        size = module.dtype.itemsize
        deep = len(getattr(tower, "deepstack_visual_indexes", ()))
        self.row_bytes = 2 * size * width * (1 + deep)  # of a token's features, in the cache and in a pass
        inner = int(getattr(tower, "embed_dim", 0) or getattr(tower, "hidden_size", 0) or width)
        wide = int(getattr(tower, "intermediate_size", 0) or 4 * inner)
        # Of a patch on its way: its pixels twice, and what a layer of the tower keeps at a time.
        values = 3 * int(self._processor.temporal_patch_size) * int(self._processor.patch_size) ** 2
        self._patch_bytes = 8 * values + size * (8 * inner + 3 * wide)
        self.most_bytes: int | None = None  # for one image on its way through the tower
        self._cache: OrderedDict[bytes, _Entry] = OrderedDict()
        self._cached_bytes = 0

    def expand(self, tokens: npt.NDArray[np.int64], chunks: Sequence[ImageChunk], where: str) -> Expanded:
        """Decode and check the images among the text `tokens` [n], and put their placeholders there.

        `where` names the model input in errors. Raises ContentError.
        """
        parts: list[npt.NDArray[np.int64]] = []
        images: list[tuple[int, Image]] = []
        at = row = 0
        for chunk in chunks:
            name = f"{where}.chunks[{chunk.chunk}]"
            if images and chunk.at == at:
                raise ContentError(
                    f"{name} stands directly behind another image; put at least one token between two images"
                )
            image = self._check(chunk, name)
            parts += [tokens[at : chunk.at], np.full(image.tokens, self.token, np.int64)]
            row += chunk.at - at
            images.append((row, image))
            row, at = row + image.tokens, chunk.at
        parts.append(tokens[at:])
        whole = np.concatenate(parts)
        kinds = torch.zeros(1, len(whole), dtype=torch.int64)
        for first, image in images:
            kinds[0, first : first + image.tokens] = 1
        positions, deltas = self._model.get_rope_index(
            torch.from_numpy(whole)[None],
            mm_token_type_ids=kinds,
            image_grid_thw=torch.tensor([image.grid for _, image in images]),
        )
        return Expanded(whole, positions[:, 0], int(deltas), tuple(images))

    def visual(self, parts: Sequence[Part]) -> Visual | None:
        """The features of a pass, whose parts of images are given in order of the rows. None without any."""
        if not parts:
            return None
        rows: list[Tensor] = []
        found: list[tuple[Tensor, ...]] = []
        for part in parts:
            features = self.features(part.image)
            rows.append(torch.arange(part.row, part.row + part.last - part.first))
            found.append(tuple(x[part.first : part.last] for x in (features.embeddings, *features.deep)))
        embeddings, *deep = (torch.cat(x) for x in zip(*found, strict=True))
        return Visual(torch.cat(rows).to(self._device), Features(embeddings, tuple(deep)))

    def pixels(self, image: Image) -> Tensor:
        """The patches of an image, fp32 [patches, values], from the cache or anew."""
        entry = self._cache.get(image.digest)
        found = None if entry is None else entry.pixels
        if found is None:
            found = self._prepare(image.chunk).pixels
        assert found is not None
        return found

    def features(self, image: Image) -> Features:
        """What the tower makes of an image, from the cache or anew."""
        entry = self._cache.get(image.digest)
        features = None if entry is None else entry.features
        if features is None:
            features = self._encode(self.pixels(image), image.grid)
        self._keep(image.digest, _Entry(image.tokens, image.grid, None, features))
        return features

    def _encode(self, pixels: Tensor, grid: tuple[int, int, int]) -> Features:
        # Sampling runs in inference mode, whose tensors autograd would not take in training.
        with torch.inference_mode(False), torch.no_grad():
            out = self._model.get_image_features(
                pixels.clone().to(self._device), torch.tensor([grid], device=self._device), return_dict=True
            )
            (embeddings,) = out.pooler_output
            deep = tuple(layer[0] for layer in getattr(out, "deepstack_features", None) or ())
        return Features(embeddings, deep)

    def _check(self, chunk: ImageChunk, name: str) -> Image:
        digest = _digest(chunk)
        entry = self._cache.get(digest)
        if entry is None:
            try:
                entry = self._prepare(chunk)
            except ValueError as error:
                raise ContentError(f"{name} {error}") from error
        self._keep(digest, entry)
        if chunk.expected_tokens is not None and chunk.expected_tokens != entry.tokens:
            raise ContentError(
                f"{name}.expected_tokens is {chunk.expected_tokens}; this model makes {entry.tokens} tokens "
                "of the image"
            )
        need = math.prod(entry.grid) * self._patch_bytes
        if self.most_bytes is not None and need > self.most_bytes:
            raise ContentError(
                f"{name} has {math.prod(entry.grid)} patches, for which the vision tower needs about {need} "
                f"bytes; this server has {self.most_bytes} for it. Send it smaller or raise --memory"
            )
        return Image(chunk, digest, entry.tokens, entry.grid)

    def _prepare(self, chunk: ImageChunk) -> _Entry:
        """The processor's patches, fp32 [patches, values], and their grid. Raises ValueError with the end of
        a sentence about the chunk."""
        image = _decode(chunk)
        merge = int(self._processor.merge_size) ** 2
        try:
            tokens = self._processor.get_number_of_image_patches(image.height, image.width) // merge
            if tokens <= MOST_TOKENS:
                made = self._processor(images=[image], return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"cannot be shown to this model: {_short(error)}") from error
        if tokens > MOST_TOKENS:
            raise ValueError(
                f"would become {tokens} tokens; an image may have at most {MOST_TOKENS}. Send it smaller"
            )
        frames, height, width = made["image_grid_thw"][0].tolist()
        return _Entry(frames * height * width // merge, (frames, height, width), made["pixel_values"])

    def _keep(self, digest: bytes, entry: _Entry) -> None:
        """Put an entry in front; the oldest ones make room, the newest stays however large it is."""
        old = self._cache.pop(digest, None)
        self._cached_bytes += entry.nbytes - (0 if old is None else old.nbytes)
        self._cache[digest] = entry
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes


def _digest(chunk: ImageChunk) -> bytes:
    """The identity of an image: its bytes, and what else decides about its pixels."""
    digest = hashlib.blake2b(repr((chunk.format, chunk.size)).encode(), digest_size=16)
    digest.update(chunk.data)
    return digest.digest()


def _decode(chunk: ImageChunk) -> PIL.Image.Image:
    """The upright RGB image. Raises ValueError with the end of a sentence about the chunk."""
    if chunk.format not in FORMATS:
        raise ValueError(f"has the format {chunk.format!r}; send 'png' or 'jpeg'")
    if chunk.size is not None and (min(chunk.size) < 1 or chunk.size[0] * chunk.size[1] > MOST_PIXELS):
        raise ValueError(
            f"has the override_dimensions {chunk.size[0]} x {chunk.size[1]}; both must be at least 1, and "
            f"their product at most {MOST_PIXELS}"
        )
    image = None
    try:
        with PIL.Image.open(io.BytesIO(chunk.data), formats=[f.upper() for f in FORMATS]) as opened:
            found, (width, height) = str(opened.format).lower(), opened.size
            if found == chunk.format and width * height <= MOST_PIXELS:
                image = PIL.ImageOps.exif_transpose(opened).convert("RGB")
    except PIL.UnidentifiedImageError:  # its own text is an address in memory
        raise ValueError(
            f"cannot be decoded as {chunk.format}: its bytes are those of no png or jpeg"
        ) from None
    except Exception as error:  # Pillow's decoders raise what they like
        raise ValueError(f"cannot be decoded as {chunk.format}: {_short(error)}") from error
    if found != chunk.format:
        raise ValueError(f"has the format {chunk.format!r}, but its data is {found}")
    if image is None:
        raise ValueError(f"has {width} x {height} pixels; at most {MOST_PIXELS} are allowed")
    return image if chunk.size is None else image.resize(chunk.size, PIL.Image.Resampling.BICUBIC)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
