"""An answer on its way to a client: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from difyops.engine.answer import Json, usage
from difyops.engine.inbox import Outputs, merged
from difyops.engine.intake import Job, Llm
from difyops.engine.protocol import ChatRequest, GenerationRequest
from difyops.engine.request import EngineStopped, FinishReason, Output, QueueFull
from difyops.engine.service import Service
from difyops.serving import errors
from difyops.serving.errors import ApiError
from difyops.serving.http import Ended, while_wanted

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # A proxy in front (nginx) would otherwise collect the tokens first.
    (b"x-accel-buffering", b"no"),
]


class Answer(Response):
    """The response to one request for text. It lives exactly as long as its client's connection:
    a client that leaves, before the first token or after, frees its slots at the next step.

    A stream's status line waits for the first output, so that an error before it has a status.
    """

    def __init__(
        self, service: Service, llm: Llm, job: Job, asked: GenerationRequest, began: float
    ) -> None:
        """`began`: when the request arrived, by time.monotonic."""
        super().__init__()
        self._service = service
        self._engine = llm.engine
        self._job = job
        self._asked = asked
        self._began = began
        self._outputs: Outputs = asyncio.Queue()
        self._error: ApiError | None = None
        self._started = False
        self._last: list[float | None] = [None] * len(job.choices)
        chat = isinstance(asked, ChatRequest)
        self._kind = "chat.completion" if chat else "text_completion"
        self._head: Json = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": self._kind,
            "created": int(time.time()),
            "model": llm.id,
        }

    def submit(self) -> None:
        """Queue all of the job's requests, or none. Raises ApiError."""
        deliver = self._service.inbox.deliver
        try:
            self._engine.submit_all(
                {r: deliver(self._outputs, i) for i, r in enumerate(self._job.requests)}
            )
        except QueueFull as full:
            raise errors.queue_full(full.waiting, full.retry_after) from None
        except EngineStopped:
            raise errors.stopping() from None
        except ValueError as wrong:
            raise errors.bad_field("max_tokens", str(wrong)) from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.active += 1
        work = self._stream(send) if self._asked.stream else self._whole(scope, receive, send)
        try:
            ended = await while_wanted(work, receive, self._service.stopping)
            if ended is Ended.STOPPED:
                raise errors.stopping()
        except ApiError as error:
            if not self._started:
                await error.response()(scope, receive, send)
            else:
                # The status line is gone; an event is all that can still say so.
                await send({"type": "http.response.body", "body": error.event()})
        finally:
            self._cancel()
            self._service.active -= 1
            self._service.metrics.whole.observe(time.monotonic() - self._began)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not self._ended:
            await self._next()
        body = {
            **self._head,
            "choices": [choice.whole() for choice in self._job.choices],
            "usage": usage(self._job.prompt_tokens, self._job.cached_tokens, self._job.choices),
        }
        await JSONResponse(body)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        chat = isinstance(self._asked, ChatRequest)
        head = _json(self._head | ({"object": "chat.completion.chunk"} if chat else {}))[:-1]
        # With the usage asked for, every chunk has the field, and the last one fills it.
        tail = b',"usage":null}\n\n' if self._asked.usage_in_stream else b"}\n\n"
        while not self._ended:
            chunks = await self._next()
            if chunks and not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            events = [b'data: %b,"choices":[%b]%b' % (head, _json(c), tail) for c in chunks]
            if events:
                body = b"".join(events)
                await send({"type": "http.response.body", "body": body, "more_body": True})
        last = b"data: [DONE]\n\n"
        if self._asked.usage_in_stream:
            used = _json(usage(self._job.prompt_tokens, self._job.cached_tokens, self._job.choices))
            last = b'data: %b,"choices":[],"usage":%b}\n\n' % (head, used) + last
        await send({"type": "http.response.body", "body": last})

    @property
    def _ended(self) -> bool:
        return all(choice.finish is not None for choice in self._job.choices)

    async def _next(self) -> Sequence[Json]:
        """Wait for the engine; then all that has come, as entries of `choices`.

        Raises ApiError when the engine failed.
        """
        if self._error is not None:
            raise self._error
        arrived = await self._outputs.get()
        while not self._outputs.empty():
            arrived += self._outputs.get_nowait()
        chunks = [chunk for index, output in merged(arrived) for chunk in self._take(index, output)]
        if self._error is not None and not chunks:
            raise self._error
        return chunks

    def _take(self, index: int, output: Output) -> list[Json]:
        choice = self._job.choices[index]
        if choice.finish is not None or self._error is not None:
            return []
        if output.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
            self._error = errors.engine_failed(output.error or "the request was cancelled")
            output = replace(output, finish=None)  # what came before it is still to be shown
            if not output.tokens:
                return []
        self._observe(index, output)
        chunks = choice.push(output)
        if choice.finish is not None:
            self._service.metrics.choices.labels(choice.finish).inc()
            if output.finish is None:  # the choice ends before the engine's request does
                self._engine.cancel(self._job.requests[index])
        return chunks

    def _observe(self, index: int, output: Output) -> None:
        now, last = time.monotonic(), self._last[index]
        if not any(self._last):
            self._service.metrics.first_token.observe(now - self._began)
        elif last is not None and output.tokens:
            self._service.metrics.inter_token.observe((now - last) / len(output.tokens))
        self._last[index] = now

    def _cancel(self) -> None:
        """Nobody waits for what has not ended."""
        reason = "error" if self._error is not None else "cancelled"
        for choice, request in zip(self._job.choices, self._job.requests, strict=True):
            if choice.finish is None:
                self._engine.cancel(request)
                self._service.metrics.choices.labels(reason).inc()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
