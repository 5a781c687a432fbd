"""A GPU's decode steps: captured once for every size of batch, and replayed.

A step of single tokens is a hundred kernels for every layer's dozen, each shorter than it takes Python to
launch. So what depends on the step (tokens, places, pages, adapters, how to draw) lies in buffers that stay
where they are, and everything between them and the drawn tokens is one CUDA graph. The batch is filled up to
the next size that is captured. A model whose code cannot be captured (one that looks at its numbers on the
way, say) is run as it is, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinsmith.engine.commands import SampleParams
from tinsmith.engine.kernels.gpu_attention import Pages
from tinsmith.engine.kernels.gpu_experts import StaticUnits
from tinsmith.engine.kernels.gpu_lora import StaticAdapters
from tinsmith.engine.kernels.triton_elementwise import LogSoftmax
from tinsmith.engine.kernels.triton_sampling import choose
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model.attention import PAGE
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import Pass, Segment
from tinsmith.engine.sampling import Drawn, top

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
# What a row of the buffer of numbers has in its columns.
_ID, _POSITION, _SLOT, _TOP_K, _TEMPERATURE, _TOP_P, _DRAW, _COLUMNS = range(8)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's next token: `token` at `position` goes into `pages`; `draw` is in [0, 1)."""

    token: int
    position: int
    pages: Sequence[int]
    weights: AdapterWeights | None
    params: SampleParams
    draw: float
    topk: int


class Decoder:
    """All decode steps of one base model. Rows of one adapter must stand together."""

    def __init__(self, model: BaseModel, pool: PagePool) -> None:
        self.model, self.pool = model, pool
        self.trouble = ""  # why steps are not captured
        self._steps: dict[tuple[int, int], _Step] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def run(self, rows: Sequence[Row]) -> Drawn:
        """Compute and draw the next token of each row, at most SIZES[-1] of them."""
        size = next(n for n in SIZES if n >= len(rows))
        widest = max((r.weights.rank for r in rows if r.weights is not None), default=0)
        width = 0 if widest == 0 else max(16, 1 << (widest - 1).bit_length())
        step = self._steps.get((size, width))
        if step is None:
            step = self._steps[size, width] = _Step(self.model, self.pool, size, width)
        step.fill(rows)
        if step.replay is None:
            step.replay = self._capture(step)
        step.replay()
        return step.drawn(rows)

    def _capture(self, step: _Step) -> Callable[[], None]:
        if self._memory is None or self.trouble:
            return step.compute
        step.compute()  # compiles what is not compiled yet, which must not happen while capturing
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory):
                step.compute()
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log.warning(
                "%s: decode steps cannot be captured and are launched one kernel at a time: %s",
                self.model.name,
                self.trouble,
            )
            torch.cuda.synchronize(self.model.device)
            return step.compute
        return graph.replay


class _Step:
    """The buffers of one size of batch, and what is computed from them."""

    def __init__(self, model: BaseModel, pool: PagePool, size: int, width: int) -> None:
        device = model.device
        self.model, self.pool, self.size = model, pool, size
        self.replay: Callable[[], None] | None = None
        # One copy to the device and one back a step: integers, and fp64 in the same eight bytes.
        self._host = torch.zeros(size, _COLUMNS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._table: npt.NDArray[np.int64] = self._host.numpy()
        self._numbers = torch.zeros(size, _COLUMNS, dtype=torch.int64, device=device)
        self._result = torch.zeros(2, size, dtype=torch.float64, device=device)
        width_of_pages = -(-model.max_context // PAGE)
        self._pages = torch.zeros(size, width_of_pages, dtype=torch.int32, device=device)
        self._own_pages: list[tuple[int, ...]] = [()] * size
        self._host_pages = np.zeros((size, width_of_pages), np.int32)
        self._tiles = torch.zeros(size, 4, dtype=torch.int32, device=device)
        self._slots = torch.zeros(size, dtype=torch.int64, device=device)
        self.adapters = StaticAdapters(model.slots, size, width, device)
        self.adapters.units = StaticUnits.of(self.adapters)
        self._attention = Pages(self._slots, self._pages, self._tiles, [], model.max_context)
        self._rows = torch.arange(size, dtype=torch.int32, device=device)
        self._logits: Tensor | None = None

    def fill(self, rows: Sequence[Row]) -> None:
        n, table, floats = len(rows), self._table, self._table.view(np.float64)
        table[:] = 0
        table[:, _SLOT] = -1
        table[:n, _ID] = [r.token for r in rows]
        table[:n, _POSITION] = [r.position for r in rows]
        table[:n, _SLOT] = [r.pages[r.position // PAGE] * PAGE + r.position % PAGE for r in rows]
        table[:n, _TOP_K] = [max(r.params.top_k, 0) for r in rows]
        floats[:n, _TEMPERATURE] = [r.params.temperature for r in rows]
        floats[:n, _TOP_P] = [r.params.top_p for r in rows]
        floats[:n, _DRAW] = [r.draw for r in rows]
        self._numbers.copy_(self._host, non_blocking=True)
        changed = False
        for i, row in enumerate(rows):
            if (own := tuple(row.pages)) != self._own_pages[i]:
                self._own_pages[i], changed = own, True
                self._host_pages[i, : len(own)] = own
        if changed:
            longest = max(map(len, self._own_pages))
            self._pages[:, :longest].copy_(torch.from_numpy(self._host_pages[:, :longest]))
        self.adapters.fill([row.weights for row in rows])

    def compute(self) -> None:
        """Everything from the buffers of numbers to the drawn tokens and their logprobs."""
        numbers, floats = self._numbers, self._numbers.view(torch.float64)
        slots, positions = numbers[:, _SLOT], numbers[:, _POSITION]
        self._slots.copy_(slots)
        real = (slots >= 0).to(torch.int32)
        self._tiles.copy_(torch.stack([self._rows, real, positions.to(torch.int32), self._rows], 1))
        segments = [Segment(0, self.size, None)]
        this = Pass(segments, self._attend, adapters=self.adapters)
        hidden = self.model.hidden(numbers[:, _ID], positions, this)
        logits = self.model.logits(hidden, Pass(segments, adapters=self.adapters))
        temperatures = floats[:, _TEMPERATURE].float()
        tokens = choose(
            logits,
            self._rows.to(torch.int64),
            temperatures,
            numbers[:, _TOP_K].to(torch.int32),
            floats[:, _TOP_P].float(),
            floats[:, _DRAW].contiguous(),
        )
        logprobs = self._softmax(logits).gather(tokens[:, None])[:, 0]
        self._result.copy_(torch.stack([tokens.double(), logprobs.double()]))
        self._logits = logits

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        return self._attention.attend(q, k, v, keys, values, scale, window, sinks)

    def _softmax(self, logits: Tensor) -> LogSoftmax:
        temperatures = self._numbers.view(torch.float64)[:, _TEMPERATURE].float()
        return LogSoftmax(logits, torch.where(temperatures == 0, 1.0, temperatures))

    def drawn(self, rows: Sequence[Row]) -> Drawn:
        """What came out, which waits for the device."""
        tokens, logprobs = self._result.cpu().numpy()[:, : len(rows)]
        k = max(row.topk for row in rows)
        likeliest = None
        if k:
            assert self._logits is not None
            likeliest = top(self._softmax(self._logits).table()[: len(rows)], k)
        return Drawn(tokens.astype(np.int64).tolist(), logprobs.astype(np.float32).tolist(), likeliest)
