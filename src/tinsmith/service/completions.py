"""Completions of texts: the sampling of this server for callers who speak text instead of tokens.

Everything goes through Sampling, so that it is metered, limited and shared as any other sample.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from tinsmith.engine.commands import ModelInfo, Piece
from tinsmith.store.samplers import SamplingSessionRow
from tinsmith.text.parts import beginning
from tinsmith.text.tokenizer import Detokenizer, TextError, Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.errors import WireError
from tinsmith.wire.images import ImageChunk
from tinsmith.wire.sample_request import SampleRequest

from .caller import Caller
from .context import Context
from .errors import Refused, Unavailable
from .futures import Failure, Lost, Outcome, Pending
from .samplers import Samplers
from .sampling import Sampling


@dataclass(frozen=True, slots=True)
class Target:
    """What a `model` names."""

    model: ModelInfo
    base_model: str | None
    model_path: str | None
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the images among them (`chunk` is an image's number), and their names in errors."""

    tokens: Sequence[int]
    images: tuple[ImageChunk, ...] = ()
    places: tuple[str, ...] = ()

    @property
    def least(self) -> int:
        """Its tokens, at least: only the engine knows how many an image is."""
        return len(self.tokens) + len(self.images)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How to complete each of `prompts`, `n` times. `logprobs` None asks for none, k for those of
    the k likeliest tokens beside each sampled one. `prompt_logprobs` asks for the prompt's, too. Of
    special tokens those in `marks` are text, all of them where that is None."""

    prompts: Sequence[Prompt]
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    marks: tuple[str, ...] | None = ()


@dataclass(frozen=True, slots=True)
class Token:
    """A token, the place in the output's text (in characters) where it begins, its logprob (None: the first
    of a prompt) and those of the likeliest beside it."""

    id: int
    offset: int
    logprob: float | None
    likeliest: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More of the completion `index` (prompt * n + number). `finish` comes once, with the last one; `stop` is
    the text that it stopped at."""

    index: int
    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None
    stop: str | None = None


@dataclass(slots=True)
class Usage:
    prompt: int = 0
    cached: int = 0
    completion: int = 0


