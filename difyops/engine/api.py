"""The engine's HTTP routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from difyops.engine.intake import Job, Llm, chat_job, completion_job
from difyops.engine.metrics import CONTENT_TYPE
from difyops.engine.protocol import ChatRequest, CompletionRequest, Kind, parse
from difyops.engine.service import Service
from difyops.engine.stream import Answer
from difyops.serving import errors
from difyops.serving.embeddings import answer_embedding
from difyops.serving.errors import ApiError
from difyops.serving.http import application, json_object, read_body
from difyops.serving.protocol import model_name

_QUIET = frozenset({"/health", "/metrics", "/v1/models"})


def create_app(service: Service) -> Starlette:
    """The application over `service`, which may still be loading. All but `/health` need the key,
    `/metrics` too."""
    app = application(
        [
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/embeddings", embed, methods=["POST"]),
        ],
        service.config.key,
        quiet_paths=_QUIET,
    )
    app.state.service = service
    return app


async def health(request: Request) -> Response:
    service = _service(request)
    if service.ready and not service.draining:
        return JSONResponse({"status": "ok", "models": service.config.ids()})
    status = "stopping" if service.draining else "loading"
    return JSONResponse({"status": status}, 503, headers={"Retry-After": "1"})


async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE)


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": _serving(request).describe()})


async def show_model(request: Request) -> Response:
    service = _serving(request)
    name = request.path_params["name"]
    for entry in service.describe():
        if entry["id"] == name:
            return JSONResponse(entry)
    raise errors.unknown_model(name, service.config.ids())


async def chat(request: Request) -> Response:
    return await _generate(request, ChatRequest, chat_job)


async def complete(request: Request) -> Response:
    return await _generate(request, CompletionRequest, completion_job)


async def embed(request: Request) -> Response:
    body = await read_body(request)
    service = _serving(request)
    fields = await asyncio.to_thread(json_object, body)
    name = model_name(fields)
    embedder = service.embedder
    if service.config.embedding is None or embedder is None or name != service.config.embedding.id:
        raise errors.wrong_model(name, service.config.ids(), "embeddings", "completions")
    return await answer_embedding(request, fields, embedder, service.stopping)


async def _generate(
    request: Request, kind: type[Kind], make: Callable[[Llm, Kind], Job]
) -> Response:
    began = time.monotonic()
    body = await read_body(request)
    service = _serving(request)
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
    service: Service = request.app.state.service
    return service


def _serving(request: Request) -> Service:
    service = _service(request)
    if service.draining:
        raise errors.stopping()
    if not service.ready:
        raise errors.loading()
    return service
