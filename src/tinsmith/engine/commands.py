"""What an engine can be told, what it answers, and the client through which it is told.

This module is the whole contract between the control plane and the data plane. It imports neither
torch nor anything of the service (a test asserts both). Commands are plain values that pickle; a
training run's state is the fold of its commands in order, so whatever is random or chosen (seeds,
names, paths) is in the command before it is logged.

Order: commands of one `run` are carried out in the order of their submission, one after the other;
commands of different runs, and samples, in any order and together. A command that fails leaves
the run's state exactly as it was, and the commands behind it are carried out all the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tinsmith.wire.images import ImageChunk
from tinsmith.wire.optimizers import AdamParams as AdamParams
from tinsmith.wire.optimizers import DimuonParams as DimuonParams
from tinsmith.wire.optimizers import Family as Family
from tinsmith.wire.targets import PromptTargets

Category = Literal["user", "server"]
RECORD_TTL = 24 * 3600.0  # seconds for which a recorded sequence can be trained on after its last use


@dataclass(frozen=True, slots=True)
class Share:
    """Whose part of the device a command uses: an opaque key, and the weight of all that carry it.

    Where commands of several keys want the device, each key gets at least its weight's part of it.
    """

    key: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA adapter as Tinker defines it: y += (alpha / rank) * B (A x), A random, B zero.

    `seed` seeds the initialization alone. At least one of the three `train_*` is true.
    """

    rank: int
    seed: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class ImportAdapter:
    """Make a checkpoint, the new folder `path`, of the adapter in folder `source`, which may be anything.

    It must be in Tinker's format, for the base model `model` and the adapter that `lora` describes; its
    alpha may be another one. Answers {"size_bytes": int, "alpha": float}.
    """

    model: str
    lora: LoraSpec
    source: str
    path: str


# Training runs. Every one of these but Release names its seq_id in errors and logs only: order is
# the order of submission.


