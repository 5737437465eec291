"""Ask an OpenAI-compatible server what it has, and prove that it answers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from difyops.errors import DifyopsError
from difyops.loopback import is_loopback
from difyops.secrets import Secret

if TYPE_CHECKING:
    import requests


@dataclass(frozen=True)
class ModelInfo:
    """One entry of `/v1/models`. `context` is in tokens, `dimensions` of an embedding; None means
    that the server does not say. `tools`: whether it calls tools, by its own word."""

    id: str
    context: int | None
    dimensions: int | None = None
    tools: bool | None = None
    owned_by: str | None = None


@dataclass(frozen=True)
class ChatAnswer:
    """`seconds` is the whole answer, `first_token` the time to its first text; both from the
    moment of asking."""

    text: str
    seconds: float
    first_token: float


def describe(
    base_url: str, api_key: Secret | None = None, *, timeout: float = 10
) -> list[ModelInfo]:
    """The models at `base_url` (which ends in `/v1`). `timeout` is in seconds.

    Raises DifyopsError when the server cannot be reached, refuses, or answers something else.
    """
    with _session(base_url, api_key) as session, _explained(base_url):
        answer = session.get(f"{base_url.rstrip('/')}/models", timeout=timeout)
        _accepted(answer, base_url)
        body = answer.json()
    entries = body.get("data") if isinstance(body, dict) else None
    if not isinstance(entries, list):
        raise DifyopsError(f"{base_url}/models is not a list of models", _HINT)
    return [
        ModelInfo(
            id=entry["id"],
            context=_context(entry),
            dimensions=_number(entry.get("dimensions")),
            tools=entry["tools"] if isinstance(entry.get("tools"), bool) else None,
            owned_by=entry.get("owned_by"),
        )
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]


@dataclass(frozen=True)
class ScoredToken:
    """`gap` is the difference between the two greatest log probabilities at its place."""

    text: str
    gap: float


def greedy(
    base_url: str,
    model: str,
    api_key: Secret | None = None,
    *,
    messages: Sequence[Mapping[str, str]],
    max_tokens: int,
    extra: Mapping[str, Any],
    timeout: float = 60,
) -> tuple[str, list[ScoredToken]]:
    """The likeliest answer, thoughts included, and its tokens where `extra` asks for `logprobs` and
    the server gives them. `extra` are more fields of the request; `timeout` is in seconds.

    Raises DifyopsError when the server cannot be reached, refuses, or answers something else.
    """
    body = {
        "model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0,
        **extra,
    }  # fmt: skip
    with _session(base_url, api_key) as session, _explained(base_url):
        url = f"{base_url.rstrip('/')}/chat/completions"
        answer = session.post(url, json=body, timeout=timeout)
        _accepted(answer, base_url)
        try:
            choice = answer.json()["choices"][0]
            message = choice["message"]
            text = (message.get("reasoning_content") or "") + (message.get("content") or "")
            scored = (choice.get("logprobs") or {}).get("content") or ()
            return text, [_scored(entry) for entry in scored]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise DifyopsError(f"{base_url}: {model} answered no message", _HINT) from None


def _scored(entry: Mapping[str, Any]) -> ScoredToken:
    first, second = sorted((top["logprob"] for top in entry["top_logprobs"][:2]), reverse=True)
    return ScoredToken(entry["token"], first - second)


def chat_once(
    base_url: str,
    model: str,
    api_key: Secret | None = None,
    *,
    prompt: str = "Say hello.",
    max_tokens: int = 16,
    timeout: float = 60,
) -> ChatAnswer:
    """One streamed chat. `timeout` is the longest silence in seconds.

    Raises DifyopsError when no text comes back, the stream breaks off, or the server refuses.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    began = time.monotonic()
    first: float | None = None
    text: list[str] = []
    with _session(base_url, api_key) as session, _explained(base_url):
        url = f"{base_url.rstrip('/')}/chat/completions"
        with session.post(url, json=body, stream=True, timeout=timeout) as answer:
            _accepted(answer, base_url)
            ended = False
            for event in _events(answer):
                if event == "[DONE]":
                    ended = True
                    break
                piece = _piece(json.loads(event), base_url)
                if piece:
                    first = first if first is not None else time.monotonic() - began
                    text.append(piece)
    if not ended:
        raise DifyopsError(f"{base_url}: the answer of {model} broke off")
    if first is None:
        raise DifyopsError(f"{base_url}: {model} answered without any text")
    return ChatAnswer("".join(text), time.monotonic() - began, first)


