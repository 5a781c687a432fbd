"""The JSON requests of Tinker's API, as plain values.

Each class reads itself from an object's fields, ignores what it does not know and refuses what it
cannot do by name. What a training request is *about* (its parameters) is read apart from *whose*
it is (`Target`), because a request whose content is refused still takes its turn in its run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .fields import Fields
from .paths import check_name

HOUR = 3600
TEN_YEARS = 10 * 365 * 24 * HOUR
MOST_RECIPIENTS = 10


@dataclass(frozen=True, slots=True)
class Target:
    """Which run a training request belongs to, and its place there."""

    model_id: str
    seq_id: int

    @classmethod
    def read(cls, fields: Fields) -> Target:
        return cls(fields.text("model_id"), fields.integer("seq_id", least=1))


@dataclass(frozen=True, slots=True)
class CreateSession:
    tags: tuple[str, ...]
    user_metadata: dict[str, object] | None
    sdk_version: str
    project_id: str | None
    display_name: str | None

    @classmethod
    def read(cls, fields: Fields) -> CreateSession:
        tags = fields.array("tags") if fields.has("tags") else []
        return cls(
            tags=tuple(str(tag) for tag in tags),
            user_metadata=fields.metadata("user_metadata"),
            sdk_version=fields.optional_text("sdk_version") or "",
            project_id=fields.optional_text("project_id"),
            display_name=fields.optional_text("display_name"),
        )


@dataclass(frozen=True, slots=True)
class FinishSession:
    reason: Literal["success", "errored", "interrupted"]
    detail: str | None

    @classmethod
    def read(cls, fields: Fields) -> FinishSession:
        reason = fields.optional_child("reason")
        kind = reason.raw("type") if reason is not None else "success"
        detail = fields.raw("detail")
        return cls(
            reason="errored" if kind == "errored" else "interrupted" if kind == "interrupted" else "success",
            detail=_storable(detail[:4096]) if isinstance(detail, str) else None,
        )


def _storable(text: str) -> str:
    """A text of the user's own that must not be refused, as a database takes it."""
    return text.encode(errors="replace").decode().replace("\0", "?")


@dataclass(frozen=True, slots=True)
class CreateModel:
    """Whose run is created, on which base. What kind of adapter it gets is read by `LoraConfig`."""

    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, object] | None

    @classmethod
    def read(cls, fields: Fields) -> CreateModel:
        return cls(
            session_id=fields.text("session_id"),
            model_seq_id=fields.integer("model_seq_id", least=0),
            base_model=fields.text("base_model"),
            user_metadata=fields.metadata("user_metadata"),
        )


@dataclass(frozen=True, slots=True)
class LoraConfig:
    rank: int
    seed: int | None
    train_attn: bool
    train_mlp: bool
    train_unembed: bool

    @classmethod
    def read(cls, fields: Fields, max_rank: int) -> LoraConfig:
        """From a create_model request, of which it is a part."""
        lora = fields.optional_child("lora_config")
        if lora is None:
            raise fields.error(
                "lora_config", "is missing; only LoRA training is offered, so give one with a rank"
            )
        config = cls(
            rank=lora.integer("rank", least=1, most=max_rank),
            seed=lora.optional_integer("seed"),
            train_attn=lora.flag("train_attn", True),
            train_mlp=lora.flag("train_mlp", True),
            train_unembed=lora.flag("train_unembed", True),
        )
        if not (config.train_attn or config.train_mlp or config.train_unembed):
            raise fields.error(
                "lora_config", "train_attn, train_mlp and train_unembed are all false; set at least one"
            )
        return config


@dataclass(frozen=True, slots=True)
class SaveWeights:
    """A state or a sampler save. `name` None (samplers alone) asks for an ephemeral one; `inflight` for the
    one that all inflight sampling clients of the run share."""

    name: str | None
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: dict[str, str] | None
    sampling_session_seq_id: int | None = None
    inflight: bool = False

    @classmethod
    def read_state(cls, fields: Fields) -> SaveWeights:
        if fields.raw("path") is None:
            raise fields.error("path", "is missing; give the checkpoint a name")
        return cls._read(fields)

    @classmethod
    def read_sampler(cls, fields: Fields) -> SaveWeights:
        kind = fields.raw("kind")
        if kind not in (None, "snapshot", "inflight"):
            raise fields.error("kind", f"must be 'snapshot' or 'inflight', not {kind!r}"[:120])
        if kind == "inflight":
            for name in ("path", "ttl_seconds"):
                if fields.has(name):
                    raise fields.error(name, "does not go with kind 'inflight'; leave it out")
        return replace(cls._read(fields), inflight=kind == "inflight")

    @classmethod
    def _read(cls, fields: Fields) -> SaveWeights:
        path = fields.raw("path")
        if path is not None and not isinstance(path, str):
            raise fields.error("path", "must be a text: the checkpoint's name")
        ttl = fields.optional_integer("ttl_seconds", least=HOUR, most=TEN_YEARS)
        return cls(
            name=check_name(path) if path is not None else None,
            ttl_seconds=ttl,
            overwrite=fields.flag("overwrite", False),
            user_metadata=fields.text_metadata("user_metadata"),
            sampling_session_seq_id=fields.optional_integer("sampling_session_seq_id", least=0),
        )


