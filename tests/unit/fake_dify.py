"""A stand-in for Dify 0.15.3's API: shapes copied from the real one, faults on demand.

It is no Dify: it proves how difyops reacts, not that Dify works. tests/e2e does that.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

PASSWORD = "right-Passw0rd"
PROVIDER = "openai_api_compatible"
USAGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
ERROR_EVENT = {
    "event": "error",
    "code": "completion_request_error",
    "status": 400,
    "message": "[openai_api_compatible] Server Unavailable Error",
}


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def message(text: str) -> dict[str, Any]:
    return {"event": "message", "answer": text}


GOOD_STREAM = (
    b"event: ping\n\n"
    + sse(message("Hel"), message("lo."))
    + sse({"event": "message_end", "metadata": USAGE})
)


class Refusal(Exception):
    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code


@dataclass
class FakeDify015:
    """The state, the faults to plant, and a count of every request (`POST /setup`, …)."""

    url: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    is_set_up: bool = False
    models: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    apps: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)

    answer: str = "Hello."
    blocking_tokens: int = 3
    blocking_error: Refusal | None = None
    stream: bytes = GOOD_STREAM
    #: How many bytes of the stream are promised and never sent.
    stream_cut: int = 0
    stream_type: str = "text/event-stream; charset=utf-8"
    delay: float = 0.0
    #: What answers is not Dify at all, but say a model server.
    other_server: bool = False
    #: Indexing goes through these stages, one a poll; the last one stays.
    stages: list[str] = field(default_factory=lambda: ["waiting", "indexing", "completed"])
    #: In what order retrieval returns the passages of the document.
    order: tuple[int, ...] = (2, 0, 1)
    model_refusal: str = ""
    #: What /health says, and whose process answers.
    health: dict[str, Any] | None = None
    pid: int = 0
    #: What signs the URLs of uploaded files.
    secret_key: str = ""

    def answer_to(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        handlers: dict[str, Callable[..., Any]] = {
            "setup": self._setup,
            "login": self._login,
            "workspaces": self._workspaces,
            "apps": self._apps,
            "files": self._files,
            "health": lambda *_: self.health or dict(FakeDify015.HEALTH, pid=self.pid),
            "v1": lambda *_: {"welcome": "Dify OpenAPI", "server_version": "0.15.3"},
            "datasets": self._datasets,
        }
        return handlers[path.split("/")[1]](method, path.split("/")[2:], query, body)

    HEALTH: ClassVar[dict[str, str]] = {"status": "ok", "version": "0.15.3"}

    def _files(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Any:
        if rest[-1] == "file-preview":
            text = f"file-preview|{rest[0]}|{query['timestamp']}|{query['nonce']}"
            sign = hmac.new(self.secret_key.encode(), text.encode(), hashlib.sha256).digest()
            if base64.urlsafe_b64encode(sign).decode() != query["sign"]:
                raise Refusal(404, "not_found", "File not found or signature is invalid")
        return {"id": "file-1"}

    def _setup(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Any:
        if method == "POST":
            if self.is_set_up:
                raise Refusal(403, "already_setup", "Dify has been successfully installed.")
            self.is_set_up = True
            return {"result": "success"}
        return {"step": "finished" if self.is_set_up else "not_started"}

    def _login(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Any:
        if body["password"] != PASSWORD:
            text = "The email or password is mismatched."
            raise Refusal(400, "email_or_password_mismatch", text)
        return {"result": "success", "data": {"access_token": "token-of-the-console"}}

    def _workspaces(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Any:
        if rest[1] == "default-model":
            if method == "GET":
                name = self.defaults.get(query["model_type"])
                return {"data": name and {"model": name, "provider": {"provider": PROVIDER}}}
            for setting in body["model_settings"]:
                self.defaults[setting["model_type"]] = setting["model"]
        elif rest[-1] == "credentials":
            stored = self.models.get((query["model_type"], query["model"]))
            shown = dict(stored) if stored is not None else None
            if shown and "api_key" in shown:
                key = shown["api_key"]
                shown["api_key"] = "*" * 20 if len(key) <= 8 else key[:6] + "*" * 12 + key[-2:]
            return {"credentials": shown}
        elif method == "POST":
            if self.model_refusal:
                raise Refusal(400, "invalid_param", self.model_refusal)
            self.models[body["model_type"], body["model"]] = body["credentials"]
        return {"result": "success"}

    def _apps(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Any:
        if not rest:
            if method == "GET":
                return {"data": self.apps, "has_more": False}
            config: dict[str, Any] = {
                "model": {"completion_params": {}},
                "pre_prompt": None,
                "created_by": "me",
            }
            app = {"id": f"app-{len(self.apps)}", "created_at": len(self.apps), **body}
            self.apps.append({**app, "model_config": config})
            return app
        app = next(app for app in self.apps if app["id"] == rest[0])
        if rest[1:] == ["model-config"]:
            app["model_config"] = body
        elif rest[1:] == ["api-keys"] and method == "POST":
            self.keys.append(f"app-secret-{len(self.keys)}")
            return {"token": self.keys[-1], "created_at": 1}
        elif rest[1:] == ["api-keys"]:
            return {"data": [{"token": key, "created_at": 1} for key in self.keys]}
        return app

    def _datasets(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Any:
        if not rest:
            if method == "GET":
                return {"data": self.datasets, "has_more": False}
            self.datasets.append({"id": "set-1", "created_at": 1, **body})
            return self.datasets[-1]
        if rest[1] == "documents" and method == "DELETE":
            self.documents.clear()
            return None
        if rest[1:] == ["documents"]:
            if method == "POST":
                name = "difyops-sample.txt"
                self.documents.append({"id": "doc-1", "name": name, "indexing_status": "waiting"})
                self.datasets[0]["embedding_model"] = body["embedding_model"]
                return {"documents": self.documents, "batch": "1"}
            return {"data": self.documents}
        if rest[-1] == "indexing-status":
            stage = self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]
            self.documents[0]["indexing_status"] = stage
            return {"indexing_status": stage, "error": "no table\nhere" if stage == "error" else ""}
        from difyops.knowledge import PASSAGES

        return {
            "records": [{"segment": {"content": PASSAGES[i]}, "score": 0.5} for i in self.order]
        }


class _Handler(BaseHTTPRequestHandler):
    dify: FakeDify015

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(size)
        is_json = "json" in self.headers.get("Content-Type", "")
        body = json.loads(raw) if raw and is_json else None
        path = url.path.removeprefix("/console/api")
        self.dify.calls[f"{self.command} {path}"] += 1
        time.sleep(self.dify.delay)
        if self.dify.other_server:
            return self._json(401, {"error": {"message": "Invalid API Key"}})
        try:
            if path == "/v1/chat-messages":
                self._chat(body)
            else:
                query = {k: v[0] for k, v in parse_qs(url.query).items()}
                self._json(200, self.dify.answer_to(self.command, path, query, body))
        except Refusal as e:
            self._json(e.status, {"code": e.code, "message": str(e), "status": e.status})

    do_POST = do_DELETE = do_GET

    def _chat(self, body: Any) -> None:
        if body["response_mode"] == "streaming":
            self._bytes(200, self.dify.stream_type, self.dify.stream, self.dify.stream_cut)
        elif self.dify.blocking_error:
            raise self.dify.blocking_error
        else:
            usage = {"usage": {"completion_tokens": self.dify.blocking_tokens}}
            self._json(200, {"event": "message", "answer": self.dify.answer, "metadata": usage})

    def _json(self, status: int, body: Any) -> None:
        if body is None:
            self._bytes(204, "application/json", b"")
        else:
            self._bytes(status, "application/json", json.dumps(body).encode())

    def _bytes(self, status: int, kind: str, body: bytes, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        with suppress(BrokenPipeError):  # a client that timed out is gone
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve_fake() -> Iterator[FakeDify015]:
    """A FakeDify015 on a free port of the loopback."""
    dify = FakeDify015()
    handler = type("Handler", (_Handler,), {"dify": dify})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        dify.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield dify
        finally:
            server.shutdown()
            thread.join()
