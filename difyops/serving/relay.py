"""Pass a request to an upstream server and its answer back, unbuffered; client gone, both end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from difyops.serving.errors import ApiError, bad_field, stopping, too_long
from difyops.serving.http import Ended, while_wanted

log = logging.getLogger("difyops.serving")

#: Turns an upstream error (status, decoded body) into ours.
Explain = Callable[[int, Any], ApiError]


class Relay(Response):
    """The response of `POST path` with `body`, asked of `client` only when it is sent.

    The upstream request lives exactly as long as the client's connection: a client that leaves
    while its prompt is still read frees the slot as one that leaves in mid-stream does. When
    `stop` is set, an answer that is not finished ends with an error that says so.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: bytes,
        explain: Explain,
        stop: asyncio.Event,
    ) -> None:
        super().__init__()
        self._client = client
        self._path = path
        self._content = body
        self._explain = explain
        self._stop = stop
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = await while_wanted(self._relay(scope, receive, send), receive, self._stop)
        if ended is Ended.STOPPED:
            await self._fail(stopping(), scope, receive, send)

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            # The status line is gone; an event is all that can still say so.
            await send({"type": "http.response.body", "body": error.event()})
        else:
            await error.response()(scope, receive, send)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._client.stream(
                "POST",
                self._path,
                content=self._content,
                headers={"Content-Type": "application/json"},
            ) as answer:
                if answer.status_code >= 400:
                    error = self._explain(answer.status_code, _decoded(await answer.aread()))
                    await error.response()(scope, receive, send)
                    return
                kind = answer.headers.get("content-type", "application/json")
                headers = [(b"content-type", kind.encode())]
                if kind.startswith("text/event-stream"):
                    # A proxy in front (nginx) would otherwise collect the tokens first.
                    headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
                self._started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": answer.status_code,
                        "headers": headers,
                    }
                )
                async for chunk in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx.HTTPError as broken:
            log.error("the model's engine broke off: %s", type(broken).__name__)
            error = ApiError(
                502, "the model's engine broke off", code="engine_failed", kind="server_error"
            )
            await self._fail(error, scope, receive, send)


def explain_llama(model: str) -> Explain:
    """How llama.cpp's errors read to a client that asked for `model`."""

    def explain(status: int, body: Any) -> ApiError:
        error = body.get("error") if isinstance(body, dict) else None
        error = error if isinstance(error, dict) else {}
        message = str(error.get("message") or f"the model's engine answered {status}")
        if error.get("type") == "exceed_context_size_error":
            return too_long(int(error["n_prompt_tokens"]), int(error["n_ctx"]), model)
        # A picture sent to a text model is the client's mistake; llama.cpp says 500 to it.
        if "input is not supported" in message:
            return bad_field("messages", f"{model}: {message.partition(' - hint')[0]}")
        if status < 500:
            return ApiError(status, message)
        return ApiError(status, message, code="engine_error", kind="server_error")

    return explain


def _decoded(body: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(body)
    return None
