"""What every route shares: the key, the body and its limit, one log line a request, and an end
when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from enum import Enum
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from difyops.serving import errors

log = logging.getLogger("difyops.serving")

MAX_BODY = 16 * 1024 * 1024
#: Seconds for a body to arrive in.
BODY_SECONDS = 60.0
#: Commas, and opening brackets, of a body. Python's lock is held while JSON is read: a body of
#: brackets alone would stop every stream for seconds. A text that has as many, quoted, is of
#: millions of tokens.
MAX_COMMAS = 1_000_000
MAX_BRACKETS = 100_000
#: What needs no key, and is asked too often for a line in the log.
HEALTH = frozenset({"/health"})


def application(
    routes: Sequence[Route], key: str | None, quiet_paths: frozenset[str] = HEALTH
) -> Starlette:
    """Routes behind `key` (all but `/health`), errors in OpenAI's shape, one log line a request."""
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(LogRequests, quiet_paths=quiet_paths),
            Middleware(RequireKey, key=key, open_paths=HEALTH),
        ],
        exception_handlers={
            errors.ApiError: errors.on_api_error,
            HTTPException: errors.on_http_error,
            Exception: errors.on_crash,
        },
    )
    app.router.redirect_slashes = False
    return app


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


async def read_body(
    request: Request, limit: int = MAX_BODY, seconds: float = BODY_SECONDS
) -> bytes:
    """The body, at most `limit` bytes. Raises ApiError: 413 for a longer one, 408 for one that
    takes longer than `seconds`, 415 when it is not called JSON.

    A web page may have any browser send a form or plain text to a server on its own machine. To
    send JSON, the browser asks the server first, and this one does not allow it.

    What is too long is still read for a while, unstored: a client that is writing would take a
    closed connection for a network failure and never see the 413.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
        raise errors.not_json(kind[:100])
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > 8 * limit:
                    break
    except ClientDisconnect:
        raise errors.client_left() from None
    except TimeoutError:
        raise errors.too_slow(seconds) from None
    if size > limit:
        raise errors.too_large(limit)
    return b"".join(chunks)


def json_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError: 400 when it is not one, 413 for too many values.

    A large one takes a tenth of a second: better not in the event loop."""
    if body.count(b",") > MAX_COMMAS:
        raise errors.too_many_values("commas", MAX_COMMAS)
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise errors.too_many_values("opening brackets", MAX_BRACKETS)
    try:
        # Decoded here: json itself would let half a surrogate pair through.
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise errors.ApiError(
            400, f"the body is not valid JSON: {error}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise errors.ApiError(400, "the body must be a JSON object", code="invalid_json")
    # Half a surrogate pair is valid JSON, but no text: no tokenizer can read it.
    escaped = b"\\ud" in body or b"\\uD" in body
    for name, field in value.items() if escaped else ():
        if not _is_text(name) or not _is_text(json.dumps(field, ensure_ascii=False)):
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise errors.bad_field(shown, "a lone surrogate is not valid Unicode")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Ended(Enum):
    """Why `while_wanted` came back."""

    DONE = "done"
    CLIENT_LEFT = "the client left"
    STOPPED = "the server is stopping"


async def while_wanted(
    work: Coroutine[Any, Any, None], receive: Receive, stop: asyncio.Event
) -> Ended:
    """Run `work` as long as the client is there and `stop` is not set; then it is cancelled.

    The request's body must have been read. What `work` raises is raised here.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    stopped = asyncio.create_task(stop.wait())
    tasks = (task, gone, stopped)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done()
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.wait(tasks)
    if not task.cancelled():
        task.result()
        return Ended.DONE
    return Ended.CLIENT_LEFT if left else Ended.STOPPED


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
