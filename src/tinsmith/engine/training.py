"""A forward_backward request on its way through the model.

A request's datums are cut into blocks by that request alone: whole sequences, up to BLOCK_TOKENS
together. Blocks of many requests and runs ride in one packed pass; each block's loss, output and
gradient are computed on its own rows, so that the company changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.aside import Aside
from tinsmith.engine.commands import Reply
from tinsmith.engine.kernels import elementwise
from tinsmith.engine.kernels.elementwise import LogSoftmax
from tinsmith.engine.losses import Loss, find_loss
from tinsmith.engine.model.attention import TILE, pad_rows, round_up
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights, Gradients, Layout
from tinsmith.engine.model.packing import Block, PackedSequences, Pass, Segment, running
from tinsmith.engine.model.recurrent import PackedRecurrence
from tinsmith.engine.model.vision import Expanded, Part
from tinsmith.engine.optimizers.clipping import gradient_norm
from tinsmith.wire.training import Array, ContentError, Datum, TrainingRequest, encode_output

BLOCK_TOKENS = 512  # a block ends before the sequence that would go beyond; a longer sequence is one block
UNEMBED_ROWS = 256  # rows whose logits exist at a time, on a CPU
UNEMBED_BYTES = 1 << 30  # of logits on a GPU, whose products want more rows


@dataclass(slots=True)
class _Sequence:
    """A checked datum."""

    tokens: Tensor  # int64 [N], an image's places included
    targets: Tensor  # int64 [N] or [N, K]
    inputs: dict[str, Tensor]  # fp32, in the shape of the targets
    expanded: Expanded | None = None  # where there are images


@dataclass(slots=True)
class _Cut:
    """Datums [first, last) of a request, `rows` rows with the padding."""

    first: int
    last: int
    rows: int


class TrainingJob:
    """One request: its blocks, what came out so far, and its gradients (None for forward alone)."""

    def __init__(
        self,
        request: TrainingRequest,
        model: BaseModel,
        layout: Layout,
        weights: AdapterWeights,
        aside: Aside | None = None,
    ) -> None:
        """Checks the content; raises ContentError."""
        aside = aside or Aside(None)
        loss = self.loss = find_loss(request, aside)
        self.config: Mapping[str, float] = loss.settings(request.config)
        self.model, self.layout, self.weights = model, layout, weights
        self.forward_only = request.forward_only
        self.sequences = [_check(loss, d, i, model, aside) for i, d in enumerate(request.data)]
        aside.touch()
        self.cuts = _cut([s.tokens.numel() for s in self.sequences])
        self.tokens = sum(s.tokens.numel() for s in self.sequences)
        self.alone = False  # after a failed pass: run without company, to see whose fault it was
        self.key = ""  # of the share whose part of the device it uses
        self.failure = ""
        self.started = 0.0  # when its first pass began, seconds since 1970
        self.answer: Callable[[Reply], None] = lambda reply: None
        self.restart()

    def restart(self) -> None:
        """Forget everything computed so far."""
        self.next = 0
        self.outputs: list[Array] = []
        self.loss_sums: list[float] = []
        self.refusal = ""
        self.metrics: list[Mapping[str, float]] = []  # of each datum, where the loss has any
        self.gradients = None if self.forward_only else Gradients(self.layout, self.model.device)
        self.norm: float | None = None  # of the gradients, once they are whole

    @property
    def done(self) -> bool:
        return self.next == len(self.cuts) or bool(self.refusal)

    def result(self) -> bytes:
        """The encoded ForwardBackwardOutput. Raises ContentError for a loss that could not be computed, or is
        not finite."""
        if self.refusal:
            raise ContentError(f"{self.refusal}. Nothing was accumulated")
        total = math.fsum(self.loss_sums)
        if self.gradients is not None and math.isfinite(total):
            self.norm = gradient_norm(self.gradients.flat)
        if not math.isfinite(total) or not math.isfinite(self.norm or 0.0):
            raise ContentError(
                f"the {self.loss.name} loss or its gradient is not finite ({total}); check 'logprobs', "
                "'advantages' and 'weights' for values that overflow. Nothing was accumulated"
            )
        outputs = [self._output(*each) for each in zip(self.outputs, self.sequences, strict=True)]
        return encode_output(outputs, {"loss:sum": total, **self._reduced()}, self.loss.output_type)

    def _output(self, logprobs: Array, sequence: _Sequence) -> dict[str, Array]:
        """A datum's arrays, all fp32 in the shape of its targets."""
        if not self.loss.elementwise:
            return {"logprobs": logprobs}
        values = self.loss.of_tokens(torch.from_numpy(logprobs), sequence.inputs, self.config)
        return {"logprobs": logprobs, "elementwise_loss": values.numpy()}

    def _reduced(self) -> dict[str, float]:
        """The datums' own metrics as one, by the reduction that each key names."""
        reduced: dict[str, float] = {}
        for key in self.metrics[0] if self.metrics else ():
            total = math.fsum(m[key] for m in self.metrics)
            reduced[key] = total / len(self.metrics) if key.endswith(":mean") else total
        return reduced


