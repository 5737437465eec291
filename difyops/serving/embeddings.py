"""`POST /v1/embeddings` over an `Embedder`, for any of our servers."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from difyops.serving import errors
from difyops.serving.embedder import Embedder
from difyops.serving.protocol import encode_vector, model_entry, model_name, parse_embedding

#: Inputs embedded between two looks at whether the client, or the server, is still there.
_SLICE = 8


def embedder_entry(name: str, embedder: Embedder, created: int) -> dict[str, Any]:
    """The entry of `/v1/models`."""
    return model_entry(name, embedder.max_tokens, created, "onnxruntime") | {
        "dimensions": embedder.dimensions
    }


async def answer_embedding(
    request: Request, fields: dict[str, Any], embedder: Embedder, stopping: asyncio.Event
) -> Response:
    """Embed what `fields` asks for, a few inputs at a time. Raises ApiError."""
    name = model_name(fields)
    asked = parse_embedding(fields)
    if asked.dimensions not in (None, embedder.dimensions):
        raise errors.bad_field(
            "dimensions", f"{asked.dimensions}; {name} makes vectors of {embedder.dimensions} only"
        )
    data: list[dict[str, Any]] = []
    tokens = truncated = 0
    inputs = asked.inputs()
    for start in range(0, len(inputs), _SLICE):
        if await request.is_disconnected():
            raise errors.client_left()
        if stopping.is_set():
            raise errors.stopping()
        try:
            part = await asyncio.to_thread(embedder.embed, inputs[start : start + _SLICE])
        except ValueError as error:
            raise errors.bad_field("input", str(error)) from None
        tokens += part.tokens
        truncated += part.truncated
        for vector in part.vectors:
            row = encode_vector(vector, asked.encoding_format)
            data.append({"object": "embedding", "index": len(data), "embedding": row})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    # Cut, and not refused: Dify cuts its chunks to our context_size by the GPT-2 tokenizer's count,
    # which differs from this model's. A refusal would fail the whole document for one long chunk.
    headers = {"x-truncated-inputs": str(truncated)} if truncated else None
    return JSONResponse(
        {"object": "list", "data": data, "model": name, "usage": usage}, headers=headers
    )
