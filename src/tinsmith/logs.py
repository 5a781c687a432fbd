"""Logs: lines for people or JSON for programs, each with the HTTP request that it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

# The id of the HTTP request that is being handled, as its sender or we have named it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

FORMATS = ("text", "json")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        id_ = request_id.get()
        return f"{line} [{id_}]" if id_ is not None else line


class _Json(logging.Formatter):
    """One object a line; what a call gives as `extra` becomes fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process.strip() or "server"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (id_ := request_id.get()) is not None:
            fields["request_id"] = id_
        fields.update({name: value for name, value in vars(record).items() if name not in _OWN})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def set_up(level: str, form: str, process: str = "") -> None:
    """Log to stderr. `form` is one of FORMATS; `process` tells the engine's lines from the server's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if form == "json" else _Text(f"{process} " if process else ""))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