def _check(loss: Loss, datum: Datum, index: int, model: BaseModel, aside: Aside) -> _Sequence:
    where, tokens, vocab = f"data[{index}]", datum.tokens, model.vocab_size
    expanded = model.expand(tokens, datum.images, f"{where}.model_input") if datum.images else None
    if expanded is not None:
        tokens = expanded.tokens
        datum = datum.expanded(tokens)
    if tokens.size > model.max_context:
        raise ContentError(
            f"{where}.model_input has {tokens.size} tokens; the context of {model.name} is "
            f"{model.max_context}"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        bad = tokens[(tokens < 0) | (tokens >= vocab)][0]
        raise ContentError(
            f"{where}.model_input contains token {bad}; the vocabulary of {model.name} has ids 0 to "
            f"{vocab - 1}"
        )
    targets, inputs = loss.check(datum, where, vocab, aside)
    return _Sequence(
        torch.from_numpy(tokens),
        torch.from_numpy(np.array(targets)),
        {k: torch.from_numpy(v) for k, v in inputs.items()},
        expanded,
    )


def _cut(lengths: Sequence[int]) -> list[_Cut]:
    cuts: list[_Cut] = []
    first, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > BLOCK_TOKENS:
            cuts.append(_Cut(first, i, pad_rows(tokens)))
            first, tokens = i, 0
        tokens += length
    cuts.append(_Cut(first, len(lengths), pad_rows(tokens)))
    return cuts


def run_pass(
    work: Sequence[tuple[TrainingJob, _Cut]],
    most_bytes: int | None = None,
    pause: Callable[[], None] | None = None,
) -> None:
    """Run one block of each pair through the model together, all of one model, all with or all without
    gradients. Results go into the jobs; the caller advances `job.next`. Where the pass would need more than
    `most_bytes`, layers' activations are computed again in the backward pass rather than kept. `pause` is
    called between layers, and may compute something else meanwhile.

    Blocks of one adapter stand together in one segment.
    """
    model = work[0][0].model
    backward = not work[0][0].forward_only
    order = sorted(range(len(work)), key=lambda i: _first_with(work, work[i][0].weights))
    segments: list[Segment] = []
    blocks: list[tuple[TrainingJob, _Cut, int]] = []
    spans: list[tuple[int, int]] = []
    rows = sum(cut.rows for _, cut in work)
    ids = torch.zeros(rows, dtype=torch.int64)
    positions = torch.zeros(rows, dtype=torch.int64)
    if any(s.expanded is not None for job, cut in work for s in job.sequences[cut.first : cut.last]):
        positions = positions.repeat(3, 1)
    images: list[Part] = []
    at = 0
    for i in order:
        job, cut = work[i]
        if not segments or segments[-1].weights is not job.weights:
            segments.append(Segment(at, at, job.weights))
        if job.gradients is not None:
            segments[-1].blocks.append(Block(at, at + cut.rows, job.gradients))
        segments[-1].stop = at + cut.rows
        blocks.append((job, cut, at))
        row = at
        for sequence in job.sequences[cut.first : cut.last]:
            n = sequence.tokens.numel()
            ids[row : row + n] = sequence.tokens
            positions[..., row : row + n] = torch.arange(n)
            if sequence.expanded is not None:
                positions[:, row : row + n] = sequence.expanded.positions
                images += sequence.expanded.within(row, 0, n)
            spans.append((row, n))
            row += n
        at += cut.rows
    recurrent = PackedRecurrence(segments, spans, model.device) if model.apart else None
    attention = PackedSequences(spans, rows, model.device, model.dtype)
    this = Pass(segments, attention, recurrent, pause=pause)
    this.long = model.long_rows([(row, n, n) for row, n in spans], rows)
    if backward and most_bytes is not None:
        longest = max(cut.rows for _, cut in work)
        this.recomputes = peak_bytes(model, rows, longest, True) > most_bytes
    visual = model.vision.visual(images) if model.vision is not None else None
    with torch.set_grad_enabled(backward), running(this):
        hidden = model.hidden(ids.to(model.device), positions.to(model.device), this, visual)
        gradient = torch.zeros_like(hidden) if backward else None
        finish = [_loss(job, cut, hidden.detach(), gradient, start, pause) for job, cut, start in blocks]
        if gradient is not None and hidden.requires_grad:
            hidden.backward(gradient)
    for each in finish:
        each()


def _first_with(work: Sequence[tuple[TrainingJob, _Cut]], weights: AdapterWeights) -> int:
    return next(i for i, (job, _) in enumerate(work) if job.weights is weights)


def unembed_rows(model: BaseModel) -> int:
    """Rows whose logits exist at a time."""
    if model.device.type == "cpu":
        return UNEMBED_ROWS
    most = UNEMBED_BYTES // (model.vocab_size * (model.dtype.itemsize + 4))
    return max(UNEMBED_ROWS, min(4096, most // UNEMBED_ROWS * UNEMBED_ROWS))


def _loss(
    job: TrainingJob,
    cut: _Cut,
    hidden: Tensor,
    gradient: Tensor | None,
    start: int,
    pause: Callable[[], None] | None,
) -> Callable[[], None]:
    """Loss and logprobs of one block, and d loss / d hidden into `gradient`: the logits of unembed_rows rows
    at a time, counted from the block's own start. Returns what takes the results into the job, which waits
    for the device; before that a token-local loss does not.

    A loss of whole datums needs all their logprobs before any gradient. Where a block is longer than
    unembed_rows the logits are then made twice, rather than kept.
    """
    sequences = job.sequences[cut.first : cut.last]
    width, device = max(map(_width, sequences)), hidden.device
    targets = _stack([s.targets for s in sequences], width, cut.rows).to(device)
    step = unembed_rows(job.model)
    parts = [slice(at, min(at + step, cut.rows)) for at in range(0, cut.rows, step)]
    logprobs = torch.empty(cut.rows, width, device=device)
    values: Tensor | None = None

    def unembed(part: slice, *, backward: bool) -> _Unembedded:
        rows = hidden[start + part.start : start + part.stop]
        return _Unembedded.of(job, rows, targets[part], backward=backward, pause=pause)

    def take_back(logits: _Unembedded, part: slice, dlp: Tensor) -> None:
        assert gradient is not None
        gradient[start + part.start : start + part.stop] = logits.backward(dlp)

    if job.loss.whole is None:
        values, differentiate = _token_losses(job, sequences, width, cut.rows, device)
        for part in parts:
            logits = unembed(part, backward=gradient is not None)
            logprobs[part] = logits.logprobs
            dlp = differentiate(part, logits.logprobs, gradient is not None)
            if dlp is not None:
                take_back(logits, part, dlp)
    else:
        once = len(parts) == 1
        for part in parts:
            logits = unembed(part, backward=once and gradient is not None)
            logprobs[part] = logits.logprobs
        dlp = _datum_losses(job, sequences, cut.first, logprobs.cpu(), backward=gradient is not None)
        for part in parts if gradient is not None else ():
            if once or bool(dlp[part].any()):
                take_back(logits if once else unembed(part, backward=True), part, dlp[part].to(device))

    def finish() -> None:
        mine, of_tokens = logprobs.cpu(), None if values is None else values.cpu()
        for s, rows in _rows_of(sequences):
            if of_tokens is not None:
                job.loss_sums.append(float(of_tokens[rows, : _width(s)].double().sum()))
            job.outputs.append(mine[rows, : _width(s)].reshape(s.targets.shape).numpy().copy())

    return finish


@dataclass(slots=True)
class _Unembedded:
    """The logits of some rows and what is needed to differentiate through them. `table` stands for the
    fp32 log-probabilities [n, vocab]; `logprobs` [n, K] are those of the targets."""

    rows: Tensor
    logits: Tensor
    table: LogSoftmax | _Table
    targets: Tensor
    logprobs: Tensor
    this: Pass

    @classmethod
    def of(
        cls,
        job: TrainingJob,
        rows: Tensor,
        targets: Tensor,
        *,
        backward: bool,
        pause: Callable[[], None] | None = None,
    ) -> _Unembedded:
        segment = Segment(0, len(rows), job.weights)
        if job.gradients is not None:
            segment.blocks.append(Block(0, len(rows), job.gradients))
        this = Pass([segment], pause=pause)
        with torch.set_grad_enabled(backward):
            if backward:
                rows = rows.detach().requires_grad_(True)
            logits = job.model.logits(rows, this)
        with torch.no_grad():
            table = log_softmax(logits)
            return cls(rows, logits, table, targets, table.gather(targets), this)

    def backward(self, dlp: Tensor) -> Tensor:
        """d loss / d rows, given d loss / d logprobs [n, K]. `table` is used up."""
        with torch.no_grad():
            dlogits = self.table.gradient(self.targets, dlp)
        with running(self.this):
            self.logits.backward(dlogits)
        assert self.rows.grad is not None
        return self.rows.grad


class _Table:
    """elementwise.LogSoftmax by torch's operations."""

    def __init__(self, logits: Tensor) -> None:
        self.dtype = logits.dtype
        self.table = BaseModel.log_softmax(logits)

    def gather(self, ids: Tensor) -> Tensor:
        return self.table.gather(1, ids)

    def gradient(self, ids: Tensor, grads: Tensor) -> Tensor:
        # d logprob_j / d logits = onehot(j) - softmax
        out = self.table.exp_().mul_(-grads.sum(1, keepdim=True)).scatter_add_(1, ids, grads)
        return out.to(self.dtype)


def log_softmax(logits: Tensor) -> LogSoftmax | _Table:
    """Of logits [n, vocab], which `gradient` may overwrite: those of chosen tokens, and its gradient."""
    usable = elementwise.usable(logits.device, logits.dtype)
    return elementwise.log_softmax(logits) if usable else _Table(logits)


def _token_losses(
    job: TrainingJob, sequences: Sequence[_Sequence], width: int, rows: int, device: torch.device
) -> tuple[Tensor, Callable[[slice, Tensor, bool], Tensor | None]]:
    """A token-local loss over one block: its values [rows, width], and the function that fills in those of
    some rows from their logprobs and gives d loss / d logprobs where it is asked to."""
    inputs = {
        name: _stack(
            [s.inputs[name] if name in s.inputs else _absent(job, name, s) for s in sequences], width, rows
        ).to(device)
        for name in {name for s in sequences for name in s.inputs}
    }
    real = _stack([torch.ones_like(s.targets, dtype=torch.bool) for s in sequences], width, rows).to(device)
    values = torch.empty(rows, width, device=device)

    def differentiate(part: slice, logprobs: Tensor, backward: bool) -> Tensor | None:
        with torch.set_grad_enabled(backward):
            leaf = logprobs.detach().requires_grad_(backward)
            value = job.loss.of_tokens(leaf, {k: v[part] for k, v in inputs.items()}, job.config)
        values[part] = torch.where(real[part], value.detach(), 0.0)
        if not backward:
            return None
        (dlp,) = torch.autograd.grad(value.sum(), leaf)
        return torch.where(real[part], dlp, 0.0)

    return values, differentiate


def _datum_losses(
    job: TrainingJob, sequences: Sequence[_Sequence], first: int, logprobs: Tensor, *, backward: bool
) -> Tensor:
    """A loss of whole datums, `first` and those behind it, over one block: values and metrics into the job;
    d loss / d logprobs, in the shape of `logprobs` [rows, width], zeros where there is nothing."""
    dlp = torch.zeros_like(logprobs)
    for index, (s, rows) in enumerate(_rows_of(sequences), first):
        leaf = logprobs[rows, : _width(s)].reshape(s.targets.shape).clone().requires_grad_(backward)
        try:
            with torch.set_grad_enabled(backward):
                value, metrics = job.loss.of_datum(leaf, s.inputs, job.config)
            gradient = job.loss.gradient(value, leaf) if backward else None
        except ContentError as error:
            job.refusal = job.refusal or f"data[{index}]: {error}"
            continue
        job.loss_sums.append(float(value.detach().double().sum()))
        job.metrics.append(metrics)
        if gradient is not None:
            dlp[rows, : _width(s)] = gradient.reshape(-1, _width(s))
    return dlp


def _width(sequence: _Sequence) -> int:
    return sequence.targets.shape[1] if sequence.targets.dim() == 2 else 1


def _rows_of(sequences: Sequence[_Sequence]) -> Iterator[tuple[_Sequence, slice]]:
    """Each sequence of a block with its rows there."""
    at = 0
    for sequence in sequences:
        yield sequence, slice(at, at + len(sequence.targets))
        at += len(sequence.targets)


def _absent(job: TrainingJob, name: str, sequence: _Sequence) -> Tensor:
    """What an optional input is where another datum of the block has it and this one does not."""
    return torch.full(sequence.targets.shape, job.config.get(name, 1.0))


def _stack(parts: Sequence[Tensor], width: int, rows: int) -> Tensor:
    """Tensors [N] or [N, K] one below the other: [rows, width], zeros where there is nothing."""
    out = torch.zeros(rows, width, dtype=parts[0].dtype)
    at = 0
    for part in parts:
        part = part.unsqueeze(1) if part.dim() == 1 else part
        out[at : at + part.shape[0], : part.shape[1]] = part
        at += part.shape[0]
    return out


def peak_bytes(model: BaseModel, rows: int, longest: int, backward: bool, *, recomputed: bool = False) -> int:
    """Upper estimate of what a pass over `rows` rows allocates, in bytes.

    Per row and layer the tensors that autograd keeps (inputs of the linear layers, norms in fp32, the
    attention's q, k, v and output), plus one tile of attention scores and one block of logits. Of layers that
    are computed again in the backward pass only the input is kept, where the model can do that.
    """
    config = model.config
    size = model.dtype.itemsize
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    top_k = int(getattr(config, "num_experts_per_tok", 0) or 1)
    heads = int(config.num_attention_heads)
    dim = max((s.key_dim for s in model.attention_layers.values()), default=hidden // heads)
    per_layer = size * (8 * hidden + 6 * heads * dim + 5 * inner * top_k) + 4 * (4 * hidden + 2 * heads * dim)
    layers, inputs = int(config.num_hidden_layers) if backward else 2, 0
    if recomputed and backward and model.recomputable:
        layers, inputs = 1, layers * hidden * size
    scores = 4 * 4 * heads * min(TILE, longest) * round_up(longest, 64)
    if model.generic:  # transformers' own attention holds them all, of every layer and several times
        scores = 3 * 4 * heads * longest * longest * layers
    logits = unembed_rows(model) * model.vocab_size * (2 * size + 3 * 4)
    features = 0 if model.vision is None else model.vision.row_bytes
    return rows * (per_layer * layers + inputs + 4 * hidden * size + features) + scores + logits
