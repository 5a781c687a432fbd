"""A model's recorded way has the bits of its own code, whatever rows and adapters share a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import families
from tests.engine.tiny import load, make_run, threads, tokens
from tinsmith.engine.commands import SampleParams
from tinsmith.engine.kernels import linear
from tinsmith.engine.kernels.attention import Chunks
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import Pass, Segment
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.program import Draws, Program
from tinsmith.engine.recording import LINEAR, Native, NotRepeatable, generalize, record
from tinsmith.engine.sampling import Rules
from tinsmith.engine.sampling import sample as draw_tokens

Folder = Callable[[str], Path]
pytestmark = pytest.mark.skipif(
    not linear.usable(torch.device("cpu"), torch.bfloat16), reason="no compiler, or no bf16 instructions here"
)


def load_packed(path: Path) -> BaseModel:
    model = load(path, torch.bfloat16)
    model.pack()
    return model


@pytest.fixture(params=[1, 2], autouse=True, ids=["one thread", "two threads"])
def with_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield


def step(
    model: BaseModel,
    pool: PagePool,
    program: Program | None,
    work: list[tuple[int, int, int, AdapterWeights | None]],
    draws: Draws | None = None,
) -> Tensor:
    """Hidden states of (sequence, new tokens, from which position, adapter), each on pages of its own."""
    chunks, segments, ids, places = [], [], [], []
    for owner, count, position, weights in work:
        chunks.append(Chunk(len(ids), count, position, range(1 + 3 * owner, 4 + 3 * owner)))
        segments.append(Segment(len(ids), len(ids) + count, weights))
        ids += tokens(position + count, owner)[position:]
        places += range(position, position + count)
    rows, padding = len(ids), [0] * (pad_rows(len(ids)) - len(ids))
    packed = torch.tensor(ids + padding), torch.tensor(places + padding)
    with torch.inference_mode():
        if program is None:
            attention = PagedAttention(pool, chunks, rows + len(padding))
            return model.hidden(*packed, Pass(segments, attention))[:rows]
        numbers = Chunks([(c.row, c.length, c.position, c.pages) for c in chunks])
        return program.run(*packed, program.where(segments), pool, numbers, rows, draws)[:rows].clone()


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Olmo3", "Phi3", "Gemma3Text"])
def test_the_bits_are_those_of_the_models_own_code(family: str, tmp_path: Path) -> None:
    """Prompts in chunks and single tokens, on adapters of several ranks and on none, in one step."""
    model = load_packed(families.make(family, tmp_path))
    program = Program.of(model)
    assert program is not None
    one, other = make_run(model, 8, seed=1).weights, make_run(model, 24, seed=2).weights
    work = [
        [(0, 70, 0, one), (1, 3, 0, None)],
        [(0, 1, 70, one), (1, 1, 3, None), (2, 100, 0, other), (3, 1, 0, one)],
        [(0, 1, 71, one)],
        [(2, 1, 100, other), (3, 40, 1, one)],
    ]
    pools = [PagePool(model, 1 << 24) for _ in range(2)]
    for each in work:
        wanted = step(model, pools[0], None, each)
        assert torch.equal(step(model, pools[1], program, each), wanted)


# temperature, top_k, top_p
_KINDS = (1.0, -1, 1.0), (0.0, -1, 1.0), (0.6, 5, 1.0), (1.7, -1, 0.8), (1e-6, -1, 1.0), (1.0, 3, 0.5)


def test_tokens_are_those_that_are_drawn_from_the_models_own_logits(folder: Folder) -> None:
    """From some of the rows, several from one, by every kind of parameters; with adapters there, too."""
    model = load_packed(folder("qwen3"))
    program = Program.of(model)
    assert program is not None
    assert program.draws
    weights = make_run(model, 8, seed=1).weights
    assert model.head is not None
    assert model.head.parts, "the test wants an adapter on the unembedding"
    work, wanted = [(0, 20, 0, None), (1, 9, 0, weights), (2, 1, 0, weights)], [3, 19, 20, 29]
    hidden = step(model, PagePool(model, 1 << 24), None, work)
    params = [
        SampleParams(seed=0, temperature=t, top_k=k, top_p=p)
        for t, k, p in (
            (1.0, -1, 1.0),
            (0.0, -1, 1.0),
            (0.6, 5, 1.0),
            (1.7, -1, 0.8),
            (1e-6, -1, 1.0),
            (1.0, 3, 0.5),
        )
    ]
    source = torch.tensor([0, 1, 1, 2, 3, 3])
    u = np.array([0.1, 0.5, 0.999, 0.0, 0.3, 0.7])
    segments = [Segment(0, 2, None), Segment(2, 4, weights)]
    rows = torch.nn.functional.pad(torch.tensor(wanted), (0, pad_rows(4) - 4))
    with torch.inference_mode():
        logits = model.logits(hidden[rows], Pass(segments))
    theirs = draw_tokens(logits[source], params, u, 0)

    rules = Rules.of(params)
    where = program.where(segments)
    draws = Draws(np.array(wanted), where, source.numpy(), rules, rules.drawn(u))
    for _ in range(2):  # a second time it goes the same way with what it has made
        step(model, PagePool(model, 1 << 24), program, work, draws)
        assert draws.tokens.tolist() == theirs.tokens
        assert draws.logprobs.tolist() == theirs.logprobs
        assert torch.equal(draws.logits, logits[:4])


def test_products_of_one_input_are_one_instruction(folder: Folder) -> None:
    model = load_packed(folder("qwen3"))
    program = Program.of(model)
    assert program is not None
    (layout, *_) = program._layouts.values()
    products = sum(isinstance(s, Native) and s.kind == LINEAR for s in layout.steps)
    instructions = int((layout.code[: layout.parts[-1][1], 0] == LINEAR).sum())  # type: ignore[index]
    layers = len(model.attention_layers)
    assert (products, instructions) == (7 * layers, 4 * layers)


def test_pages_that_move_are_found(folder: Folder) -> None:
    model = load_packed(folder("llama"))
    program, pool, other = Program.of(model), PagePool(model, 1 << 26), PagePool(model, 1 << 26)
    for position in range(3):
        found = step(model, pool, program, [(0, 1, position, None)])
        assert torch.equal(found, step(model, other, None, [(0, 1, position, None)]))
        pool._grow(2 * pool.places)


def made_to(change: Callable[[Tensor], Any], model: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model do something with its hidden states on its way."""
    real = model.through

    def through(embedded: Tensor, positions: Tensor, **extra: Any) -> Tensor:
        return real(change(embedded), positions, **extra)

    monkeypatch.setattr(model, "through", through)


