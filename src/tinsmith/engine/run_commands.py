"""The commands of a run that are carried out between its forward_backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tinsmith.engine import adapter_files
from tinsmith.engine.commands import (
    Done,
    LoadState,
    OptimStep,
    Publish,
    ReleaseRun,
    SaveExternal,
    SaveState,
)
from tinsmith.engine.encryption import read_recipients
from tinsmith.engine.residents import Residents
from tinsmith.engine.runs import Run, State
from tinsmith.wire.training import ContentError

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Files:
    """What a command leaves to another thread, since it waits for a disk rather than for the device: `work`,
    which changes nothing but files and knows no device, and `finish`, which takes what that returned and is
    the engine's own again. The run stands still in between."""

    work: Callable[[], Any]
    finish: Callable[[Any], Done]


def execute(
    residents: Residents,
    run: Run,
    command: OptimStep | SaveState | SaveExternal | LoadState | Publish | ReleaseRun,
) -> Done | Files:
    """Raises ContentError, FolderError; so does what it leaves."""
    match command:
        case OptimStep():
            residents.bring_back(run)
            metrics = run.optimize(command.params)
            residents.make_room(keep=run.name)
            return Done({"metrics": metrics} if metrics else {})
        case SaveState():
            residents.bring_back(run)
            return _written(run, command.path, optimizer=run.optimizer, gradients=command.gradients)
        case SaveExternal():
            recipients = read_recipients(command.recipients)
            residents.bring_back(run)
            return _written(run, command.path, optimizer=None, gradients=False, recipients=recipients)
        case LoadState():
            return _load(residents, run, command)
        case Publish():
            residents.bring_back(run)

            def publish(written: Done) -> Done:
                snapshots = residents.snapshots
                snapshots.publish(command.sampler, run.model, run.layout, run.weights, command.path)
                snapshots.entries[command.sampler].used = residents.clock
                residents.make_room(keep=command.sampler)
                return written

            if command.path is None:
                return publish(Done({"size_bytes": None}))
            files = _written(run, command.path, optimizer=None, gradients=False)
            return Files(files.work, lambda size: publish(files.finish(size)))
        case ReleaseRun():
            residents.release(run)
            return Done({})


def _written(run: Run, path: str, **what: Any) -> Files:
    """A folder with the run's state; `what` as adapter_files.write takes it."""
    model, layout, state = run.model, run.layout, run.live.to(HOST)
    return Files(
        lambda: adapter_files.write(path, model, layout, state, **what),
        lambda size: Done({"size_bytes": size}),
    )


def _load(residents: Residents, run: Run, command: LoadState) -> Files:
    spec, _ = adapter_files.read_spec(command.path, run.model)
    _same_shape(run, spec)
    if command.optimizer:
        _same_optimizer(run, adapter_files.read_optimizer(command.path))

    def read() -> State:
        return adapter_files.read(
            command.path,
            run.layout,
            HOST,
            optimizer=command.optimizer,
            gradients=command.gradients,
        )

    def finish(state: State) -> Done:
        residents.drop_spill(run)
        run.replace(state.to(run.model.device))
        residents.make_room(keep=run.name)
        return Done({})

    return Files(read, finish)


def _same_shape(run: Run, spec: object) -> None:
    own = run.layout.spec
    for name in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed"):
        theirs = getattr(spec, name)
        if theirs != getattr(own, name):
            raise ContentError(
                f"the checkpoint has {name} {theirs}, this run has {getattr(own, name)}; create the training "
                "client from the checkpoint instead (create_training_client_from_state)"
            )


def _same_optimizer(run: Run, theirs: str) -> None:
    if theirs != run.optimizer:
        raise ContentError(
            f"the checkpoint has the state of the optimizer {theirs}, this run was created with "
            f"{run.optimizer}; load the weights alone, or create the training client from the checkpoint "
            "(create_training_client_from_state_with_optimizer)"
        )
