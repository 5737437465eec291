"""OpenAI-shaped errors, for any server that speaks `/v1`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

INVALID = "invalid_request_error"


class ApiError(Exception):
    """An error that a client sees. `status` is the HTTP status, `code` a stable machine name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
        extra: dict[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
            | (extra or {})
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)

    def event(self) -> bytes:
        """The error as a server-sent event, for a stream whose status line is already sent."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    return ApiError(
        404,
        f"the model {name!r} does not exist here; the models are: {', '.join(known)}",
        code="model_not_found",
        param="model",
    )


def wrong_model(name: str, known: Iterable[str], task: str, other: str) -> ApiError:
    """`name` does not do `task`: it is unknown, or it answers on `/v1/{other}`."""
    known = list(known)
    if name not in known:
        return unknown_model(name, known)
    return ApiError(
        400,
        f"{name} does not do {task}; it answers on /v1/{other}",
        code="model_not_supported",
        param="model",
    )


def too_long(
    tokens: int, context: int, model: str, param: str = "messages", *, size: int | None = None
) -> ApiError:
    """`tokens` is the prompt's length, `context` what one request may hold, in tokens. With
    `size`, the prompt's bytes, `tokens` is only the least that these can be."""
    has = (
        f"{tokens} tokens" if size is None else f"{size} bytes, which are at least {tokens} tokens"
    )
    return ApiError(
        400,
        f"the prompt has {has}, but the context of {model} is {context} tokens",
        code="context_length_exceeded",
        param=param,
        extra={"n_prompt_tokens": tokens, "n_ctx": context},
    )


def bad_field(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", code="invalid_value", param=param)


def unsupported(param: str, why: str = "is not supported") -> ApiError:
    return ApiError(400, f"{param}: {why}", code="unsupported_parameter", param=param)


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "a valid API key is required: Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit} bytes", code="request_too_large")


def too_many_values(what: str, limit: int) -> ApiError:
    """`what` the body has more of than `limit`, as JSON."""
    return ApiError(
        413,
        f"the request body has more than {limit} {what}, which no prompt needs",
        code="request_too_large",
    )


def too_slow(seconds: float) -> ApiError:
    """The rest of the body may still come: the connection is of no use any more."""
    return ApiError(
        408,
        f"the request body did not arrive within {seconds:g} s; send it whole, or a smaller one",
        code="request_timeout",
        headers={"Connection": "close"},
    )


def not_json(kind: str) -> ApiError:
    """`kind` is the media type that the client named, if any."""
    return ApiError(
        415,
        f"Content-Type: {kind or '(none)'} is not read; send the header"
        " Content-Type: application/json",
        code="unsupported_media_type",
    )


def client_left() -> ApiError:
    """Nobody reads it; the log shows the status."""
    return ApiError(499, "the client left")


def loading() -> ApiError:
    return ApiError(
        503,
        "the models are still loading",
        code="model_loading",
        kind="server_error",
        headers={"Retry-After": "1"},
    )


def queue_full(waiting: int, retry_after: int) -> ApiError:
    """`retry_after` is in seconds."""
    return ApiError(
        429,
        f"{waiting} requests are waiting already; try again in {retry_after} s",
        code="queue_full",
        kind="rate_limit_error",
        headers={"Retry-After": str(retry_after)},
    )


def engine_failed(why: str) -> ApiError:
    return ApiError(500, why, code="engine_failed", kind="server_error")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="server_stopping", kind="server_error")


def internal() -> ApiError:
    return ApiError(500, "internal error; see the server's log", kind="server_error")


async def on_api_error(_request: Request, error: Exception) -> JSONResponse:
    """Starlette handler for ApiError."""
    return error.response() if isinstance(error, ApiError) else internal().response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette handler for its own 404 and 405."""
    status = getattr(error, "status_code", 500)
    if status == 404:
        message = f"no route {request.url.path}"
    elif status == 405:
        message = f"{request.method} is not allowed on {request.url.path}"
    else:
        message = str(getattr(error, "detail", "error"))
    headers = dict(getattr(error, "headers", None) or {})
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(status)
    return ApiError(status, message, code=code, headers=headers).response()


async def on_crash(_request: Request, _error: Exception) -> JSONResponse:
    """Starlette handler for what nobody foresaw; the traceback goes to the log."""
    return internal().response()