def test_operations_that_no_instruction_knows_are_done_by_torch(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_packed(folder("qwen3"))
    made_to(lambda x: x.flip(-1) * 3, model, monkeypatch)
    program = Program.of(model)
    assert program is not None
    pool = PagePool(model, 1 << 24)
    assert torch.equal(
        step(model, pool, program, [(0, 20, 0, None)]), step(model, pool, None, [(0, 20, 0, None)])
    )


@pytest.mark.parametrize(
    "change",
    [lambda x: x * float(x.sum()), lambda x: x.clone().mul_(2), lambda x: x + torch.rand_like(x)],
    ids=["a number read", "written in place", "drawn"],
)
def test_what_cannot_be_repeated_is_no_program(
    change: Callable[[Tensor], Tensor], folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_packed(folder("qwen3"))
    made_to(change, model, monkeypatch)
    assert Program.of(model) is None


def test_another_way_for_more_rows_is_no_program(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_packed(folder("qwen3"))
    made_to(lambda x: x * 2 if x.shape[1] > 16 else x, model, monkeypatch)
    assert Program.of(model) is None


def test_numbers_that_do_not_grow_with_the_rows_are_named(folder: Folder) -> None:
    model = load_packed(folder("llama"))
    slots = {s.name: i for i, s in enumerate(model.slots)}
    made = [record(model, rows, slots) for rows in (16, 32, 80)]
    generalize(made, (16, 32, 80))
    with pytest.raises(NotRepeatable, match="does not grow"):
        generalize(made, (16, 32, 81))


def test_other_bits_are_no_program(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_packed(folder("qwen3"))
    real = Program.run
    monkeypatch.setattr(Program, "run", lambda *args: real(*args) + 2**-6)
    assert Program.of(model) is None