class Completions:
    def __init__(self, context: Context, samplers: Samplers, sampling: Sampling) -> None:
        self._context = context
        self._samplers = samplers
        self._sampling = sampling
        self._tokenizers: dict[str, asyncio.Task[Tokenizer]] = {}

    async def target(self, caller: Caller, name: str) -> Target:
        """A base model's name, the tinker:// path of saved weights, or `base;path`. Raises NotFound."""
        base, _, path = name.rpartition(";")
        base_model, model_path = (base or None, path) if path.startswith("tinker://") else (name, None)
        caller.require(caller.home, "sample")
        row = SamplingSessionRow("", caller.org_id, "", 0.0, "", model_path, None, None, ephemeral=False)
        row = await self._samplers.resolve(caller, row, base_model)
        model = self._samplers.sampleable(row.base_model)
        return Target(model, base_model, model_path, await self.tokenizer(model))

    async def tokenizer(self, model: ModelInfo) -> Tokenizer:
        if model.no_text:
            raise Refused(
                f"model: {model.name} takes no text: {model.no_text}; send token ids by Tinker's API"
            )
        task = self._tokenizers.get(model.name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            load = asyncio.to_thread(Tokenizer.load, model.text_path, model.max_context)
            task = self._tokenizers[model.name] = asyncio.get_running_loop().create_task(load)
        try:
            return await asyncio.shield(task)
        except TextError as error:
            raise Refused(f"model: {error}") from None

    def models(self) -> list[ModelInfo]:
        return [model for model in self._context.engine.info.models.values() if not model.not_sampleable]

    async def begin(self, caller: Caller, target: Target, wanted: Wanted, *, stream: bool) -> Running:
        """Begin to sample. What is returned must be closed. Raises what Sampling.sample does."""
        running = Running(self._context, self._sampling, caller, target, wanted)
        try:
            for number, prompt in enumerate(wanted.prompts):
                await running.add(number, prompt, stream)
        except BaseException:
            await running.close()
            raise
        return running


class Running:
    """Samples under way. Closing it stops what has not ended."""

    def __init__(
        self, context: Context, sampling: Sampling, caller: Caller, target: Target, wanted: Wanted
    ) -> None:
        self._context, self._sampling, self._caller = context, sampling, caller
        self._target, self._wanted = target, wanted
        self._events: asyncio.Queue[tuple[int, Piece | Outcome | Exception]] = asyncio.Queue()
        self._open: dict[int, str] = {}
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outputs = [_Output(index, target, wanted) for index in range(len(wanted.prompts) * wanted.n)]
        self.usage = Usage(prompt=sum(prompt.least for prompt in wanted.prompts))
        self.prompts: dict[
            int, list[Token]
        ] = {}  # with prompt_logprobs, by number of the prompt, once it has ended

    async def add(self, number: int, prompt: Prompt, stream: bool) -> None:
        wanted, target = self._wanted, self._target
        k = wanted.logprobs or 0
        request = SampleRequest(
            sampling_session_id=None,
            seq_id=None,
            base_model=target.base_model,
            model_path=target.model_path,
            prompt=np.array(prompt.tokens, "<i4").tobytes(),
            images=prompt.images,
            prompt_length=prompt.least,
            num_samples=wanted.n,
            max_tokens=wanted.max_tokens,
            seed=wanted.seed,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            stop=(*target.model.end_tokens, *wanted.stop),
            prompt_logprobs=wanted.prompt_logprobs,
            topk_prompt_logprobs=k if wanted.prompt_logprobs else 0,
            topk_sample_logprobs=k,
            prompt_logprobs_last_n=None,
            targets=None,
            prompt_alt_tokens_k=0,
            record_stability_info=False,
        )
        hear = partial(self._hear, number) if stream else None
        promise = await self._sampling.sample(self._caller, request, hear)
        self._open[number] = promise.request_id
        self._context.spawn(self._await(number, promise.request_id))

    def _hear(self, number: int, part: Piece) -> None:
        self._events.put_nowait((number, part))

    async def _await(self, number: int, request_id: str) -> None:
        try:
            outcome: Outcome | Pending = Pending()
            while isinstance(outcome, Pending) and not self._closing.done():
                outcome = await self._sampling.outcome(
                    self._caller, request_id, self._context.settings.poll_hold, self._closing
                )
            if not isinstance(outcome, Pending):
                self._events.put_nowait((number, outcome))
        except Exception as error:
            self._events.put_nowait((number, error))

    async def deltas(self) -> AsyncIterator[Delta]:
        """The completions, piece by piece; each of them whole in one piece where they are not streamed.
        Raises Refused, WireError, Unavailable, or RuntimeError where the server is to blame."""
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, Piece):
                output = self._outputs[number * self._wanted.n + event.index]
                if event.token is not None:
                    more = output.feed([(event.token, event.logprob, event.likeliest)])
                else:
                    assert event.ended is not None
                    more = output.end(event.ended)
                if more is not None:
                    yield more
                continue
            for more in self._ended(number, self._open.pop(number), event):
                yield more

    def _ended(self, number: int, request_id: str, event: Outcome | Exception) -> list[Delta]:
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Lost):
            raise Unavailable(event.message)
        if isinstance(event, Failure):
            if event.category != "user":
                raise RuntimeError(event.message)
            if image := re.match(r"prompt\.chunks\[(\d+)\] ", event.message):
                place = self._wanted.prompts[number].places[int(image[1])]
                raise WireError(place, event.message[image.end() :])
            raise Refused(event.message)
        assert isinstance(event.payload, bytes)
        response = pb.SampleResponse.FromString(event.payload)
        if self._wanted.prompts[number].images:
            self.usage.prompt += self._sampling.prompt_tokens(request_id) - self._wanted.prompts[number].least
        self.usage.cached += response.prompt_cache_hit_tokens
        if self._wanted.prompt_logprobs:
            self.prompts[number] = self._prompt_tokens(number, response)
        found = []
        for index, sequence in enumerate(response.sequences):
            output = self._outputs[number * self._wanted.n + index]
            ids = np.frombuffer(sequence.tokens, "<i4").tolist()
            logprobs = np.frombuffer(sequence.logprobs, "<f4").tolist()
            tops = _topk(sequence.topk_sampled_logprobs, len(ids))
            self.usage.completion += len(ids)
            fresh = list(zip(ids, logprobs, tops, strict=True))[output.heard :]
            reason = "stop" if sequence.stop_reason == pb.STOP_REASON_STOP else "length"
            first, last = output.feed(fresh), output.end(reason)
            found += [delta for delta in (first, last) if delta is not None]
        return found

    def _prompt_tokens(self, number: int, response: pb.SampleResponse) -> list[Token]:
        ids = list(self._wanted.prompts[number].tokens)
        logprobs = np.frombuffer(response.prompt_logprobs, "<f4").tolist()
        tops = _topk(response.topk_prompt_logprobs, len(ids))
        detokenizer, offset, tokens = Detokenizer(self._target.tokenizer), 0, []
        for place, (id_, logprob, likeliest) in enumerate(zip(ids, logprobs, tops, strict=True)):
            known = None if place == 0 else logprob
            tokens.append(Token(id_, offset, known, likeliest if place else ()))
            offset += len(detokenizer.feed([id_]))
        return tokens

    async def close(self) -> None:
        """Stop what has not ended."""
        if not self._closing.done():
            self._closing.set_result(None)
        for request_id in self._open.values():
            await self._sampling.cancel(self._caller, request_id)
        self._open.clear()


