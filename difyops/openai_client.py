"""Ask an OpenAI-compatible server, streamed: what `difyops chat` and `difyops bench` share."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from difyops.errors import DifyopsError, UsageError
from difyops.loopback import is_loopback
from difyops.secrets import Secret

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]

#: In the environment: the key of a model server, and that of our own.
KEY_VARIABLE = "DIFYOPS_MODEL_API_KEY"
SERVE_KEY_VARIABLE = "DIFYOPS_API_KEY"
CHAT_PATH = "chat/completions"
#: Seconds of silence before a server counts as hung: a processor reads a long prompt for minutes.
SILENCE = 600.0


@dataclass(frozen=True)
class Endpoint:
    """A model of a server; `url` is its base URL and usually ends in `/v1`."""

    url: str
    model: str
    key: Secret | None = None


@dataclass(frozen=True)
class Event:
    """What one event of a stream adds. `tokens` and `prompt_tokens` are the server's own count
    (`usage`), which only the last event has, if the server counts at all."""

    text: str = ""
    reasoning: str = ""
    tokens: int | None = None
    prompt_tokens: int | None = None
    finish: str | None = None


class Refused(DifyopsError):
    """The server answered with an error. `retry_after` is in seconds; None: it does not say."""

    def __init__(
        self, status: int, message: str, hint: str | None, retry_after: float | None, loading: bool
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.retry_after = retry_after
        self.loading = loading


class EventReader:
    """The bytes of one streamed answer -> its events."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pending = b""
        self._ended = False

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are whole now. Raises DifyopsError for an error that the server sends in
        the stream, and for what is no event."""
        # Only newlines end a line: str.splitlines would cut inside JSON, at U+2028 or U+0085.
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        return [self._event(line[5:].strip()) for line in lines if line.startswith(b"data:")]

    def close(self) -> None:
        """The connection has ended. Raises DifyopsError if the answer had not."""
        if not self._ended:
            raise broken_off(self._url)

    def _event(self, data: bytes) -> Event:
        if data == b"[DONE]":
            self._ended = True
            return Event()
        try:
            event = parse_event(json.loads(data))
        except (ValueError, TypeError, AttributeError, LookupError):
            raise DifyopsError(f"{self._url}: an unreadable event in the stream", _HINT) from None
        self._ended = self._ended or event.finish is not None
        return event


def parse_event(body: Any) -> Event:
    """A decoded `chat.completion.chunk`. Raises DifyopsError with the server's message when it is
    an error, and TypeError, AttributeError or LookupError when it is neither."""
    if error := body.get("error"):
        raise DifyopsError(_message(error) or "the server broke the answer off")
    choice: dict[str, Any] = next(iter(body.get("choices") or ()), {})
    delta = choice.get("delta") or {}
    usage = body.get("usage") or {}
    return Event(
        text=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        tokens=usage.get("completion_tokens"),
        prompt_tokens=usage.get("prompt_tokens"),
        finish=choice.get("finish_reason"),
    )


def key_for(url: str) -> Secret | None:
    """The key of the environment for a server that somebody names: DIFYOPS_MODEL_API_KEY; on
    loopback, without that, DIFYOPS_API_KEY, which `difyops serve` takes."""
    names = [KEY_VARIABLE, *([SERVE_KEY_VARIABLE] if is_loopback(urlsplit(url).hostname) else [])]
    value = next((value for name in names if (value := os.environ.get(name))), None)
    return Secret(value) if value else None


def connection(url: str, key: Secret | None) -> dict[str, Any]:
    """Arguments of httpx.Client or httpx.AsyncClient. Raises UsageError for what is no http URL."""
    import httpx

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not an http or https URL", _HINT)
    headers = {"Accept-Encoding": "identity"}  # compression would hold tokens back
    if key:
        if not (key.reveal().isascii() and key.reveal().isprintable()):
            raise UsageError("the model's API key has characters that no HTTP header can carry")
        headers["Authorization"] = f"Bearer {key.reveal()}"
    return {
        "base_url": url.rstrip("/") + "/",
        "headers": headers,
        "timeout": httpx.Timeout(SILENCE, connect=10),
        # llama.cpp closes connections when it likes; one that is reused may be a dead one.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=0),
        # A proxy of the environment has no business on loopback.
        "trust_env": not is_loopback(parts.hostname),
    }


def chat_body(
    model: str, messages: Sequence[Message], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The request of a streamed chat that ends with its usage."""
    return {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }


