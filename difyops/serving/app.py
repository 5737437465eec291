"""The ASGI application before llama.cpp: chat is relayed, the rest as in any server of ours."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from difyops.serving import errors, routes
from difyops.serving.config import ServingConfig
from difyops.serving.http import json_object, read_body
from difyops.serving.llama import Llama
from difyops.serving.protocol import check_chat, model_entry, model_name
from difyops.serving.relay import Relay, explain_llama


@dataclass
class Models(routes.Served):
    """Chat by a llama.cpp in a process of its own."""

    llm_route = "chat/completions"

    config: ServingConfig
    llama: Llama | None = None

    async def load(self) -> None:
        """Load and warm what the configuration names. Raises PrerequisiteError."""
        await asyncio.to_thread(self.load_embedder)
        if self.config.llm is not None:
            self.llama = Llama(self.config.llm)
            await self.llama.start()
        self.ready = True

    async def close(self) -> None:
        self.ready = False
        if self.llama is not None:
            await self.llama.stop()

    def llm_entry(self) -> dict[str, Any] | None:
        if self.config.llm is None or self.llama is None:
            return None
        entry = model_entry(self.config.llm.id, self.llama.context, self.created)
        return entry | {"tools": self.config.llm.tools}


def create_app(models: Models) -> Starlette:
    """The application over `models`, which may still be loading."""
    return routes.create_app(models, [Route("/v1/chat/completions", chat, methods=["POST"])])


async def chat(request: Request) -> Response:
    body = await read_body(request)
    models: Models = request.app.state.served.answering()
    fields = await asyncio.to_thread(json_object, body)
    name = model_name(fields)
    llm, llama = models.config.llm, models.llama
    if llm is None or llama is None or name != llm.id:
        raise errors.wrong_model(name, models.config.ids(), "chat", "embeddings")
    check_chat(fields, tools=llm.tools)
    # The client's own bytes go on: nothing that it said is lost in a second encoding.
    return Relay(llama.client, "/v1/chat/completions", body, explain_llama(name), models.stopping)
