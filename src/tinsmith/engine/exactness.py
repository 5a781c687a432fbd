"""Whether this machine's products give a row the same bits whatever stands beside it.

The engine pads rows to multiples of one number, keeps attention to fixed shapes and adds gradients over
blocks that a request alone decides. That makes results exact wherever a matrix product's rows do not depend
on their number once they are padded. Which products do that is the machine's and the library's affair,
so it is tried at start, on the very shapes that the models use; the padding that holds is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.model.attention import PADDING, PAGE, PackedAttention, attend, pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.packing import Pass, Segment, running
from tinsmith.engine.paged_attention import Chunk
from tinsmith.engine.states import SampledRecurrence, StatePool

_BATCH = 5  # sequences that go through the recurrent layers together
_COUNTS = (1, 2, 3, 5, 11)  # how many times the padding: odd counts reach the kernels' remainders


PADDINGS = (16, 32, 64)  # tried in this order: the smallest that is exact costs least


def settle(models: Sequence[BaseModel], max_rank: int) -> dict[str, list[str]]:
    """Pick the padding that makes every product of every model row-invariant, and set it.

    Returns what is not invariant even so, by model; then the smallest padding stays.
    """
    for model in models:
        model.mixers_together = _mixers_hold(model)
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
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    found: list[str] = []
    shapes = {(s.in_features, s.out_features) for s in model.slots}
    ranks = {pad_rows(r) for r in (1, 32, max_rank)}
    products = {(i, o) for i, o in shapes if i * o <= 1 << 26}
    products |= {(i, r) for i, _ in shapes for r in ranks} | {(r, o) for _, o in shapes for r in ranks}
    products |= {(o, i) for i, o in products}
    for inner, outer in sorted(products):
        if not _rows_hold(random(max(_COUNTS) * PADDING.rows * 2, inner), random(outer, inner) * inner**-0.5):
            found.append(f"linear {inner} -> {outer} in {model.dtype}")
    for shape in dict.fromkeys(model.attention_layers.values()):
        group = max(1, int(model.config.num_attention_heads) // shape.kv_heads)
        if not _attention_holds(shape.kv_heads, group, shape.key_dim, shape.value_dim, random):
            found.append(f"attention with heads of {shape.key_dim} in {model.dtype}")
    table = random(max(_COUNTS) * PADDING.rows, model.vocab_size)
    if any(
        not torch.equal(model.log_softmax(table[:n]), model.log_softmax(table)[:n])
        for n in (1, PADDING.rows, 3 * PADDING.rows)
    ):
        found.append(f"log_softmax over {model.vocab_size}")
    return found


@torch.no_grad()
def _mixers_hold(model: BaseModel) -> bool:
    """Whether a token goes through the recurrent layers with the same bits alone and in a batch."""
    if not model.mixers:
        return True
    pool, count, prompt = StatePool(model, 2 * _BATCH, 1 << 62), _BATCH, 3
    generator = torch.Generator().manual_seed(0)
    width = int(model.config.hidden_size)

    def run(chunks: list[tuple[Chunk, int]], hidden: Tensor) -> Tensor:
        segments = [Segment(0, len(hidden), None)]
        with running(Pass(segments, None, SampledRecurrence(pool, segments, chunks))):
            mixers = [model.module.get_submodule(name) for name in model.mixers]
            return torch.cat([mixer(hidden.unsqueeze(0))[0] for mixer in mixers], dim=-1)

    def random(rows: int) -> Tensor:
        return torch.randn(pad_rows(rows), width, generator=generator).to(model.device, model.dtype)

    run([(Chunk(i * prompt, prompt, 0, ()), i) for i in range(count)], random(count * prompt))
    for i in range(count):
        pool.copy(i, count + i)
    tokens = random(count)
    together = run([(Chunk(i, 1, prompt, ()), i) for i in range(count)], tokens)
    for i in range(count):
        alone = run([(Chunk(0, 1, prompt, ()), count + i)], tokens[i : i + 1].expand(pad_rows(1), -1))
        if not torch.equal(alone[0], together[i]):
            return False
    return True


def _rows_hold(x: Tensor, weight: Tensor) -> bool:
    whole, back = F.linear(x, weight), x @ weight.T.contiguous()
    for count in _COUNTS:
        for start in (0, PADDING.rows * max(_COUNTS)):
            rows = slice(start, start + count * PADDING.rows)
            if not torch.equal(F.linear(x[rows], weight), whole[rows]):
                return False
            if not torch.equal(x[rows] @ weight.T.contiguous(), back[rows]):
                return False
    return True


def _attention_holds(
    kv_heads: int, group: int, key_dim: int, value_dim: int, random: Callable[..., Tensor]
) -> bool:
    """Decode rows, a short prefix and a larger batch against one whole sequence."""
    length = 3 * PAGE
    q = random(1, kv_heads * group, length, key_dim)
    k, v = random(1, kv_heads, length, key_dim), random(1, kv_heads, length, value_dim)
    scale = key_dim**-0.5
    whole = PackedAttention.apply(q, k, v, scale, None, None)
    prefix = PackedAttention.apply(q[:, :, :PAGE], k[:, :, :PAGE], v[:, :, :PAGE], scale, None, None)
    twice = PackedAttention.apply(*(torch.cat([x.flip(2), x]) for x in (q, k, v)), scale, None, None)
    if not (torch.equal(prefix, whole[:, :, :PAGE]) and torch.equal(twice[1:], whole)):
        return False
    keys, values = (x.float().unflatten(2, (-1, PAGE)) for x in (k, v))
    rows = pad_rows(group)
    for position in (0, PAGE - 1, PAGE, 2 * PAGE + 5):
        one = torch.zeros(1, kv_heads, rows, key_dim, device=q.device)
        one[:, :, :group] = q[:, :, position].float().view(1, kv_heads, group, key_dim)
        where = torch.full((1, rows), -1, device=q.device)
        where[:, :group] = position
        pages = position // PAGE + 1
        out = attend(one, keys[:, :, :pages], values[:, :, :pages], where, scale)[:, :, :group]
        if not torch.equal(out.reshape(1, kv_heads * group, value_dim).to(q.dtype), whole[:, :, position]):
            return False
    return True
