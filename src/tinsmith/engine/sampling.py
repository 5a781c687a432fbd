"""From logits to tokens, each row by itself: what a row gives depends on nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinsmith.engine.commands import SampleParams
from tinsmith.engine.kernels import draw as kernel
from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.elementwise import LogSoftmax
from tinsmith.engine.model.base import BaseModel

_MASK = (1 << 64) - 1


Integers = Sequence[int] | npt.NDArray[np.int64]


def uniforms(seeds: Sequence[int], samples: Integers, positions: Integers) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, sample, position), and nothing else.

    SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: no state to carry along, so a
    sequence that was put off and taken up again draws what it would have drawn.
    """
    return uniforms_at(streams(seeds, samples), np.asarray(positions, dtype=np.uint64))


def streams(seeds: Sequence[int], samples: Integers) -> npt.NDArray[np.uint64]:
    """What of `uniforms` the positions have no part in."""
    seeded = np.array([s & _MASK for s in seeds], dtype=np.uint64)
    return _joined(seeded, np.asarray(samples, dtype=np.uint64))


def uniforms_at(
    streams: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """The numbers of streams at positions."""
    return (_mix(_joined(streams, positions)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _joined(x: npt.NDArray[np.uint64], part: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return _mix(x + np.uint64(0x9E3779B97F4A7C15) * (part + np.uint64(1)))  # arrays wrap around


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token of each row, its logprob, and, where asked for, the row's k likeliest tokens and theirs."""

    tokens: list[int]
    logprobs: list[float]
    likeliest: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None


def sample(logits: Tensor, params: Sequence[SampleParams], draws: npt.NDArray[np.float64], k: int) -> Drawn:
    """logits: [n, vocab] in the model's dtype; draws: [n] in [0, 1). Logprobs are those of the distribution
    at the row's temperature, before any cut; a greedy row's are those at 1."""
    if gpu.takes(logits.device, logits.dtype):
        return _sample_on_gpu(logits, params, draws, k)
    if kernel.usable(logits):
        return _sample_by_kernel(logits, params, draws, k)
    values = scaled(logits, [p.temperature for p in params])
    chosen = choose(values, params, draws)
    table = BaseModel.log_softmax(values)
    taken = table.gather(1, torch.tensor(chosen, device=table.device)[:, None])[:, 0]
    return Drawn(chosen, taken.tolist(), top(table, k) if k else None)


def _sample_by_kernel(
    logits: Tensor, params: Sequence[SampleParams], draws: npt.NDArray[np.float64], k: int
) -> Drawn:
    soft = _softened(logits, params)
    rules = Rules.of(params)
    chosen = kernel.draw(soft, rules.drawn(draws), rules.top_k, rules.top_p)
    logprobs = soft.gather(chosen[:, None])[:, 0]
    return Drawn(chosen.tolist(), logprobs.tolist(), top(soft.table(), k) if k else None)


def _softened(logits: Tensor, params: Sequence[SampleParams]) -> LogSoftmax:
    temperatures = [p.temperature for p in params]
    if any(t not in (0.0, 1.0) for t in temperatures):
        logits = scaled(logits, temperatures)
    return LogSoftmax(logits)


@dataclass(frozen=True, slots=True)
class Rules:
    """How each row is drawn, as the CPU kernels know it: top_k 0 cuts nothing."""

    temperatures: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]

    @classmethod
    def of(cls, params: Sequence[SampleParams]) -> Rules:
        return cls(
            np.array([p.temperature for p in params], np.float32),
            np.array([max(p.top_k, 0) for p in params], np.int64),
            np.array([p.top_p for p in params], np.float64),
        )

    def drawn(self, u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """u in [0, 1) where a row is drawn at random; -1 where it is greedy."""
        return np.where(self.temperatures == 0, -1.0, u)


def likeliest(
    logits: Tensor, params: Sequence[SampleParams], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None:
    """As Drawn has them; None for k of 0. logits: [n, vocab] where the kernels of a CPU serve."""
    return top(_softened(logits, params).table(), k) if k else None


def _sample_on_gpu(
    logits: Tensor, params: Sequence[SampleParams], draws: npt.NDArray[np.float64], k: int
) -> Drawn:
    device = logits.device

    def send(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    temperatures = send([p.temperature for p in params], torch.float32)
    tokens = gpu.module("triton_sampling").choose(
        logits,
        torch.arange(len(params), device=device),
        temperatures,
        send([max(p.top_k, 0) for p in params], torch.int32),
        send([p.top_p for p in params], torch.float32),
        torch.from_numpy(draws).to(device, non_blocking=True),
    )
    # Greedy rows stay at 1; where all do, there is nothing to divide by.
    hot = any(p.temperature not in (0.0, 1.0) for p in params)
    by = torch.where(temperatures == 0, 1.0, temperatures) if hot else None
    soft = gpu.module("triton_elementwise").LogSoftmax(logits, by)
    logprobs = soft.gather(tokens[:, None])[:, 0]
    both = torch.stack([tokens.double(), logprobs.double()]).cpu().numpy()
    return Drawn(
        both[0].astype(np.int64).tolist(),
        both[1].astype(np.float32).tolist(),
        top(soft.table(), k) if k else None,
    )


def scaled(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """fp32 logits at each row's temperature; greedy rows (0) stay at 1."""
    t = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    return logits.float() / torch.where(t == 0, 1.0, t).unsqueeze(1)


def choose(logits: Tensor, params: Sequence[SampleParams], draws: npt.NDArray[np.float64]) -> list[int]:
    """A token of each row of scaled fp32 logits [n, vocab], by inverse CDF at `draws`.

    top_k first, then top_p on what is left, renormalized, as vLLM does.
    """
    out = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    u = torch.from_numpy(draws).to(logits.device)
    greedy = [i for i, p in enumerate(params) if np.float32(p.temperature) == 0]  # as `scaled` has it
    cut = [i for i, p in enumerate(params) if i not in greedy and (p.top_k > 0 or p.top_p < 1)]
    free = sorted(set(range(len(params))) - set(greedy) - set(cut))
    if greedy:
        out[greedy] = logits[greedy].argmax(-1)
    if free:
        out[free] = _invert(torch.softmax(logits[free], -1).double(), u[free])
    if cut:
        p, order = torch.softmax(logits[cut], -1).double().sort(dim=-1, descending=True, stable=True)
        vocab = p.shape[1]
        ks = torch.tensor([params[i].top_k if params[i].top_k > 0 else vocab for i in cut], device=p.device)
        ps = torch.tensor([params[i].top_p for i in cut], dtype=torch.float64, device=p.device)
        p = torch.where(torch.arange(vocab, device=p.device) < ks[:, None], p, 0.0)
        cumulative = p.cumsum(-1)
        p = torch.where(cumulative - p < ps[:, None] * cumulative[:, -1:], p, 0.0)
        out[cut] = order.gather(1, _invert(p, u[cut])[:, None])[:, 0]
    chosen: list[int] = out.tolist()
    return chosen


def draw(p: Tensor, u: Tensor) -> Tensor:
    """For p [n, vocab] and u [n, k] in [0, 1): the first index at which the running sum of a row of p exceeds
    u times the whole, [n, k]."""
    cumulative = p.cumsum(-1)
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # Rounding may put u at the very end: the last token that has any probability then.
    last = p.shape[1] - 1 - (p.flip(-1) > 0).to(torch.int8).argmax(-1, keepdim=True)
    return torch.minimum(index, last)


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """One draw of each row."""
    return draw(p, u[:, None])[:, 0]


def top(table: Tensor, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k most likely tokens of each row of log-probabilities [n, vocab], and their logprobs [n, k]."""
    values, indices = table.topk(k, dim=-1)
    return indices.to(torch.int32).cpu().numpy(), values.cpu().numpy()


class StopCheck:
    """Whether an output has come to a stop: by an end token, by given tokens, or by given strings."""

    def __init__(self, stop: tuple[int | str, ...] | None, end: Sequence[int], tokenizer: Any) -> None:
        self._tokens: set[int] = set(end) if stop is None else {s for s in stop if isinstance(s, int)}
        self._strings = [s for s in stop or () if isinstance(s, str)]
        self._tokenizer = tokenizer
        # A token has at least one byte, so a match that ends with the newest token begins in here.
        self._window = max((len(s.encode()) for s in self._strings), default=0) + 8

    def __call__(self, tokens: Sequence[int], prompt: int = 0) -> bool:
        """True if the output, which begins behind `prompt` of the tokens, stops with its newest token, which
        is part of it."""
        if tokens[-1] in self._tokens:
            return True
        if not self._strings:
            return False
        window = tokens[max(prompt, len(tokens) - self._window) :]
        text = self._tokenizer.decode(window, skip_special_tokens=False)
        return any(s in text for s in self._strings)
