"""Stand-ins for two model hubs on loopback: neither can be reached from a test.

They answer the paths that the real ones have: Hugging Face's as huggingface_hub asks for them,
ModelScope's as its own client's source has them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """The files of one repository, and a log of what was asked."""

    owner_name = "someone/tiny.model"
    revisions = ("main", "v1.0")

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []  # "GET /path" with its Range, if any
        self.break_after: int | None = None  # bytes; once
        self.ranges = True

    def answer(self, handler: _Handler, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def send_file(self, handler: _Handler, content: bytes, headers: dict[str, str]) -> None:
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if wanted and self.ranges:
            start, status = int(wanted[1]), 206
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        handler.head(status, headers | {"Content-Length": str(len(body))})
        if handler.command == "HEAD":
            return
        if self.break_after is not None and len(body) > self.break_after:
            body, self.break_after = body[: self.break_after], None
            handler.close_connection = True
        handler.wfile.write(body)


class FakeHuggingFace(FakeHub):
    def answer(self, handler: _Handler, path: str, query: dict[str, str]) -> None:
        known = {*self.revisions, COMMIT}
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path):
            repository, what, revision = found.groups()
            if repository != self.owner_name:
                handler.error(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            elif revision not in known:
                handler.error(404, "Invalid rev id", {"X-Error-Code": "RevisionNotFound"})
            elif what == "revision":
                handler.json({"id": repository, "sha": COMMIT, "siblings": []})
            else:
                handler.json([self._entry(name) for name in self.files])
            return
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            content = self.files[found[3]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.send_file(handler, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
            return
        handler.error(404, "no such path")

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()  # noqa: S324
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


class FakeModelScope(FakeHub):
    revisions = ("master", "v1.0")
    #: Name -> what the list says of it, where that is not the truth.
    lies: dict[str, dict[str, Any]]

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.lies = {}

    def answer(self, handler: _Handler, path: str, query: dict[str, str]) -> None:
        base = f"/api/v1/models/{self.owner_name}/repo"
        if not path.startswith(base) or query.get("Revision") not in self.revisions:
            handler.json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        elif path == f"{base}/files":
            files = [{"Name": "sub", "Path": "sub", "Type": "tree", "Size": 0}]
            files += [self._entry(name) for name in self.files]
            handler.json({"Code": 200, "Data": {"Files": files}, "Success": True})
        else:
            self.send_file(handler, self.files[query["FilePath"]], {})

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {
            "Name": name.rpartition("/")[2],
            "Path": name,
            "Type": "blob",
            "Size": len(content),
            "Sha256": hashlib.sha256(content).hexdigest(),
        } | self.lies.get(name, {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = self.headers.get("Range")
        self.hub.asked.append(f"{self.command} {self.path}" + (f" {asked}" if asked else ""))
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.hub.answer(self, parts.path, query)

    do_HEAD = do_GET

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def json(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.head(status, {"X-Error-Message": message, "Content-Length": "0", **(headers or {})})

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """The hub's base URL while it runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
