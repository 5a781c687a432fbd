"""As much of a Hugging Face hub as an upload needs: who is there, a new repository, one commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    url: str = ""
    repos: list[dict[str, object]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, content: object, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/api/whoami-v2":
                return self._answer({"type": "user", "name": "somebody", "auth": {"accessToken": {}}})
            return self._answer({"error": "Entry not found"}, 404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                hub.repos.append(json.loads(body))
                return self._answer({"url": f"{hub.url}/somebody/repo", "id": "somebody/repo"})
            if "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                plan = {"uploadMode": "regular", "shouldIgnore": False}
                return self._answer({"files": [{"path": file["path"], **plan} for file in asked]})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self._answer(
                    {"commitUrl": f"{hub.url}/somebody/repo/commit/0", "commitOid": "0" * 40, "success": True}
                )
            return self._answer({"valid": True})

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
