"""Custom losses: the engine reads and keeps them; here is whose they are, and what came of creating them."""

from __future__ import annotations

import asyncio
import json

from tinsmith.engine.commands import CreateLoss, EngineLost, Failed
from tinsmith.wire.fields import Fields

from .aside import aside_key
from .caller import Caller
from .context import Context
from .futures import Failure, Outcome, Pending, PendingRequest, Result
from .runs import Receipt
from .sessions import Sessions

_MARK = ":loss:"
_REMEDY = "create it with a new ServiceClient"
_ATTEMPTS = 3  # where the engine dies meanwhile; keeping a loss twice is keeping it once


def is_loss(request_id: str) -> bool:
    return _MARK in request_id


class CustomLosses:
    def __init__(self, context: Context, sessions: Sessions) -> None:
        self._context = context
        self._sessions = sessions
        self._requests: dict[str, PendingRequest] = {}
        sessions.on_finish.append(self._session_finished)

    async def create(self, caller: Caller, fields: Fields) -> Receipt:
        """A loss of a session, under the id that its place there gives it; or the one that is there."""
        session_id, place = fields.text("session_id"), fields.integer("custom_loss_seq_id", least=0)
        await self._sessions.open(caller, session_id, "work")
        loss_id = f"{session_id}{_MARK}{place}"
        if loss_id not in self._requests:
            body = json.dumps({name: fields.raw(name) for name in ("name", "inputs", "graph")}).encode()
            self._ask(loss_id, body)
        return Receipt(loss_id)

    def _ask(self, loss_id: str, body: bytes) -> PendingRequest:
        request = self._requests[loss_id] = PendingRequest(loss_id)
        self._context.spawn(self._run(request, body))
        return request

    async def _run(self, request: PendingRequest, body: bytes) -> None:
        folder = str(self._context.blobs.path(aside_key(request.request_id.partition(_MARK)[0])))
        for _ in range(_ATTEMPTS):
            try:
                reply = await self._context.engine.submit(CreateLoss(folder, request.request_id, body))
            except EngineLost:
                continue
            if isinstance(reply, Failed):
                request.resolve(Failure(reply.message, reply.category))
            elif isinstance(reply.payload, dict) and reply.payload.get("loss_id"):
                request.resolve(Result({"type": "create_custom_loss", **reply.payload}))
            else:
                request.resolve(
                    Failure(
                        "the server stopped before this custom loss was kept; create it in a new session",
                        "server",
                    )
                )
            return
        request.resolve(
            Failure("the engine stopped again and again; create the loss in a new session", "server")
        )

    async def outcome(
        self, caller: Caller, request_id: str, seconds: float, closing: asyncio.Future[None]
    ) -> Outcome | Pending:
        """What became of a loss, also of one that an earlier life of the server was asked for."""
        session = await self._sessions.get(caller, request_id.partition(_MARK)[0])
        self._sessions.seen(session.id)
        request = self._requests.get(request_id) or self._ask(request_id, b"")
        outcome = await request.wait(seconds, closing)
        if outcome is None:
            return (
                Pending()
                if self._context.engine.ready
                else Pending("paused_capacity", "the engine is starting")
            )
        return outcome

    async def _session_finished(self, session_id: str) -> None:
        for loss_id in [id_ for id_ in self._requests if id_.startswith(f"{session_id}{_MARK}")]:
            del self._requests[loss_id]
