"""The routes that every server of ours has, over the models that its process serves."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from difyops.serving import errors
from difyops.serving.config import ServerConfig
from difyops.serving.embedder import Embedder
from difyops.serving.embeddings import answer_embedding, embedder_entry
from difyops.serving.http import HEALTH, application, json_object, read_body
from difyops.serving.protocol import model_name


@dataclass
class Served(ABC):
    """The models of one process. Nothing is answered before `ready`; once `draining`, nothing new
    is; `stopping` cuts what still runs. Made inside the event loop that it serves from."""

    #: Where the chat model answers, below `/v1/`.
    llm_route: ClassVar[str]

    config: ServerConfig
    embedder: Embedder | None = None
    ready: bool = False
    draining: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    created: int = field(default_factory=lambda: int(time.time()))

    @abstractmethod
    def llm_entry(self) -> dict[str, Any] | None:
        """The chat model's entry of `/v1/models`, once it is loaded."""

    def describe(self) -> list[dict[str, Any]]:
        """Entries of `/v1/models`; lengths in tokens, as the engines report them."""
        entries = [entry] if (entry := self.llm_entry()) is not None else []
        if self.config.embedding is not None and self.embedder is not None:
            entries.append(embedder_entry(self.config.embedding.id, self.embedder, self.created))
        return entries

    def load_embedder(self) -> None:
        """Load and warm the encoder that the configuration names, if any; blocking.

        Raises PrerequisiteError.
        """
        if (wanted := self.config.embedding) is not None:
            self.embedder = Embedder.load(
                wanted.model, wanted.tokenizer, wanted.max_tokens, wanted.threads
            )

    def answering(self) -> Self:
        """Itself. Raises ApiError while nothing new is answered."""
        if self.draining:
            raise errors.stopping()
        if not self.ready:
            raise errors.loading()
        return self


def create_app(
    served: Served, routes: Sequence[Route], quiet_paths: frozenset[str] = HEALTH
) -> Starlette:
    """The application over `served`, which may still be loading: `routes` and those of here. All
    but `/health` need the key."""
    app = application(
        [
            Route("/health", health, methods=["GET"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            Route("/v1/embeddings", embed, methods=["POST"]),
            *routes,
        ],
        served.config.key,
        quiet_paths,
    )
    app.state.served = served
    return app


async def health(request: Request) -> Response:
    served = _served(request)
    if served.ready and not served.draining:
        return JSONResponse({"status": "ok", "models": served.config.ids()})
    status = "stopping" if served.draining else "loading"
    return JSONResponse({"status": status}, 503, headers={"Retry-After": "1"})


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": _served(request).answering().describe()})


async def show_model(request: Request) -> Response:
    served = _served(request).answering()
    name = request.path_params["name"]
    for entry in served.describe():
        if entry["id"] == name:
            return JSONResponse(entry)
    raise errors.unknown_model(name, served.config.ids())


async def embed(request: Request) -> Response:
    body = await read_body(request)
    served = _served(request).answering()
    fields = await asyncio.to_thread(json_object, body)
    name = model_name(fields)
    config, embedder = served.config.embedding, served.embedder
    if config is None or embedder is None or name != config.id:
        raise errors.wrong_model(name, served.config.ids(), "embeddings", served.llm_route)
    return await answer_embedding(request, fields, embedder, served.stopping)


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served
