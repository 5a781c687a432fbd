"""A sample request in JSON: the prompt, how to sample, and what to say of the prompt."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass

import numpy as np

from .errors import WireError
from .fields import Fields
from .images import ImageChunk
from .targets import PromptTargets
from .tensors import csr_problem

MOST_SAMPLES = 4096
_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A sampling request: where (a session, or a base model or path), the prompt, and how."""

    sampling_session_id: str | None
    seq_id: int | None
    base_model: str | None
    model_path: str | None
    prompt: bytes  # int32 ids of the text tokens
    images: tuple[ImageChunk, ...]
    prompt_length: int  # at least: an image that says nothing of its tokens counts one
    num_samples: int
    max_tokens: int | None
    seed: int | None
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[int | str, ...] | None
    prompt_logprobs: bool
    topk_prompt_logprobs: int
    topk_sample_logprobs: int
    prompt_logprobs_last_n: int | None
    targets: PromptTargets | None
    prompt_alt_tokens_k: int
    record_stability_info: bool

    @classmethod
    def read(cls, fields: Fields) -> SampleRequest:
        params = fields.optional_child("sampling_params") or Fields({}, "sampling_params")
        prompt, images = _read_prompt(fields.child("prompt"))
        session = fields.optional_text("sampling_session_id")
        top_k = params.optional_integer("top_k", least=-1, most=_INT32)
        request = cls(
            sampling_session_id=session,
            seq_id=fields.integer("seq_id", least=0) if session is not None else None,
            base_model=fields.optional_text("base_model"),
            model_path=fields.optional_text("model_path", longest=2048),
            prompt=prompt.tobytes(),
            images=images,
            prompt_length=len(prompt) + sum(i.expected_tokens or 1 for i in images),
            num_samples=fields.optional_integer("num_samples", least=1, most=MOST_SAMPLES) or 1,
            max_tokens=params.optional_integer("max_tokens", least=1, most=_INT32),
            seed=params.optional_integer("seed", most=2**64 - 1),
            temperature=params.number("temperature", 1.0, least=0.0),
            top_k=-1 if top_k is None else top_k,
            top_p=_read_top_p(params),
            stop=_read_stop(params),
            prompt_logprobs=fields.flag("prompt_logprobs", False),
            topk_prompt_logprobs=fields.optional_integer("topk_prompt_logprobs", least=0, most=_INT32) or 0,
            topk_sample_logprobs=fields.optional_integer("topk_sample_logprobs", least=0, most=_INT32) or 0,
            prompt_logprobs_last_n=_read_last_n(fields),
            targets=_read_targets(fields),
            prompt_alt_tokens_k=fields.optional_integer("prompt_alt_tokens_k", least=0, most=_INT32) or 0,
            record_stability_info=fields.flag("record_stability_info", False),
        )
        if request.record_stability_info and session is None:
            raise fields.error(
                "record_stability_info",
                "goes with a sampling_session_id, to whose session the sequences belong",
            )
        if not images:  # else only the engine knows how many tokens there are
            _check_lengths(fields, request)
        return request


def _read_prompt(prompt: Fields) -> tuple[np.ndarray, tuple[ImageChunk, ...]]:
    parts: list[np.ndarray] = []
    images: list[ImageChunk] = []
    for index, item in enumerate(prompt.array("chunks")):
        chunk = Fields(item, f"prompt.chunks[{index}]")
        kind = chunk.raw("type") or "encoded_text"
        if kind == "image":
            images.append(_read_image(chunk, index, sum(map(len, parts))))
            continue
        if kind != "encoded_text":
            raise chunk.error(
                "type", f"{kind!r} is not offered by this server; use 'encoded_text' or 'image'"
            )
        tokens = chunk.array("tokens")
        try:
            part = np.asarray(tokens if tokens else [], dtype=np.int64 if not tokens else None)
        except (ValueError, OverflowError):
            part = np.zeros((0, 0))
        if part.ndim != 1 or part.dtype.kind != "i" or (part.size and not _are_token_ids(part)):
            raise chunk.error("tokens", f"must be token ids: integers from 0 to {_INT32}")
        parts.append(part.astype(np.int32))
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not whole.size and not images:
        raise WireError("prompt", "has no tokens; it must have at least one")
    return whole, tuple(images)


