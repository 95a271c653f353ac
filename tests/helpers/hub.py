"""A stub of the Hugging Face hub on 127.0.0.1, which serves folders as model repositories."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StubHub:
    """A stub of the hub.

    Attributes:
        repositories: by name, the folder of a repository, or the HTTP status of its answers.
        requests: (method, path) of each request.
    """

    endpoint: str
    repositories: dict[str, Path | int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """Return environment variables for huggingface_hub: this hub, and a cache below `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def requested_files(self, method: str = "GET") -> list[str]:
        """Return the names of the files that were requested with a method."""
        return [
            path.partition("/resolve/")[2].partition("/")[2]
            for used, path in self.requests
            if used == method and "/resolve/" in path
        ]


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Yield a running hub without repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = StubHub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: StubHub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        hub.requests.append((self.command, path))
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        folder = hub.repositories.get(name, 404)
        if isinstance(folder, int):
            errors = {404: "RepoNotFound", 401: "RepoNotFound", 403: "GatedRepo"}
            self._send(folder, b"{}", {"X-Error-Code": errors.get(folder, "")})
        elif path.startswith("/api/models/"):
            revision = path.partition("/revision/")[2]
            if revision not in ("main", "v1", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
            listed = [{"rfilename": file.as_posix()} for file in files]
            content = {"id": name, "modelId": name, "sha": COMMIT, "siblings": listed}
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        else:
            file = folder / path.partition("/resolve/")[2].partition("/")[2]
            if file.is_file():
                data = file.read_bytes()
                tag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self._send(200, data, tag)
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
