"""A request for samples and its sequences: what they are on the way, and what of them is refused."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tinsmith.engine.commands import Piece, Sample, SampleParams
from tinsmith.engine.model.attention import PAGE
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.vision import Expanded
from tinsmith.engine.prompt_scores import PromptScores
from tinsmith.engine.runs import Answer
from tinsmith.engine.sampling import StopCheck
from tinsmith.wire.sampling import Sampled
from tinsmith.wire.training import ContentError

MAX_SAMPLES = 4096
MOST_TOPK_CELLS = 1 << 26  # logprobs beside sampled tokens that one request may ask for


@dataclass(slots=True)
class SampleRequest:
    command: Sample
    weights: AdapterWeights | None
    answer: Answer
    prompt: list[int]
    content: list[int]  # the prompt, with numbers for an image's content in its places
    expanded: Expanded | None  # where the prompt has images
    limit: int  # output tokens at most
    stop: StopCheck
    scores: PromptScores
    live: list[SampledSequence] = field(default_factory=list)
    finished: dict[int, Sampled] = field(default_factory=dict)
    cached: int = 0  # prompt tokens that the cache had when the request was first admitted
    prefilled: int = 0  # prompt tokens that have been computed or found in the cache
    times: dict[str, float] = field(default_factory=dict)
    added: float = field(default_factory=time.time)

    @property
    def serial(self) -> int:
        return self.weights.serial if self.weights is not None else 0

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far. A prompt counts once for all samples, and nothing counts again that had to make
        room and was computed anew."""
        return {
            "prefill": self.prefilled - self.cached,
            "cached_prefill": self.cached,
            "sample": sum(len(s.tokens) for s in self.finished.values())
            + sum(len(s.output) for s in self.live),
        }


@dataclass(slots=True, eq=False)
class SampledSequence:
    request: SampleRequest
    index: int
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None  # where its recurrent layers' states are
    advanced: int = 0  # a number that grows with every place in a step: that of its last one
    known: int = 0  # pages whose content has been made known
    content: bytes = b""
    long: bool = False  # whether what is in its pages was computed as of a long one, see rotations.py
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.request.command.share.key

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def page(self, number: int) -> list[int]:
        """What decides about the content of one of its pages, beside what is before it."""
        start, stop = number * PAGE, (number + 1) * PAGE
        length = len(self.request.prompt)
        return self.request.content[start:stop] + self.tokens[max(start, length) : max(stop, length)]


def decodes(sequence: SampledSequence) -> bool:
    """Whether its newest token alone is missing, and nothing else is asked of that than the next one."""
    return (
        sequence.computed == len(sequence.tokens) - 1
        and bool(sequence.logprobs or sequence.index)
        and sequence.request.expanded is None
    )


def siblings(sequence: SampledSequence) -> range:
    """The other samples of its request that begin with it, once its prompt is computed: their indices."""
    if sequence.index or sequence.logprobs:
        return range(0)
    return range(1, sequence.request.command.num_samples)


def piece(sequence: SampledSequence) -> Piece:
    """The newest token of a sequence."""
    ids, logprobs = sequence.topk[-1] if sequence.topk else ((), ())
    likeliest = tuple((int(token), float(logprob)) for token, logprob in zip(ids, logprobs, strict=True))
    return Piece(sequence.index, int(sequence.tokens[-1]), float(sequence.logprobs[-1]), likeliest)


def check_tokens(model: BaseModel, text: npt.NDArray[np.int64]) -> None:
    outside = text[(text < 0) | (text >= model.vocab_size)]
    if outside.size:
        raise ContentError(
            f"prompt contains token {outside[0]}; the vocabulary of {model.name} has ids 0 to "
            f"{model.vocab_size - 1}"
        )


def check(model: BaseModel, command: Sample, prompt: list[int]) -> int:
    """The most output tokens that the request may have. Raises ContentError."""
    params = command.params
    if not prompt:
        raise ContentError("prompt is empty; it needs at least one token")
    if not 1 <= command.num_samples <= MAX_SAMPLES:
        raise ContentError(f"num_samples is {command.num_samples}; it must be from 1 to {MAX_SAMPLES}")
    check_params(params)
    left = model.max_context - len(prompt)
    wanted = params.max_tokens if params.max_tokens is not None else max(left, 1)
    if wanted > left:
        raise ContentError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {wanted}; together they exceed the "
            f"context of {model.name}, {model.max_context} tokens"
        )
    most = min(MOST_TOPK_CELLS // (command.num_samples * wanted), model.vocab_size)
    if not 0 <= command.topk_sample <= most:
        raise ContentError(
            f"topk_sample_logprobs is {command.topk_sample}; for {command.num_samples} samples of up to "
            f"{wanted} tokens it must be from 0 to {most}"
        )
    return wanted


def check_params(params: SampleParams) -> None:
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise ContentError(f"temperature is {params.temperature}; it must be a finite number from 0 on")
    if not 0 < params.top_p <= 1:
        raise ContentError(f"top_p is {params.top_p}; it must be above 0 and at most 1")
    if params.top_k < -1:
        raise ContentError(f"top_k is {params.top_k}; it must be positive, or -1 or 0 for all tokens")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise ContentError(f"max_tokens is {params.max_tokens}; it must be at least 1")
    if any(s == "" for s in params.stop or ()):
        raise ContentError("stop contains an empty string; leave it out")
