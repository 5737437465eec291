"""Reading a body, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from difyops.serving import http
from difyops.serving.errors import ApiError


def request(*pieces: bytes, kind: str = "application/json", ends: bool = True) -> Request:
    """A POST whose body is `pieces`; then it ends, or nothing more comes."""
    left = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if ends:
        left.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    headers = [(b"content-type", kind.encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def refusal(request: Request, **limits: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(http.read_body(request, **limits))
    return caught.value


def test_a_body_that_never_ends_is_408() -> None:
    error = refusal(request(b"{", ends=False), seconds=0.05)
    assert (error.status, error.body["error"]["code"]) == (408, "request_timeout")
    assert "0.05 s" in str(error) and error.headers["Connection"] == "close"


def test_a_body_in_pieces() -> None:
    assert asyncio.run(http.read_body(request(b"{", b"}"), seconds=5)) == b"{}"


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data; boundary=x"])
def test_what_a_form_can_send_is_415(kind: str) -> None:
    error = refusal(request(b"{}", kind=kind))
    assert error.status == 415 and "Content-Type: application/json" in str(error)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"a":[' + b"1," * 1_000_001 + b"1]}", "commas"),
        (b'{"a":[' + b"[]" * 100_000 + b"]}", "opening brackets"),
        (b'{"a":' + b"[" * 100_000, "opening brackets"),
    ],
)
def test_too_many_values_are_413(body: bytes, what: str) -> None:
    with pytest.raises(ApiError) as caught:
        http.json_object(body)
    assert caught.value.status == 413 and what in str(caught.value)
