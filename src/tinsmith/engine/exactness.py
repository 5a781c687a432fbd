"""Whether this machine's products give a row the same bits whatever stands beside it.

The engine pads rows to multiples of one number, keeps attention to fixed shapes and adds gradients over
blocks that a request alone decides. That makes results exact wherever a matrix product's rows do not depend
on their number once they are padded. Which products do that is the machine's and the library's affair,
so it is tried at start, on the very shapes that the models use; the padding that holds is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.memory import give_back
from tinsmith.engine.model.attention import PADDING, PAGE, pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import GateLinear, LoraLinear, by_torch
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment, running
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.states import SampledRecurrence, StatePool

_TOGETHER = (1, 2, 3, 4, 5, 7, 8, 13, 21)  # how many sequences go through the recurrent layers at a time
_BATCHES = (1, 4, 8, 16)  # what their number is filled up to: the smallest multiple that is exact
_NARROW = 16
_DRAWS = 24  # times that is tried: two ways to a function differ in the last bit of few numbers only
_WHOLE, _PART = 1 << 26, 1 << 24  # numbers of a matrix that is tried as it is, and of what is of larger ones
_COUNTS = (1, 2, 3, 5, 11)  # how many times the padding: odd counts reach the kernels' remainders


PADDINGS = (16, 32, 64)  # tried in this order: the smallest that is exact costs least


def settle(models: Sequence[BaseModel], max_rank: int) -> dict[str, list[str]]:
    """Pick the padding that makes every product of every model row-invariant, and set it.

    Returns what is not invariant even so, by model; then the smallest padding stays.
    """
    for model in models:
        settle_mixers(model)
    first: dict[str, list[str]] | None = None
    for PADDING.rows in PADDINGS:
        found = {model.name: failures(model, max_rank) for model in models}
        if not any(found.values()):
            return found
        first = first or found
    PADDING.rows = PADDINGS[0]
    return first or {}


@torch.no_grad()
def failures(model: BaseModel, max_rank: int) -> list[str]:
    """What is not row-invariant here: descriptions, empty where all is exact."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=model.dtype).to(model.device)

    found: list[str] = []
    for (height, width), own in sorted(_matrices(model, max_rank).items(), key=lambda item: item[0]):
        # Rows of one length meet a matrix on the way forward, rows of the other on the way back.
        for inner, outer, forward in ((width, height, True), (height, width, False)):
            narrow = min(inner, outer) < _NARROW
            for _ in range(_DRAWS if narrow else 1):
                matrix = random(height, width).mul_(inner**-0.5) if own is None else own
                rows = random((5 if narrow else 2) * max(_COUNTS) * PADDING.rows, inner)
                held = _rows_hold(rows, partial(_forward if forward else _back, matrix))
                del matrix, rows
                give_back()
                if not held:
                    found.append(f"linear {inner} -> {outer} in {model.dtype}")
                    break
    for shape, layer in {shape: layer for layer, shape in model.attention_layers.items()}.items():
        if not _attention_holds(model, layer, random):
            found.append(f"attention with heads of {shape.key_dim} in {model.dtype}")
    if model.has_gates and not _sigmoid_holds(random(_DRAWS, 3 * PADDING.rows, 1)):
        found.append(f"sigmoid of one number a row in {model.dtype}")
    table = random(5 * PADDING.rows, model.vocab_size)
    whole = model.log_softmax(table)
    if any(
        not torch.equal(model.log_softmax(table[:n]), whole[:n]) for n in (1, PADDING.rows, 3 * PADDING.rows)
    ):
        found.append(f"log_softmax over {model.vocab_size}")
    return found


