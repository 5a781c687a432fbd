"""A training run's state on the engine: weights, moments, accumulated gradients, waiting commands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from tinsmith.engine.commands import (
    AdamParams,
    DimuonParams,
    Family,
    ForwardBackward,
    LoadState,
    LoraSpec,
    OptimStep,
    Piece,
    Publish,
    ReleaseRun,
    Reply,
    SaveExternal,
    SaveState,
    Share,
)
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights, Gradients, Layout
from tinsmith.engine.optimizers import adamw, dimuon
from tinsmith.engine.training import TrainingJob
from tinsmith.wire.training import ContentError

RunCommand = ForwardBackward | OptimStep | SaveState | SaveExternal | LoadState | Publish | ReleaseRun
Answer = Callable[[Reply | Piece], None]  # one Reply, and before it any number of Pieces


@dataclass(slots=True)
class State:
    """What a run is: all of it goes into a snapshot, nothing else does. fp32, flat, on the device.

    params, first, second: [layout.size]; first and second are None before the first step, second always where
    the optimizer has no second moment. gradient is None when nothing is accumulated.
    """

    params: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    step: int = 0
    gradient: Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = (self.params, self.first, self.second, self.gradient)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device) -> State:
        """The same there; the tensors themselves where they are there already."""
        parts = (getattr(self, field.name) for field in fields(self))
        return State(*(part.to(device) if isinstance(part, Tensor) else part for part in parts))  # type: ignore[arg-type]


@dataclass(slots=True)
class Run:
    """One training run. `state` is None while it is put away in `spilled`."""

    name: str
    model: BaseModel
    layout: Layout
    state: State | None
    optimizer: Family = "adamw"
    waiting: deque[tuple[RunCommand, Answer]] = field(default_factory=deque)
    jobs: deque[TrainingJob] = field(default_factory=deque)  # forward_backwards under way, in seq order
    spilled: str | None = None
    held: bool = False  # by a command that waits for files
    used: int = 0  # the engine's clock when it was last needed
    share: Share = field(default_factory=Share)
    _weights: AdapterWeights | None = None
    _norm: float | None = None  # of the accumulated gradient, where it is known

    @classmethod
    def create(cls, name: str, model: BaseModel, spec: LoraSpec, optimizer: Family = "adamw") -> Run:
        layout = Layout(model.slots, spec)
        return cls(name, model, layout, State(layout.initialize().to(model.device)), optimizer)

    @property
    def live(self) -> State:
        if self.state is None:
            raise RuntimeError(f"run {self.name} is put away")
        return self.state

    @property
    def busy(self) -> bool:
        """Whether there is anything that is not answered."""
        return bool(self.waiting or self.jobs or self.held)

    @property
    def weights(self) -> AdapterWeights:
        """The current weights as the model computes with them; made once per optimizer step."""
        if self._weights is None:
            self._weights = AdapterWeights(self.layout, self.live.params, self.model.dtype, self.model.device)
        return self._weights

    def replace(self, state: State | None) -> None:
        """Take `state` for the run's own."""
        self.state, self._norm = state, None
        self._outdate()

    def _outdate(self) -> None:
        """The weights have changed. A sampler may go on with those that were."""
        if self._weights is not None:
            self._weights.rest()
        self._weights = None

    def accumulate(self, gradients: Gradients, norm: float | None = None) -> None:
        """Add one request's gradients, of this norm if that is known."""
        state = self.live
        if state.gradient is None:
            state.gradient, self._norm = gradients.flat, norm
        else:
            state.gradient += gradients.flat
            self._norm = None

    def optimize(self, params: AdamParams | DimuonParams) -> dict[str, float]:
        """One optimizer step; with nothing accumulated nothing changes. Returns metrics. Raises ContentError
        for another optimizer's parameters."""
        if params.family != self.optimizer:
            raise ContentError(
                f"these are parameters of {params.family}, but this run was created with the optimizer "
                f"{self.optimizer}; send {'AdamParams' if self.optimizer == 'adamw' else 'DimuonParams'}"
            )
        state = self.live
        if state.gradient is None:
            return {}
        first = state.first if state.first is not None else torch.zeros_like(state.params)
        if isinstance(params, AdamParams):
            second = state.second if state.second is not None else torch.zeros_like(state.params)
            norm = adamw(state.params, state.gradient, first, second, state.step + 1, params, self._norm)
            state.second = second
        else:
            norm = dimuon(self.layout, state.params, state.gradient, first, params)
        state.first = first
        state.step += 1
        state.gradient = None
        self._outdate()
        return {"unclipped_grad_l2:mean": norm}

    @property
    def made_weights(self) -> AdapterWeights | None:
        """`weights`, if they have been made."""
        return self._weights

    @property
    def nbytes(self) -> int:
        """Resident bytes: the state and, where made, its copy in the model's dtype."""
        own = self.state.nbytes if self.state is not None else 0
        return own + (self._weights.nbytes if self._weights is not None else 0)
