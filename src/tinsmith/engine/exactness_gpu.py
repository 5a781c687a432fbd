"""Whether results on a GPU depend on their company: asked of the model itself, forward, backward and sampled.

Without --deterministic they do, and nothing is tried. With it every product and sum has one tile and one
order; whether that holds on the machine at hand is tried at start, on the model's own layers, as on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch

from tinsmith.engine.commands import Done, LoraSpec, Piece, Reply, Sample, SampleParams
from tinsmith.engine.exactness import failures, settle_mixers
from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.runs import Run
from tinsmith.engine.sampler import Sampler
from tinsmith.engine.training import TrainingJob, run_pass
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.training import Datum, TrainingRequest

_LENGTHS = (70, 9, 130)  # the first one's bits are looked at


def failures_on_gpu(model: BaseModel, max_rank: int) -> list[str]:
    """What depends on company: descriptions, empty where nothing does."""
    if not gpu.CHOICE.deterministic:
        model.mixers_padding = 1  # single tokens go through recurrent layers in whatever number there is
        return ["a GPU without --deterministic picks tiles and splits of sums by the size of a batch"]
    settle_mixers(model)
    found = failures(model, min(max_rank, 64))
    try:
        found += _company(model)
    except Exception as error:
        found.append(f"trying it failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


def _company(model: BaseModel) -> list[str]:
    """A request alone and beside two others; then sampled, against what the trainer computes of the text."""
    runs = [Run.create(f"trial{i}", model, LoraSpec(rank=8 * (i + 1), seed=i)) for i in range(len(_LENGTHS))]
    for run in runs:
        for _, b in run.layout.views(run.live.params).values():
            b.copy_(torch.empty(b.shape).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(1)))
    texts = [_text(model, n, i) for i, n in enumerate(_LENGTHS)]

    def job(i: int) -> TrainingJob:
        return _job(runs[i], texts[i])

    alone, together = job(0), [job(i) for i in range(len(runs))]
    run_pass([(alone, cut) for cut in alone.cuts])
    run_pass([(each, cut) for each in together[::-1] for cut in each.cuts])
    beside, found = together[0], []
    if not np.array_equal(alone.outputs[0], beside.outputs[0]):
        found.append("logprobs in training")
    assert alone.gradients is not None
    assert beside.gradients is not None
    if not torch.equal(alone.gradients.flat, beside.gradients.flat):
        found.append("gradients")
    if model.apart:  # recurrent layers take one token and many by different formulas
        return found
    sampler = Sampler(model, 64 * _page_bytes(model))
    replies: list[Reply | Piece] = []
    prompt = texts[0][:-8]
    params = SampleParams(seed=1, max_tokens=8, stop=())
    command = Sample("trial", model.name, None, prompt.astype(np.int32).tobytes(), params)
    sampler.add(command, runs[0].weights, replies.append)
    while sampler.step():
        pass
    if not replies or not isinstance(replies[0], Done):
        return [*found, f"sampling failed: {replies}"]
    (sequence,) = pb.SampleResponse.FromString(replies[0].payload).sequences  # type: ignore[arg-type]
    whole = np.concatenate([prompt, np.frombuffer(sequence.tokens, np.int32).astype(np.int64)])
    scored = _job(runs[0], whole)
    run_pass([(scored, cut) for cut in scored.cuts])
    mine = np.frombuffer(sequence.logprobs, np.float32)
    if not np.array_equal(mine, scored.outputs[0][len(prompt) - 1 :]):
        found.append("the sampler's logprobs, which are not the trainer's")
    return found


def _text(model: BaseModel, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.vocab_size, length)


def _job(run: Run, text: np.ndarray) -> TrainingJob:
    datum = Datum(text[:-1].copy(), {"target_tokens": text[1:].copy()})
    request = TrainingRequest("trial", 1, False, "cross_entropy", {}, [datum])
    return TrainingJob(request, run.model, run.layout, run.weights)


def _page_bytes(model: BaseModel) -> int:
    return Sampler(model, 0).pool.page_bytes
