"""What an operator does about sessions. Each act and its entry in the audit log are one transaction; a
running server takes note within seconds."""

from __future__ import annotations

import time

from tinsmith.store import Connection, sessions
from tinsmith.store.scope import Scope
from tinsmith.store.sessions import SessionRow

from .acts import Acts
from .audit import record
from .named import AdminError, the_org
from .session_status import MOST_TEXT, how_it_ended


class SessionAdministration(Acts):
    def newest(self, org: str, count: int) -> list[SessionRow]:
        """An organization's newest sessions. Raises AdminError."""

        def work(connection: Connection) -> list[SessionRow]:
            scope = Scope(the_org(connection, org).id, "", None)
            return sessions.page(connection, scope, count, 0)

        return self._do(work)

    def cancel(self, org: str, session_id: str, detail: str | None) -> SessionRow:
        """End a session: what it has waiting is given up, and its client is told. Raises AdminError."""
        if detail is not None and (not detail.strip() or len(detail) > MOST_TEXT or "\0" in detail):
            raise AdminError(f"the reason must be a text of 1 to {MOST_TEXT} characters")

        def work(connection: Connection) -> SessionRow:
            org_id = the_org(connection, org).id
            row = sessions.get(connection, session_id, Scope(org_id, "", None))
            if row is None:
                raise AdminError(f"there is no session {session_id[:80]!r}; see: tinsmith session list")
            if row.finished_at is not None:
                raise AdminError(f"the session {session_id} {how_it_ended(row)} already")
            about = {"session_id": session_id, "project_id": row.project_id}
            record(connection, self._actor, org_id, "session", "cancel", about, {"detail": detail})
            return sessions.finish(connection, session_id, "cancelled", detail, time.time())

        return self._do(work)
