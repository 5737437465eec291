"""The ASGI application: routes over the models that one process serves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from difyops.serving import errors
from difyops.serving.config import ServingConfig
from difyops.serving.embedder import Embedder
from difyops.serving.embeddings import answer_embedding, embedder_entry
from difyops.serving.http import application, json_object, read_body
from difyops.serving.llama import Llama
from difyops.serving.protocol import check_chat, model_entry, model_name
from difyops.serving.relay import Relay, explain_llama


@dataclass
class Models:
    """The models of one process. Nothing is served before `ready`; `stopping` cuts what still
    runs when the time to finish is over."""

    config: ServingConfig
    llama: Llama | None = None
    embedder: Embedder | None = None
    ready: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    created: int = field(default_factory=lambda: int(time.time()))

    async def load(self) -> None:
        """Load and warm what the configuration names. Raises PrerequisiteError."""
        config = self.config
        if (embedding := config.embedding) is not None:
            self.embedder = await asyncio.to_thread(
                Embedder.load,
                embedding.model,
                embedding.tokenizer,
                embedding.max_tokens,
                embedding.threads,
            )
        if config.llm is not None:
            self.llama = Llama(config.llm)
            await self.llama.start()
        self.ready = True

    async def close(self) -> None:
        self.ready = False
        if self.llama is not None:
            await self.llama.stop()

    def describe(self) -> list[dict[str, Any]]:
        """Entries of `/v1/models`; lengths in tokens, as the engines report them."""
        entries = []
        if self.config.llm is not None and self.llama is not None:
            entry = model_entry(self.config.llm.id, self.llama.context, self.created)
            entries.append(entry | {"tools": self.config.llm.tools})
        if self.config.embedding is not None and self.embedder is not None:
            entries.append(embedder_entry(self.config.embedding.id, self.embedder, self.created))
        return entries


def create_app(models: Models) -> Starlette:
    """The application over `models`, which may still be loading."""
    app = application(
        [
            Route("/health", health, methods=["GET"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", embed, methods=["POST"]),
        ],
        models.config.key,
    )
    app.state.models = models
    return app


async def health(request: Request) -> Response:
    models = _models(request)
    if not models.ready:
        return JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "1"})
    return JSONResponse({"status": "ok", "models": models.config.ids()})


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": _loaded(request).describe()})


async def show_model(request: Request) -> Response:
    models = _loaded(request)
    name = request.path_params["name"]
    for entry in models.describe():
        if entry["id"] == name:
            return JSONResponse(entry)
    raise errors.unknown_model(name, models.config.ids())


async def chat(request: Request) -> Response:
    body = await read_body(request)
    models = _loaded(request)
    fields = await asyncio.to_thread(json_object, body)
    name = model_name(fields)
    llm, llama = models.config.llm, models.llama
    if llm is None or llama is None or name != llm.id:
        raise errors.wrong_model(name, models.config.ids(), "chat", "embeddings")
    check_chat(fields, tools=llm.tools)
    # The client's own bytes go on: nothing that it said is lost in a second encoding.
    return Relay(llama.client, "/v1/chat/completions", body, explain_llama(name), models.stopping)


async def embed(request: Request) -> Response:
    body = await read_body(request)
    models = _loaded(request)
    fields = await asyncio.to_thread(json_object, body)
    name = model_name(fields)
    embedder = models.embedder
    if models.config.embedding is None or embedder is None or name != models.config.embedding.id:
        raise errors.wrong_model(name, models.config.ids(), "embeddings", "chat/completions")
    return await answer_embedding(request, fields, embedder, models.stopping)


def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


def _loaded(request: Request) -> Models:
    models = _models(request)
    if not models.ready:
        raise errors.loading()
    return models
