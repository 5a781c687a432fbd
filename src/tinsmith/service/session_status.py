"""What has become of a session, and why."""

from __future__ import annotations

from tinsmith.store.sessions import SessionRow

MOST_TEXT = 2000


def status_of(row: SessionRow, alive: bool) -> dict[str, object] | None:
    """As the SDK's SessionStatus; None where the client has not finished and is not heard of any more.

    The operator cancels sessions. Otherwise what its client said when it finished counts, but a session that
    ended with an error is told with the failure behind that. A session that goes on has failed only when the
    state of a run is lost: any other refusal or failure is its client's to deal with. (store.session_search
    filters by the same rules.)
    """
    failure = row.failure
    if row.finished_at is not None:
        if row.finish_reason == "cancelled":
            return {"type": "cancelled", "detail": row.finish_detail}
        if row.finish_reason == "errored" and failure is not None:
            return {"type": "failed", **failure}
        return {
            "type": "client_finished",
            "reason": {"type": row.finish_reason or "success"},
            "detail": row.finish_detail,
        }
    if failure is not None and row.lost:
        return {"type": "failed", **failure}
    return {"type": "active"} if alive else None


def how_it_ended(row: SessionRow) -> str:
    """Of a session that has finished, for the errors of what comes too late."""
    if row.finish_reason != "cancelled":
        return "has finished"
    return "was cancelled by the operator" + (f" ({row.finish_detail})" if row.finish_detail else "")


def failure_of_request(request_id: str, kind: str, category: str, message: str) -> dict[str, object]:
    """A request failed or was refused."""
    return _failure({"type": "request", "request_id": request_id, "request_type": kind}, category, message)


def failure_of_run(run_id: str, category: str, message: str) -> dict[str, object]:
    """A training run could not be created, or its state is lost."""
    return _failure({"type": "training_run", "training_run_id": run_id}, category, message)


def _failure(reason: dict[str, object], category: str, message: str) -> dict[str, object]:
    return {
        "category": "user" if category == "user" else "internal",
        "reason": reason,
        "message": message[:MOST_TEXT],
    }