@dataclass(frozen=True, slots=True)
class CreateAdapter:
    """A new run on the base model `model`, with the optimizer that it has for good. Answers {}. Its commands
    use the device as part of `share`."""

    run: str
    model: str
    lora: LoraSpec
    share: Share = Share()
    optimizer: Family = "adamw"


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Forward, and backward unless the body's `forward_only` is set. Answers protobuf bytes.

    `body` is a serialized ForwardBackwardRequest as it came off the wire, in `encoding`. A `share` is the
    run's from now on. `aside` is the folder of what its session has put aside: sequences recorded by Sample,
    custom losses. `arrived_at` is the time, in seconds since 1970, to which the age of those is counted.
    """

    run: str
    seq_id: int
    body: bytes
    encoding: Literal["identity", "zstd"] = "identity"
    share: Share | None = None
    aside: str | None = None
    arrived_at: float = 0.0


@dataclass(frozen=True, slots=True)
class OptimStep:
    """One optimizer step on the accumulated gradients, which it clears. `params` are of the run's optimizer.

    Answers {"metrics": {...}}. With nothing accumulated nothing changes, and it succeeds.
    """

    run: str
    seq_id: int
    params: AdamParams | DimuonParams


@dataclass(frozen=True, slots=True)
class SaveState:
    """Write weights and optimizer state into the new folder `path`, all of it or nothing.

    With `gradients` the accumulated gradients go along, so that a run can be put away whole.
    Answers {"size_bytes": int}.
    """

    run: str
    seq_id: int
    path: str
    gradients: bool = False


@dataclass(frozen=True, slots=True)
class SaveExternal:
    """Write the weights alone into the new folder `path`, for use elsewhere, all of it or nothing.

    With `recipients` (age keys, or SSH public keys) every file is encrypted to them.
    Answers {"size_bytes": int}.
    """

    run: str
    seq_id: int
    path: str
    recipients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadState:
    """Replace the run's weights by those in folder `path`; the accumulated gradients are dropped.

    With `optimizer` the moments and the step count come along, which must be of the run's optimizer; else
    they start anew. With `gradients` the accumulated gradients are restored (a run that was put away whole).
    The adapter in `path` must have the run's rank and train_* flags. Answers {}.
    """

    run: str
    seq_id: int
    path: str
    optimizer: bool
    gradients: bool = False


@dataclass(frozen=True, slots=True)
class Publish:
    """Freeze the run's weights as sampling weights under the id `sampler`. Where that is taken already,
    samples that come from now on have the new weights.

    With `path`, also write them into that new folder, all of it or nothing; without, they live as
    long as the engine and the sampler do. Answers {"size_bytes": int | None}.
    """

    run: str
    seq_id: int
    sampler: str
    path: str | None = None


@dataclass(frozen=True, slots=True)
class ReleaseRun:
    """Forget a run and free what it held, after the commands before it. Answers {}."""

    run: str


@dataclass(frozen=True, slots=True)
class CreateLoss:
    """Keep a custom loss in the folder `aside`, under its id: `body` is the JSON of a traced graph, which is
    read and judged here. With an empty body, say whether it is there. Answers {"loss_id": str | None}.
    """

    aside: str
    loss_id: str
    body: bytes


# Sampling


@dataclass(frozen=True, slots=True)
class OpenSampler:
    """Make the weights in folder `path` (of a sampler or a training checkpoint) known as `sampler`.

    Idempotent for the same sampler and path; two samplers of one path share one copy. The folder
    is read again whenever the weights had to make room. `path` may also be a file that PutSampler wrote;
    it then is the sampler's own, and is deleted with it. Answers {}.
    """

    sampler: str
    model: str
    path: str


@dataclass(frozen=True, slots=True)
class PutSampler:
    """Write the weights of a sampler that has no folder into the new file `path`, as bits that OpenSampler
    takes back. Answers {"written": bool}: there is nothing to write of one that is unknown or has a folder.
    """

    sampler: str
    path: str


@dataclass(frozen=True, slots=True)
class ReleaseSampler:
    """Forget a sampler once the samples that use it are done. Answers {}."""

    sampler: str


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How to sample. Temperature 0 is greedy; top_k -1 or 0 and top_p 1 switch those filters off.

    `max_tokens` None samples to the end of the context. `stop` None stops at the model's end
    tokens, [] stops at nothing; token ids and strings stop where they first occur, and what stopped
    is part of the output. `seed` is always set (the service draws one where the request has none):
    sequence i of a request depends on (seed, i), the prompt and the weights alone.
    """

    seed: int
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop: tuple[int | str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """Sample `num_samples` continuations of `prompt` (int32 token ids as bytes) with `images` in it.

    `sampler` None is the base model. Answers protobuf bytes (SampleResponse).
    `prompt_logprobs` and `topk_prompt` ask for the prompt's own logprobs at temperature 1, of its last
    `prompt_logprobs_last_n` tokens where that is set; `targets` for those of chosen ids; `topk_sample` for
    those of the most likely tokens beside each sampled one. `alt_tokens` draws that many tokens, at the
    request's temperature, in the place of each prompt token but the first; their logprobs are at temperature
    1. At an image's places the prompt's logprobs are those of the model's placeholder token, of which it has
    learned nothing. `record` is a folder into which the sampled sequences are written before the answer is
    given, for ForwardBackward to build on. With `stream`, Pieces come before the answer.
    """

    request: str
    model: str
    sampler: str | None
    prompt: bytes
    params: SampleParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk_sample: int = 0
    prompt_logprobs_last_n: int | None = None
    targets: PromptTargets | None = None
    alt_tokens: int = 0
    images: tuple[ImageChunk, ...] = ()
    record: str | None = None
    stream: bool = False
    share: Share = Share()


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the sample `request`, which then fails with "cancelled". Answers {}."""

    request: str


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Answers the engine's figures as a flat dict: memory, queue lengths, batch sizes, exactness."""


Command = (
    CreateAdapter
    | ForwardBackward
    | OptimStep
    | SaveState
    | SaveExternal
    | LoadState
    | Publish
    | ReleaseRun
    | CreateLoss
    | OpenSampler
    | PutSampler
    | ReleaseSampler
    | Sample
    | Cancel
    | ImportAdapter
    | GetStatus
)


# Answers


@dataclass(frozen=True, slots=True)
class Done:
    """A command was carried out. `payload` is protobuf bytes or a JSON object; `usage` counts tokens
    by kind ("train", "prefill", "cached_prefill", "sample"): those of the request, however often the engine
    had to compute them. `times` says when (seconds since 1970) it was "started", and when its
    "first_token" came."""

    payload: bytes | dict[str, object]
    usage: Mapping[str, int] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """A command was refused or failed, and changed nothing.

    `usage` counts what a sample had computed when it was cancelled, or grew beyond the cache; what fails
    otherwise has none.
    """

    message: str
    category: Category = "user"
    usage: Mapping[str, int] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)