@dataclass(slots=True)
class _Output:
    """One completion on its way from tokens to text."""

    index: int
    target: Target
    wanted: Wanted
    heard: int = 0  # tokens
    given: int = 0  # characters
    held: str = ""  # text that may be the beginning of a stop
    tokens: list[Token] = field(default_factory=list)
    finished: bool = False
    detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer(self.target.tokenizer, marks=self.wanted.marks)

    def feed(self, fresh: Sequence[tuple[int, float, Sequence[tuple[int, float]]]]) -> Delta | None:
        self.heard += len(fresh)
        if self.finished:
            return None
        fresh = [each for each in fresh if each[0] not in self.target.model.end_tokens]
        if self.wanted.logprobs is None:
            self.held += self.detokenizer.feed([id_ for id_, _, _ in fresh])
        else:
            for id_, logprob, likeliest in fresh:
                self.tokens.append(Token(id_, self.given + len(self.held), logprob, likeliest))
                self.held += self.detokenizer.feed([id_])
        if self._stop() is not None:
            return self.end("stop")
        return self._give(len(self.held) - beginning(self.held, self.wanted.stop))

    def end(self, reason: str) -> Delta | None:
        if self.finished:
            return None
        self.held += self.detokenizer.rest()
        self.finished = True
        found = self._stop()
        if found is not None:
            at, _ = found
            self.held = self.held[:at]
            self.tokens = [token for token in self.tokens if token.offset < self.given + at]
            reason = "stop"
        text, self.held = self.held, ""
        return Delta(self.index, text, self.tokens, reason, found[1] if found is not None else None)

    def _stop(self) -> tuple[int, str] | None:
        """Where the first stop is in what is held. It cannot have begun before."""
        found = [(self.held.find(stop), stop) for stop in self.wanted.stop]
        return min(((at, stop) for at, stop in found if at >= 0), default=None)

    def _give(self, length: int) -> Delta | None:
        if not length:
            return None
        text, self.held = self.held[:length], self.held[length:]
        self.given += length
        given = [token for token in self.tokens if token.offset < self.given]
        self.tokens = self.tokens[len(given) :]
        return Delta(self.index, text, given)


def _topk(message: pb.TopkLogprobs, length: int) -> list[Sequence[tuple[int, float]]]:
    if not message.k:
        return [()] * length
    shape = message.length, message.k
    ids = np.frombuffer(message.token_ids, "<i4").reshape(shape).tolist()
    logprobs = np.frombuffer(message.logprobs, "<f4").reshape(shape).tolist()
    return [list(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
