"""What every route shares: the key, the body and its limit, one log line a request."""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from difyops.serving import errors

log = logging.getLogger("difyops.serving")

MAX_BODY = 16 * 1024 * 1024


class RequireKey:
    """Let in only requests with the key; the paths in `open_paths` need none."""

    def __init__(self, app: ASGIApp, key: str | None, open_paths: frozenset[str]) -> None:
        self._app = app
        self._key = key.encode() if key is not None else None
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allowed(scope):
            await errors.unauthorized().response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if self._key is None or scope["path"] in self._open:
            return True
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key)


class LogRequests:
    """One line a request: method, path, status, seconds. Never a header, a query or a body."""

    def __init__(self, app: ASGIApp, quiet_paths: frozenset[str]) -> None:
        self._app = app
        self._quiet = quiet_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._quiet:
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0
        truncated = ""

        async def watch(message: Message) -> None:
            nonlocal status, truncated
            if message["type"] == "http.response.start":
                status = message["status"]
                cut = next((v for k, v in message["headers"] if k == b"x-truncated-inputs"), b"")
                truncated = f", {cut.decode()} inputs truncated" if cut else ""
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            took = time.monotonic() - began
            path = scope["path"][:200].encode("unicode_escape").decode()
            what = str(status) if status else "no answer"
            log.info("%s %s %s %.3f s%s", scope["method"], path, what, took, truncated)


async def read_body(request: Request, limit: int = MAX_BODY) -> bytes:
    """The body, at most `limit` bytes. Raises ApiError (413) for a longer one.

    What is too long is still read for a while, unstored: a client that is writing would take a
    closed connection for a network failure and never see the 413.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > 8 * limit:
                break
    except ClientDisconnect:
        raise errors.client_left() from None
    if size > limit:
        raise errors.too_large(limit)
    return b"".join(chunks)


def json_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError (400) when it is not one."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise errors.ApiError(
            400, f"the body is not valid JSON: {error}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise errors.ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value