Reply = Done | Failed


@dataclass(frozen=True, slots=True)
class Piece:
    """What a sample with `stream` tells before its answer: a sampled token of sequence `index` with its
    logprob and, where asked for, the likeliest tokens beside it with theirs; or (no token) why the sequence
    ended. The answer says all of it again."""

    index: int
    token: int | None
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()
    ended: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model to serve: its public name, and the folder or hub id that it is loaded from."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine process is started with. `memory` bounds weights, adapters, caches and
    activations together, in bytes (None: a share of what the device has)."""

    models: tuple[ModelSource, ...]
    spill_dir: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    max_context: int | None = None
    max_rank: int = 128
    memory: int | None = None
    threads: int | None = None
    log_level: str = "warning"
    log_format: str = "text"
    trust_remote_code: bool = False
    deterministic: bool = False  # on a GPU, where it costs speed: a CPU always is


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served base model, as the engine loaded it."""

    name: str
    path: str
    architecture: str
    tokenizer_path: str
    vocab_size: int
    max_context: int
    max_rank: int
    dtype: str
    parameters: int
    fingerprint: str  # of config and weight index: the identity of the base that a run is bound to
    exact: bool
    way: str  # how sequences go through it, see BaseModel.way
    images: bool = False  # whether it takes them
    no_images: str = ""  # why not
    image_token: int | None = None  # what chat templates write in an image's place
    not_trainable: str = ""  # why no run can be made of it here; empty where one can
    not_sampleable: str = ""
    active_parameters: int = 0  # that a token meets: of experts, those that it goes to
    text_path: str = ""  # a folder with its tokenizer.json, for those who speak text
    no_text: str = ""  # why there is none
    end_tokens: tuple[int, ...] = ()  # ids that end what is sampled, where a request names no stops


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine is."""

    device: str
    exact: bool
    versions: Mapping[str, str]
    models: Mapping[str, ModelInfo]


class EngineLost(Exception):
    """The engine died before it answered. Runs and unsaved samplers that it held are gone."""


class EngineClient(Protocol):
    """How the control plane speaks to an engine, wherever that runs.

    `generation` counts the engine's lives: whatever was created in an earlier one is gone (what is
    in a folder can be loaded again). `submit` never blocks and keeps the order of its calls; the
    returned awaitable gives the reply, or raises EngineLost if the engine died first. While an
    engine restarts, commands wait for the new life.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def generation(self) -> int: ...

    @property
    def ready(self) -> bool: ...

    async def given_up(self) -> None:
        """Return once the engine has kept dying and will not come back."""

    async def start(self) -> EngineInfo: ...

    def submit(self, command: Command, parts: Callable[[Piece], None] | None = None) -> Awaitable[Reply]:
        """`parts` is called on the event loop with each Piece that comes before the reply."""

    def on_lost(self, callback: Callable[[int], None]) -> None:
        """Call `callback(lost_generation)` on the event loop as soon as an engine has died."""

    async def stop(self, grace: float) -> None:
        """Let what was submitted finish for up to `grace` seconds, then end the engine."""