def _matrices(model: BaseModel, max_rank: int) -> dict[tuple[int, int], Tensor | None]:
    """The shapes of the matrices that rows meet in torch's products, as they lie in memory, each with one of
    the model's own where it has such: others as large would need memory that nothing else does."""
    found: dict[tuple[int, int], Tensor | None] = {(out, inner): None for inner, out in model.routers}
    for slot in model.slots:
        if by_torch(slot, model.device, model.dtype):
            for rank in {pad_rows(r) for r in (1, 32, max_rank)}:
                found[rank, slot.in_features] = found[slot.out_features, rank] = None
    for module in model.module.modules():
        own: list[Tensor] = []
        if isinstance(module, (LoraLinear, GateLinear)):
            own = [module.weight]
        elif hasattr(module, "tinsmith_name"):  # experts, [experts, ., .]
            own = [weight[0] for weight in module.parameters(recurse=False) if weight.dim() == 3]
        for matrix in own:
            part = matrix if matrix.numel() <= _WHOLE else matrix[: _PART // matrix.shape[1]]
            found[part.shape[0], part.shape[1]] = part.detach()
    return found


def settle_mixers(model: BaseModel) -> None:
    """Find how single tokens may go through the recurrent layers together and keep their bits: their
    elementwise functions take the last few numbers of a tensor by another way than the rest."""
    if model.mixers and not model.generic:
        for model.mixers_padding in _BATCHES:
            if _mixers_hold(model):
                return
    model.mixers_padding = 0


@torch.no_grad()
def _mixers_hold(model: BaseModel) -> bool:
    """Whether a token goes through the recurrent layers with the same bits alone and in a batch."""
    most, prompt = max(_TOGETHER), 3
    pool = StatePool(model, 2 * most, 1 << 62)
    generator = torch.Generator().manual_seed(0)
    # They are all alike, so one speaks for them.
    mixer = model.module.get_submodule(next(iter(model.mixers)))

    def random(rows: int) -> Tensor:
        width = int(model.config.hidden_size)
        return torch.randn(pad_rows(rows), width, generator=generator).to(model.device, model.dtype)

    def run(chunks: list[tuple[Chunk, int]], hidden: Tensor) -> Tensor:
        segments = [Segment(0, len(hidden), None)]
        with running(Pass(segments, None, SampledRecurrence(pool, segments, chunks))):
            return mixer(hidden.unsqueeze(0))[0]

    def step(tokens: Tensor, count: int) -> Tensor:
        for i in range(count):
            pool.copy(i, most + i)
        chunks = [(Chunk(i, 1, prompt, ()), most + i) for i in range(count)]
        return run(chunks, tokens[: pad_rows(count)])[:count]

    run([(Chunk(i * prompt, prompt, 0, ()), i) for i in range(most)], random(most * prompt))
    for _ in range(_DRAWS):
        tokens = random(most)
        whole = step(tokens, most)
        if not all(torch.equal(step(tokens, count), whole[:count]) for count in _TOGETHER):
            return False
    return True


def _sigmoid_holds(x: Tensor) -> bool:
    """x: [draws, rows, width]. A tensor's last few numbers go another way than the rest."""
    part = slice(PADDING.rows, 2 * PADDING.rows)
    return all(torch.equal(torch.sigmoid(rows[part].clone()), torch.sigmoid(rows)[part]) for rows in x)


def _forward(matrix: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, matrix)


def _back(matrix: Tensor, x: Tensor) -> Tensor:
    return x @ matrix


def _rows_hold(x: Tensor, product: Callable[[Tensor], Tensor]) -> bool:
    """x: [rows, in]. Narrow products go other ways than wide ones, which differ seldom: those are tried in
    many places."""
    whole = product(x)
    tries = [(c, start) for c in _COUNTS for start in (0, PADDING.rows * max(_COUNTS))]
    if min(x.shape[1], whole.shape[1]) < _NARROW:
        tries += [(1, start) for start in range(0, len(x), PADDING.rows)]
    return all(
        torch.equal(product(x[rows]), whole[rows])
        for rows in (slice(start, start + count * PADDING.rows) for count, start in tries)
    )


def _attention_holds(model: BaseModel, layer: int, random: Callable[..., Tensor]) -> bool:
    """A prefix, a larger batch, chunks of a prompt and decode steps against one whole sequence."""
    shape, length = model.attention_layers[layer], 3 * PAGE
    group = max(1, int(model.config.num_attention_heads) // shape.kv_heads)
    q = random(shape.kv_heads * group, length, shape.key_dim)
    k = random(shape.kv_heads, length, shape.key_dim)
    v = random(shape.kv_heads, length, shape.value_dim)
    scale = shape.key_dim**-0.5

    def packed(spans: list[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        backend = PackedSequences(spans, q.shape[1], model.device, model.dtype)
        return backend(layer, q, k, v, scale, None, None)

    whole = packed([(0, length)], q, k, v)
    cut = PAGE + 7
    if not torch.equal(packed([(0, cut)], *(x[:, :cut] for x in (q, k, v))), whole[:cut]):
        return False
    both = packed([(0, length), (length, length)], *(torch.cat([x.flip(1), x], dim=1) for x in (q, k, v)))
    if not torch.equal(both[length:], whole):
        return False
    pool = PagePool(model, 4)
    pages = [page for page in (pool.allocate() for _ in range(3)) if page is not None]
    start = 0
    for count in (PAGE - 1, 1, 1, 30, 1, length - PAGE - 32):
        rows = slice(start, start + count)
        step = PagedAttention(pool, [Chunk(0, count, start, pages)], count)
        if not torch.equal(step(layer, q[:, rows], k[:, rows], v[:, rows], scale, None, None), whole[rows]):
            return False
        start += count
    return True
