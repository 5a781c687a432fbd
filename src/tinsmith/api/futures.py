"""Results. What the SDK makes of each answer decides the statuses here: a failure is a 200, a sample
that was lost is a 410, and a result that is not there yet is held back and then a 408, never a 5xx."""

from __future__ import annotations

import asyncio
import time

from starlette.background import BackgroundTask
from starlette.responses import Response

from tinsmith.service.futures import Failure, Lost, Outcome, Pending, Result
from tinsmith.service.sampling import is_sample
from tinsmith.wire.requests import RetrieveFutures
from tinsmith.wire.results_json import pass_as_json, sample_as_json

from .http import PROTOBUF, Call, error_response, json_response


async def retrieve(call: Call) -> Response:
    asked_at = time.time()
    request_id = (await call.fields()).text("request_id")
    outcome = await call.service.outcome(call.caller, request_id)
    if isinstance(outcome, Result) and isinstance(outcome.payload, bytes) and call.wants_json:
        as_json = sample_as_json if is_sample(request_id) else pass_as_json
        outcome = Result(await asyncio.to_thread(as_json, outcome.payload))
    answer = _answer(request_id, outcome)

    async def sent() -> None:
        call.service.context.traces.sent(request_id, asked_at, len(answer.body))

    if not isinstance(outcome, Pending):
        answer.background = BackgroundTask(sent)
    return answer


def _answer(request_id: str, outcome: Outcome | Pending) -> Response:
    if isinstance(outcome, Pending):
        answer = {"type": "try_again", "request_id": request_id, "queue_state": outcome.queue_state}
        if outcome.reason is not None:
            answer["queue_state_reason"] = outcome.reason
        return json_response(answer, 408)
    if isinstance(outcome, Failure):
        return json_response({"error": outcome.message, "category": outcome.category})
    if isinstance(outcome, Lost):
        return error_response(outcome.message, 410)
    if isinstance(outcome.payload, bytes):
        return Response(outcome.payload, media_type=PROTOBUF)
    return json_response(outcome.payload)


async def retrieve_many(call: Call) -> Response:
    """Which of a sampling client's requests have ended. The SDK waits 45 s at most."""
    request = RetrieveFutures.read(await call.fields())
    hold = min(call.service.context.settings.poll_hold, 30.0)
    completions, cursor = await call.service.sampling.completions(
        call.caller, request, hold, call.service.closing
    )
    return json_response({"completions": completions, "cursor": cursor})


async def cancel(call: Call) -> Response:
    """Stop a sample. Training requests take their turn whatever becomes of their client."""
    await call.service.sampling.cancel(call.caller, (await call.fields()).text("request_id"))
    return json_response({})
