"""The commands of a run that are carried out at once, between its forward_backwards."""

from __future__ import annotations

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
from tinsmith.engine.runs import Run
from tinsmith.wire.training import ContentError


def execute(
    residents: Residents,
    run: Run,
    command: OptimStep | SaveState | SaveExternal | LoadState | Publish | ReleaseRun,
) -> Done:
    """Raises ContentError, FolderError."""
    match command:
        case OptimStep():
            residents.bring_back(run)
            metrics = run.optimize(command.params)
            residents.make_room(keep=run.name)
            return Done({"metrics": metrics} if metrics else {})
        case SaveState():
            residents.bring_back(run)
            size = adapter_files.write(
                command.path,
                run.model,
                run.layout,
                run.live,
                optimizer=run.optimizer,
                gradients=command.gradients,
            )
            return Done({"size_bytes": size})
        case SaveExternal():
            recipients = read_recipients(command.recipients)
            residents.bring_back(run)
            size = adapter_files.write(
                command.path,
                run.model,
                run.layout,
                run.live,
                optimizer=None,
                gradients=False,
                recipients=recipients,
            )
            return Done({"size_bytes": size})
        case LoadState():
            spec, _ = adapter_files.read_spec(command.path, run.model)
            _same_shape(run, spec)
            if command.optimizer:
                _same_optimizer(run, adapter_files.read_optimizer(command.path))
            state = adapter_files.read(
                command.path,
                run.layout,
                run.model.device,
                optimizer=command.optimizer,
                gradients=command.gradients,
            )
            residents.drop_spill(run)
            run.replace(state)
            residents.make_room(keep=run.name)
            return Done({})
        case Publish():
            residents.bring_back(run)
            written = None
            if command.path is not None:
                written = adapter_files.write(
                    command.path, run.model, run.layout, run.live, optimizer=None, gradients=False
                )
            residents.snapshots.publish(command.sampler, run.model, run.layout, run.weights, command.path)
            residents.snapshots.entries[command.sampler].used = residents.clock
            residents.make_room(keep=command.sampler)
            return Done({"size_bytes": written})
        case ReleaseRun():
            residents.release(run)
            return Done({})


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
