"""Training requests: read, completed with everything that the server chooses, and on into the log."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict

from tinsmith.engine.commands import LoraSpec, ModelInfo
from tinsmith.store.runs import RunRow
from tinsmith.store.sessions import SessionRow
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields
from tinsmith.wire.optimizers import Family, read_family, read_params, to_log
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.requests import (
    CreateByLoad,
    CreateModel,
    LoadWeights,
    LoraConfig,
    SaveExternal,
    SaveWeights,
    Target,
)

from .audit import Actor, read_by
from .caller import Caller
from .context import Context
from .errors import Refusal, Unauthorized
from .keys import KeyRing
from .run import encode
from .runs import Receipt, Runs
from .sessions import Sessions
from .steps import find_checkpoint, scope_of

_ALPHA = 32.0


class Training:
    def __init__(self, context: Context, sessions: Sessions, keyring: KeyRing, runs: Runs) -> None:
        self._context = context
        self._sessions = sessions
        self._keyring = keyring
        self._runs = runs

    # Creating runs

    async def create_model(self, caller: Caller, fields: Fields) -> Receipt:
        request = CreateModel.read(fields)
        session = await self._sessions.open(caller, request.session_id, "work")
        model = self._context.model(request.base_model)
        refusal: str | None = None
        lora = LoraSpec(rank=0, seed=0, alpha=_ALPHA)
        family: Family = "adamw"
        try:
            family = read_family(fields) or family
            config = LoraConfig.read(fields, model.max_rank)
            lora = LoraSpec(
                rank=config.rank,
                seed=config.seed if config.seed is not None else secrets.randbits(31),
                alpha=_ALPHA,
                train_attn=config.train_attn,
                train_mlp=config.train_mlp,
                train_unembed=config.train_unembed,
            )
        except WireError as error:
            refusal = str(error)
        row = self._run_row(session, request.model_seq_id, model, asdict(lora), family, request.user_metadata)
        return await self._runs.create(
            row, "create_model", encode({"lora": asdict(lora)}), refusal, caller.key_id
        )

    async def create_by_load(self, caller: Caller, fields: Fields) -> Receipt:
        """A new run from a checkpoint, whose shape it takes over."""
        request = CreateByLoad.read(fields)
        session = await self._sessions.open(caller, request.session_id, "work")
        refusal: str | None = None
        values: dict[str, object] = {}
        lora: dict[str, object] = asdict(LoraSpec(rank=0, seed=0, alpha=_ALPHA))
        family: Family = "adamw"
        model = self._context.model(request.base_model) if request.base_model is not None else None
        try:
            values = await self._load_values(caller, fields)
            _, source = await find_checkpoint(
                self._context, TinkerPath.parse(str(values["path"])), scope_of(values)
            )
            lora = source.lora
            wanted = read_family(fields)
            family = source.optimizer if values["optimizer"] else wanted or family
            if wanted not in (None, family):
                raise Refusal(
                    f"optimizer_config: is {wanted}, but this checkpoint goes on with its own optimizer,"
                    f" {family}; leave it out, or load the weights alone"
                )
            model = model or self._context.model(source.base_model)
        except (WireError, Refusal) as error:
            refusal = str(error)
            model = model or next(iter(self._context.engine.info.models.values()))
        row = self._run_row(session, request.model_seq_id, model, lora, family, request.user_metadata)
        return await self._runs.create(
            row, "create_by_load", encode({**values, "lora": lora}), refusal, caller.key_id
        )

    def _run_row(
        self,
        session: SessionRow,
        model_seq_id: int,
        model: ModelInfo,
        lora: dict[str, object],
        optimizer: Family,
        user_metadata: dict[str, object] | None,
    ) -> RunRow:
        now = time.time()
        return RunRow(
            id=f"{session.id}:train:{model_seq_id}",  # the client builds it in the same way
            org_id=session.org_id,
            project_id=session.project_id,
            user_id=session.user_id,
            session_id=session.id,
            model_seq_id=model_seq_id,
            created_at=now,
            last_request_at=now,
            state="fresh",
            base_model=model.name,
            lora=lora,
            optimizer=optimizer,
            user_metadata=user_metadata,
            fingerprint=model.fingerprint,
            dtype=model.dtype,
            versions=dict(self._context.engine.info.versions),
        )

    # Requests of a run

    async def forward_backward(
        self, caller: Caller, target: Target, forward_only: bool, body: bytes, encoding: str
    ) -> Receipt:
        kind = "forward" if forward_only else "forward_backward"
        return await self._runs.submit(caller, target, kind, body, encoding, None)

    async def refuse(self, caller: Caller, target: Target, kind: str, why: str) -> Receipt:
        """A request whose content cannot be taken: it uses up its place, and its future says why."""
        return await self._runs.submit(caller, target, kind, b"", "identity", why)

    async def optim_step(self, caller: Caller, fields: Fields) -> Receipt:
        return await self._submit_values(
            caller, Target.read(fields), "optim_step", lambda: to_log(read_params(fields))
        )

    async def save_weights(self, caller: Caller, fields: Fields) -> Receipt:
        return await self._submit_values(
            caller,
            Target.read(fields),
            "save_weights",
            lambda: _save_values(caller, SaveWeights.read_state(fields)),
        )

    async def save_weights_for_sampler(self, caller: Caller, fields: Fields) -> Receipt:
        target = Target.read(fields)
        session_id = target.model_id.partition(":train:")[0]

        def values() -> dict[str, object]:
            request = SaveWeights.read_sampler(fields)
            place: object = request.sampling_session_seq_id
            if place is None:
                place = uuid.uuid4().hex
            return {
                **_save_values(caller, request),
                "sampling_session_id": f"{session_id}:sample:{place}",
                "inflight": request.inflight,
            }

        return await self._submit_values(caller, target, "save_weights_for_sampler", values)

    async def save_weights_external(self, caller: Caller, fields: Fields) -> Receipt:
        def values() -> dict[str, object]:
            request = SaveExternal.read(fields)
            return {**_save_values(caller, request.save), "recipients": request.recipients}

        return await self._submit_values(caller, Target.read(fields), "save_weights_external", values)

    async def load_weights(self, caller: Caller, fields: Fields) -> Receipt:
        if not fields.has("model_id"):
            return await self.create_by_load(caller, fields)
        target = Target.read(fields)
        try:
            values = await self._load_values(caller, fields)
            await self._check_family(caller, target, fields)
        except WireError as error:
            return await self._runs.submit(caller, target, "load_weights", b"", "identity", str(error))
        return await self._runs.submit(caller, target, "load_weights", encode(values), "identity", None)

    async def _check_family(self, caller: Caller, target: Target, fields: Fields) -> None:
        """A run that exists has its optimizer for good."""
        run = (await self._runs.get(caller, target.model_id)).row
        wanted = read_family(fields)
        if wanted not in (None, run.optimizer):
            raise WireError(
                "optimizer_config",
                f"is {wanted}, but this run was created with {run.optimizer}, for good; leave it out",
            )

    async def _load_values(self, caller: Caller, fields: Fields) -> dict[str, object]:
        request = LoadWeights.read(fields)
        reader = caller
        if request.weights_access_token is not None:
            try:
                reader = await self._keyring.authenticate(request.weights_access_token)
            except Unauthorized:
                raise WireError("weights_access_token", "is no valid API key of this server") from None
        TinkerPath.parse(request.path)
        return {
            "path": request.path,
            "optimizer": request.optimizer,
            "reader": reader.scope().to_json(),
            "read_by": read_by(caller, reader),
        }

    async def _submit_values(
        self, caller: Caller, target: Target, kind: str, read: Callable[[], dict[str, object]]
    ) -> Receipt:
        try:
            body, refusal = encode(read()), None
        except WireError as error:
            body, refusal = b"", str(error)
        return await self._runs.submit(caller, target, kind, body, "identity", refusal)


def _save_values(caller: Caller, request: SaveWeights) -> dict[str, object]:
    """A save with everything that the server chooses: its folder and its times. Whoever replaces what is
    there is named in the audit log."""
    now = time.time()
    return {
        "name": request.name,
        "overwrite": request.overwrite,
        "by": Actor.of(caller).to_json() if request.overwrite else None,
        "user_metadata": request.user_metadata,
        "checkpoint": uuid.uuid4().hex,
        "created_at": now,
        "expires_at": now + request.ttl_seconds if request.ttl_seconds is not None else None,
    }