def stream_chat(
    client: httpx.Client,
    endpoint: Endpoint,
    messages: Sequence[Message],
    options: Mapping[str, Any],
) -> Generator[Event, None, None]:
    """The events of one answer; closing the generator closes the connection.

    Raises Refused when the server does not begin, DifyopsError when it breaks off.
    """
    body = chat_body(endpoint.model, messages, options)
    with (
        explained(endpoint.url),
        client.stream("POST", CHAT_PATH, json=body) as answer,
    ):
        if answer.status_code != 200:
            raise refusal(endpoint.url, answer.status_code, answer.headers, answer.read())
        reader = EventReader(endpoint.url)
        for chunk in answer.iter_bytes():
            yield from reader.feed(chunk)
        reader.close()


def chat_models(client: httpx.Client, url: str) -> list[str]:
    """The names at `/models`, without those that say they make vectors. Raises as stream_chat."""
    with explained(url):
        answer = client.get("models", timeout=10)
        if answer.status_code != 200:
            raise refusal(url, answer.status_code, answer.headers, answer.content)
        try:
            return [str(m["id"]) for m in answer.json()["data"] if not m.get("dimensions")]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise DifyopsError(f"{url}/models is not a list of models", _HINT) from None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """httpx's errors in words."""
    import httpx

    try:
        yield
    except httpx.ConnectError as error:
        raise DifyopsError(
            f"{url} cannot be reached",
            "is it up? One of ours: difyops serve MODEL, or difyops up --source",
        ) from error
    except httpx.TimeoutException as error:
        raise DifyopsError(f"{url} does not answer in time", "look at its log") from error
    except (httpx.RemoteProtocolError, httpx.ReadError) as error:
        raise broken_off(url) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DifyopsError(f"{url}: {type(error).__name__}: {error}", _HINT) from error


def broken_off(url: str) -> DifyopsError:
    return DifyopsError(f"{url}: the answer broke off", "ask again; if it recurs, see its log")


def refusal(url: str, status: int, headers: Mapping[str, str], body: bytes) -> Refused:
    """An answer that is not 200, with the remedy."""
    try:
        decoded = json.loads(body)
        error = decoded.get("error", decoded)
        code = str(error.get("code")) if isinstance(error, dict) else ""
        said = _message(error)
    except (ValueError, AttributeError):
        code = said = ""
    wait = _seconds(headers.get("retry-after"))
    loading = status == 503 and code != "server_stopping"
    message, hint = f"{url} answered {status}{': ' if said else ''}{said}", None
    if status in (401, 403):
        message = f"{url} refuses the API key ({status})"
        hint = "with --url, the key is taken from DIFYOPS_MODEL_API_KEY"
        if is_loopback(urlsplit(url).hostname):
            hint += " or, on this machine, from DIFYOPS_API_KEY"
    elif said.startswith("max_tokens"):
        hint = "a smaller --max-tokens, or none: then the context is the bound"
    elif code == "context_length_exceeded" or "exceed_context" in said:
        hint = "ask less at a time; in a conversation, /reset forgets what was said"
    elif status == 404:
        hint = "name one with --model" if code == "model_not_found" else _HINT
    elif status == 429:
        message = f"{url} is busy (429{': ' if said else ''}{said})"
        hint = f"try again in {wait:.0f} s" if wait else "try again later"
    elif loading:
        hint = "wait until it has loaded, then ask again"
    return Refused(status, message, hint, wait, loading)


_HINT = "is it the base URL of an OpenAI-compatible server? It usually ends in /v1"


def _message(error: Any) -> str:
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(said.split())[:300] if isinstance(said, str) else ""


def _seconds(value: str | None) -> float | None:
    # Retry-After may also be a date, which none of these servers sends.
    return float(value) if value and value.isdecimal() else None