def embed_once(
    base_url: str, model: str, api_key: Secret | None = None, *, timeout: float = 30
) -> list[float]:
    """The embedding of one short text. `timeout` is in seconds.

    Raises DifyopsError when the server refuses or answers no vector of finite numbers.
    """
    body = {"model": model, "input": "A short text.", "encoding_format": "float"}
    with _session(base_url, api_key) as session, _explained(base_url):
        answer = session.post(f"{base_url.rstrip('/')}/embeddings", json=body, timeout=timeout)
        _accepted(answer, base_url)
        try:
            vector = [float(x) for x in answer.json()["data"][0]["embedding"]]
        except (LookupError, TypeError):
            vector = []
    if not vector or not all(math.isfinite(x) for x in vector) or not any(vector):
        raise DifyopsError(f"{base_url}: {model} answered no embedding")
    return vector


def calls_tool(
    base_url: str, model: str, api_key: Secret | None = None, *, timeout: float = 60
) -> bool:
    """Whether the model calls a tool when the request obliges it to.

    Raises DifyopsError when the server cannot be reached or refuses the request.
    """
    tool = {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "required",
        "max_tokens": 128,
    }
    with _session(base_url, api_key) as session, _explained(base_url):
        url = f"{base_url.rstrip('/')}/chat/completions"
        answer = session.post(url, json=body, timeout=timeout)
        _accepted(answer, base_url)
        message = (answer.json().get("choices") or [{}])[0].get("message") or {}
    called = [call.get("function", {}).get("name") for call in message.get("tool_calls") or ()]
    return "get_weather" in called


_HINT = "is it the base URL of an OpenAI-compatible server? It usually ends in /v1"


def _context(entry: dict[str, Any]) -> int | None:
    # In the order of trust: what a request may hold now, before what the model was trained on.
    meta = entry.get("meta")
    trained = meta.get("n_ctx_train") if isinstance(meta, dict) else None
    for value in (entry.get("context_length"), entry.get("max_model_len"), trained):
        if (number := _number(value)) is not None:
            return number
    return None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _piece(event: Any, base_url: str) -> str:
    """The text in one event; a reasoning model's thoughts count as text too."""
    if not isinstance(event, dict) or event.get("error"):
        error = event.get("error") if isinstance(event, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        raise DifyopsError(f"{base_url}: {message or 'an unreadable event in the stream'}")
    delta = next((c.get("delta") or {} for c in event.get("choices") or ()), {})
    return str(delta.get("content") or delta.get("reasoning_content") or "")


def _events(answer: requests.Response) -> Iterator[str]:
    for line in answer.iter_lines(chunk_size=1):
        if line.startswith(b"data:"):
            yield line[5:].strip().decode("utf-8", "replace")


@contextmanager
def _session(base_url: str, api_key: Secret | None) -> Iterator[requests.Session]:
    # Imported here: requests costs a start of the CLI that does not need it 50 ms.
    import requests

    with requests.Session() as session:
        # A proxy of the environment, or a .netrc, has no business on loopback.
        session.trust_env = not is_loopback(urlsplit(base_url).hostname)
        if api_key:
            session.auth = _bearer(api_key)
        yield session


def _bearer(api_key: Secret) -> Any:
    # As `auth` and not as a header, so that a .netrc entry cannot replace it.
    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {api_key.reveal()}"
        return request

    return sign


@contextmanager
def _explained(base_url: str) -> Iterator[None]:
    import requests

    try:
        yield
    except requests.ConnectionError as error:
        raise DifyopsError(
            f"{base_url} cannot be reached",
            "start it (one of ours: difyops up --source), or set model.url in difyops.yaml",
        ) from error
    except requests.Timeout as error:
        raise DifyopsError(f"{base_url} does not answer in time") from error
    except requests.RequestException as error:
        raise DifyopsError(f"{base_url}: {type(error).__name__}", _HINT) from error
    except ValueError as error:
        raise DifyopsError(f"{base_url} did not answer JSON", _HINT) from error


def _accepted(answer: requests.Response, base_url: str) -> None:
    if answer.ok:
        return
    if answer.status_code in (401, 403):
        raise DifyopsError(f"{base_url} refuses the API key ({answer.status_code})")
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = answer.reason
    raise DifyopsError(f"{base_url} answered {answer.status_code}: {str(message)[:300]}")