@dataclass(frozen=True, slots=True)
class SaveExternal:
    """A save for use elsewhere, encrypted to `recipients` if there are any."""

    save: SaveWeights
    recipients: tuple[str, ...]

    @classmethod
    def read(cls, fields: Fields) -> SaveExternal:
        name = "age_encryption_recipients"
        recipients: list[str] = []
        for index, item in enumerate(fields.array(name) if fields.has(name) else []):
            if not isinstance(item, str) or not 0 < len(item) <= 16384:
                raise fields.error(f"{name}[{index}]", "must be a text: an age1... key or an SSH public key")
            recipients.append(item)
        if fields.has(name) and not 1 <= len(recipients) <= MOST_RECIPIENTS:
            raise fields.error(
                name, f"has {len(recipients)} entries; give 1 to {MOST_RECIPIENTS}, or leave it out"
            )
        return cls(SaveWeights.read_state(fields), tuple(recipients))


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """What to load. `weights_access_token` may be another account's key."""

    path: str
    optimizer: bool
    weights_access_token: str | None

    @classmethod
    def read(cls, fields: Fields) -> LoadWeights:
        return cls(
            path=fields.text("path", longest=2048),
            optimizer=fields.flag("optimizer", False),
            weights_access_token=fields.optional_text("weights_access_token"),
        )


@dataclass(frozen=True, slots=True)
class CopyWeights:
    """Which weights are copied, and where to: into a project, or to a place in a session."""

    source_path: str
    destination_project_id: str | None
    session_id: str | None
    model_seq_id: int | None
    ttl_seconds: int | None
    weights_access_token: str | None

    @classmethod
    def read(cls, fields: Fields) -> CopyWeights:
        session_id = fields.optional_text("session_id")
        project = fields.optional_text("destination_project_id")
        if session_id is None and project is None:
            raise fields.error(
                "destination_project_id", "is missing; give a project, or session_id and model_seq_id"
            )
        if session_id is not None and project is not None:
            raise fields.error("destination_project_id", "cannot be given beside session_id")
        return cls(
            source_path=fields.text("source_path", longest=2048),
            destination_project_id=project,
            session_id=session_id,
            model_seq_id=fields.integer("model_seq_id", least=0) if session_id is not None else None,
            ttl_seconds=fields.optional_integer("ttl_seconds", least=HOUR, most=TEN_YEARS),
            weights_access_token=fields.optional_text("weights_access_token"),
        )


@dataclass(frozen=True, slots=True)
class CreateByLoad:
    """A load_weights that creates its run: whose it is, and on which base."""

    session_id: str
    model_seq_id: int
    base_model: str | None
    user_metadata: dict[str, object] | None

    @classmethod
    def read(cls, fields: Fields) -> CreateByLoad:
        return cls(
            session_id=fields.text("session_id"),
            model_seq_id=fields.integer("model_seq_id", least=0),
            base_model=fields.optional_text("base_model"),
            user_metadata=fields.metadata("user_metadata"),
        )


@dataclass(frozen=True, slots=True)
class CreateSamplingSession:
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None
    model_path: str | None

    @classmethod
    def read(cls, fields: Fields) -> CreateSamplingSession:
        request = cls(
            session_id=fields.text("session_id"),
            sampling_session_seq_id=fields.integer("sampling_session_seq_id", least=0),
            base_model=fields.optional_text("base_model"),
            model_path=fields.optional_text("model_path", longest=2048),
        )
        if request.base_model is None and request.model_path is None:
            raise fields.error("base_model", "is missing, and so is model_path; give one of the two")
        return request


@dataclass(frozen=True, slots=True)
class RetrieveFutures:
    """Which of a sampling client's requests have ended since `cursor`."""

    sampling_session_id: str
    clone: int
    cursor: int
    timeout: float | None
    retrieved: tuple[str, ...]

    @classmethod
    def read(cls, fields: Fields) -> RetrieveFutures:
        target = fields.child("target")
        if target.raw("type") not in (None, "sampling_session"):
            raise target.error("type", "must be 'sampling_session'")
        retrieved = fields.array("retrieved_request_ids") if fields.has("retrieved_request_ids") else []
        return cls(
            sampling_session_id=target.text("sampling_session_id"),
            clone=target.optional_integer("cloned_sampler_id", least=0) or 0,
            cursor=fields.optional_integer("prev_cursor", least=0) or 0,
            timeout=fields.number("timeout", 0.0, least=0.0) if fields.has("timeout") else None,
            retrieved=tuple(str(item) for item in retrieved),
        )
