"""Optimizers as requests name them: the family that a run has for good, and the parameters of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from .fields import Fields

Family = Literal["adamw", "dimuon"]
DIMUON_VERSION = 1


@dataclass(frozen=True, slots=True)
class AdamParams:
    """One AdamW step's parameters, as torch.optim.AdamW. `grad_clip_norm` 0 means no clipping."""

    family: ClassVar[Family] = "adamw"

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class DimuonParams:
    """One Dimuon step's parameters. `grad_clip_norm` 0 or less means no clipping.

    `damping` smooths the preconditioner of rows and columns, and the learning rate is multiplied by
    (rank / 32) ^ `rank_lr_correction_exponent`: SDKs up to 0.30.3 send them, later ones leave them alone.
    """

    family: ClassVar[Family] = "dimuon"

    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9
    damping: float = 1e-4
    rank_lr_correction_exponent: float = 0.175


Params = AdamParams | DimuonParams


def read_family(fields: Fields) -> Family | None:
    """What `optimizer_config` asks for; None where it is not there. Another one than those that are offered
    must not be replaced unasked."""
    config = fields.optional_child("optimizer_config")
    if config is None:
        return None
    kind = config.raw("type")
    if kind == "dimuon":
        if config.raw("version") not in (None, DIMUON_VERSION):
            raise config.error("version", f"must be {DIMUON_VERSION}, not {config.raw('version')!r}"[:120])
        return "dimuon"
    if kind in ("adamw", None):
        return "adamw"
    raise config.error("type", f"{str(kind)[:60]!r} is not offered by this server; use 'adamw' or 'dimuon'")


def config_of(family: Family) -> dict[str, object]:
    """A family as answers name it."""
    return {"type": family, "version": DIMUON_VERSION} if family == "dimuon" else {"type": family}


def read_params(fields: Fields) -> Params:
    """Of an optim_step request: `adam_params`, or any family's in `optimizer_params`."""
    name = next((n for n in ("adam_params", "optimizer_params", "optim_params") if fields.has(n)), None)
    if name is None:
        raise fields.error("adam_params", "is missing; it must be a JSON object, or optimizer_params one")
    params = fields.child(name)
    kind = params.raw("type")
    if kind in (None, "adam", "adamw"):
        return _read_adam(params)
    if kind == "dimuon":
        return _read_dimuon(params)
    raise params.error("type", f"{str(kind)[:60]!r} is not offered by this server; use 'adamw' or 'dimuon'")


def _read_adam(params: Fields) -> AdamParams:
    return AdamParams(
        learning_rate=params.number("learning_rate", 1e-4, least=0.0),
        beta1=params.number("beta1", 0.9, least=0.0, below=1.0),
        beta2=params.number("beta2", 0.95, least=0.0, below=1.0),
        eps=params.number("eps", 1e-12, least=0.0),
        weight_decay=params.number("weight_decay", 0.0, least=0.0),
        grad_clip_norm=params.number("grad_clip_norm", 0.0, least=0.0),
    )


def _read_dimuon(params: Fields) -> DimuonParams:
    if not params.has("learning_rate"):
        raise params.error("learning_rate", "is missing; it must be a number of at least 0")
    damping = params.number("damping", 1e-4)
    if damping <= 0:
        raise params.error("damping", f"must be greater than 0, not {damping:g}")
    return DimuonParams(
        learning_rate=params.number("learning_rate", 0.0, least=0.0),
        grad_clip_norm=params.number("grad_clip_norm", 0.0),
        beta1=params.number("beta1", 0.9, least=0.0, below=1.0),
        damping=damping,
        rank_lr_correction_exponent=params.number("rank_lr_correction_exponent", 0.175, least=-8, most=8),
    )


def to_log(params: Params) -> dict[str, object]:
    """A step's parameters as its command is logged."""
    return {"family": params.family, **asdict(params)}


def from_log(values: Mapping[str, float | str]) -> Params:
    """What `to_log` made; without a family it is AdamW's."""
    numbers = {name: float(value) for name, value in values.items() if name != "family"}
    return (DimuonParams if values.get("family") == "dimuon" else AdamParams)(**numbers)
