"""How a command that raised is answered."""

from __future__ import annotations

import logging

from tinsmith.engine.adapter_files import FolderError, WriteError
from tinsmith.engine.commands import Failed
from tinsmith.wire.training import ContentError

log = logging.getLogger(__name__)


def failed(what: str, error: Exception) -> Failed:
    """The answer to a command that raised; what is not the user's own mistake is logged, too."""
    if isinstance(error, (ContentError, FolderError)):
        return Failed(str(error), "server" if isinstance(error, WriteError) else "user")
    log.error("%s failed", what, exc_info=error)
    return Failed(f"{what} failed: {text(error)}", "server")


def text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