def _read_image(chunk: Fields, index: int, at: int) -> ImageChunk:
    data = chunk.raw("data")
    if not isinstance(data, str):
        raise chunk.error("data", "must be a text: the image's bytes in base64")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise chunk.error("data", "is no base64") from None
    size = chunk.optional_child("override_dimensions")
    form = chunk.raw("format")
    return ImageChunk(
        index,
        at,
        raw,
        form if isinstance(form, str) else "",
        chunk.optional_integer("expected_tokens", least=0, most=_INT32),
        (size.integer("width", least=1, most=_INT32), size.integer("height", least=1, most=_INT32))
        if size is not None
        else None,
    )


def _check_lengths(fields: Fields, request: SampleRequest) -> None:
    most = request.prompt_length - 1
    if (request.prompt_logprobs_last_n or 0) > most:
        raise fields.error(
            "prompt_logprobs_last_n",
            f"is {request.prompt_logprobs_last_n}; for a prompt of {most + 1} tokens it must be from 1 to"
            f" {most}",
        )
    if request.targets is not None and request.targets.rows != most:
        raise fields.error(
            "target_prompt_logprobs.shape",
            f"has {request.targets.rows} rows; for a prompt of {most + 1} tokens it must have {most}",
        )


def _read_last_n(fields: Fields) -> int | None:
    last_n = fields.optional_integer("prompt_logprobs_last_n", least=1, most=_INT32)
    if last_n is not None and not fields.flag("prompt_logprobs", False):
        raise fields.error("prompt_logprobs_last_n", "goes with prompt_logprobs; set that too")
    return last_n


def _read_targets(fields: Fields) -> PromptTargets | None:
    """A tensor as the SDK writes it: flat data, dtype, shape; row pointers and columns if sparse."""
    tensor = fields.optional_child("target_prompt_logprobs")
    if tensor is None:
        return None
    if tensor.raw("dtype") != "int64":
        raise tensor.error("dtype", f"must be 'int64', for token ids, not {tensor.raw('dtype')!r}"[:120])
    shape = tensor.integers("shape", least=0, most=_INT32)
    if len(shape) != 2:
        raise tensor.error("shape", f"must be [len(prompt) - 1, K], not {shape}"[:120])
    rows, columns = shape
    ids = _read_int64(tensor, "data")
    crow = col = None
    if tensor.has("sparse_crow_indices") or tensor.has("sparse_col_indices"):
        crow, col = _read_int64(tensor, "sparse_crow_indices"), _read_int64(tensor, "sparse_col_indices")
        problem = csr_problem(rows, columns, crow, col, ids.size)
        if problem:
            raise tensor.error("sparse_crow_indices", problem)
    elif ids.size != rows * columns:
        raise tensor.error("data", f"has {ids.size} values, but the shape {shape} needs {rows * columns}")
    return PromptTargets(
        rows,
        columns,
        ids.tobytes(),
        crow.tobytes() if crow is not None else None,
        col.tobytes() if col is not None else None,
    )


def _read_int64(tensor: Fields, name: str) -> np.ndarray:
    values = tensor.array(name)
    try:
        array = np.asarray(values) if values else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        array = np.zeros((0, 0))
    if array.ndim != 1 or array.dtype.kind != "i":
        raise tensor.error(name, "must be a flat JSON array of integers")
    return array.astype(np.int64)


def _are_token_ids(part: np.ndarray) -> bool:
    return bool(part.min() >= 0 and part.max() <= _INT32)


def _read_top_p(params: Fields) -> float:
    top_p = params.number("top_p", 1.0, most=1.0)
    if top_p <= 0.0 or math.isnan(top_p):
        raise params.error("top_p", f"must be greater than 0 and at most 1, not {top_p:g}")
    return top_p


def _read_stop(params: Fields) -> tuple[int | str, ...] | None:
    stop = params.raw("stop")
    if stop is None:
        return None
    if isinstance(stop, str):
        stop = [stop]
    if isinstance(stop, list):
        if all(isinstance(item, str) and item for item in stop):
            return tuple(stop)
        if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _INT32 for item in stop):
            return tuple(stop)
    raise params.error("stop", "must be a text, a list of texts, or a list of token ids (none of them empty)")
