"""The engine's own HTTP routes, beside those of every server of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from difyops.engine.intake import Job, Llm, chat_job, completion_job
from difyops.engine.metrics import CONTENT_TYPE
from difyops.engine.protocol import ChatRequest, CompletionRequest, Kind, parse
from difyops.engine.service import Service
from difyops.engine.stream import Answer
from difyops.serving import errors, routes
from difyops.serving.errors import ApiError
from difyops.serving.http import HEALTH, json_object, read_body
from difyops.serving.protocol import model_name

_QUIET = HEALTH | {"/metrics", "/v1/models"}


def create_app(service: Service) -> Starlette:
    """The application over `service`, which may still be loading. All but `/health` need the key,
    `/metrics` too."""
    own = [
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    return routes.create_app(service, own, _QUIET)


async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE)


async def chat(request: Request) -> Response:
    return await _generate(request, ChatRequest, chat_job)


async def complete(request: Request) -> Response:
    return await _generate(request, CompletionRequest, completion_job)


async def _generate(
    request: Request, kind: type[Kind], make: Callable[[Llm, Kind], Job]
) -> Response:
    began = time.monotonic()
    body = await read_body(request)
    service = _service(request).answering()
    try:
        # A long prompt or a new grammar takes a while, which other clients' tokens need not wait.
        llm, asked, job = await asyncio.to_thread(_prepare, service, body, kind, make)
        answer = Answer(service, llm, job, asked, began)
        answer.submit()
    except ApiError as error:
        service.metrics.refused.labels(error.body["error"]["code"]).inc()
        raise
    return answer


def _prepare(
    service: Service, body: bytes, kind: type[Kind], make: Callable[[Llm, Kind], Job]
) -> tuple[Llm, Kind, Job]:
    """Raises ApiError for what cannot be answered. Runs beside the event loop."""
    fields = json_object(body)
    name = model_name(fields)
    llm = service.llm
    if llm is None or name != llm.id:
        raise errors.wrong_model(name, service.config.ids(), "completions", "embeddings")
    asked = parse(kind, fields)
    if asked.count > (most := llm.engine.most_at_once):
        raise errors.bad_field(
            "n" if (asked.n or 1) > 1 else "prompt",
            f"{asked.count} choices in all, but this server runs and queues at most {most}",
        )
    return llm, asked, make(llm, asked)


def _service(request: Request) -> Service:
    service: Service = request.app.state.served
    return service
