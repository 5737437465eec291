"""HTTP as Dify speaks it: one session, timeouts, errors with Dify's own code, no secrets.

`requests` is imported when the first session is made, so that importing this module is cheap.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from difyops.errors import DifyopsError
from difyops.secrets import REDACTED, Secret

if TYPE_CHECKING:
    import requests

Json = dict[str, Any]

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0


class DifyApiError(DifyopsError):
    """Dify answered, and the answer is an error. `code` and `status` are Dify's own."""

    def __init__(self, message: str, hint: str | None = None, *, code: str, status: int) -> None:
        super().__init__(message, hint)
        self.code = code
        self.status = status

    def explained(self, hint: str | None, message: str | None = None) -> DifyApiError:
        """The same refusal, with a remedy that only the caller can know."""
        return DifyApiError(message or self.message, hint, code=self.code, status=self.status)


class DifyUnreachable(DifyopsError):
    """No answer: nothing listens, or it took too long."""


class _Reply(Json):
    """A JSON object of Dify's; a field that another release dropped is an error with a name."""

    def __missing__(self, field: str) -> Any:
        raise DifyopsError(
            f"Dify's answer has no field {field!r}",
            "this Dify is perhaps not the release difyops was told",
        )


class Http:
    """One base URL, one session: timeouts, errors and redaction are the same for every call."""

    def __init__(self, base_url: str) -> None:
        import requests

        self.base_url = base_url.rstrip("/")
        parts = urlsplit(self.base_url)
        #: The URL without user info: this one may be shown.
        self.shown_url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._session = requests.Session()
        # A proxy from the environment would capture calls to a machine of ours, and an entry in
        # ~/.netrc would replace our Authorization header.
        self._session.trust_env = False
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._known: list[Secret] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def _keep_out(self, secret: Secret) -> Secret:
        """Remember a secret, so that no message repeats it, whoever wrote the message."""
        if secret and secret not in self._known:
            self._known.append(secret)
        return secret

    def _redact(self, text: str) -> str:
        for secret in self._known:
            text = text.replace(secret.reveal(), REDACTED)
        return text

    def _send(
        self,
        method: str,
        path: str,
        *,
        read_seconds: float = READ_SECONDS,
        stream: bool = False,
        **kwargs: Any,
    ) -> requests.Response:
        import requests

        try:
            response = self._session.request(
                method,
                self.base_url + path,
                timeout=(CONNECT_SECONDS, read_seconds),
                stream=stream,
                # A redirected POST arrives as a GET, and looks like another fault.
                allow_redirects=False,
                **kwargs,
            )
        except requests.exceptions.ReadTimeout:
            raise DifyUnreachable(
                f"{method} {path}: no answer within {read_seconds:g} s",
                "see the API's log; a slow model needs a longer timeout",
            ) from None
        except requests.exceptions.InvalidURL as error:
            raise DifyopsError(f"{self.shown_url}: {error}") from None
        except requests.exceptions.RequestException as error:
            raise self._unreachable(error) from None
        if response.status_code >= 300:
            with response:
                raise self._refused(method, path, response)
        return response

    def _unreachable(self, error: Exception) -> DifyUnreachable:
        reason = re.search(r"\[Errno [^]]*\] ([^'\")]+)", str(error))
        words = reason[1].strip() if reason else type(error).__name__
        return DifyUnreachable(
            f"{self.shown_url}: Dify's API cannot be reached ({words})",
            "start it (`difyops up`), or see `difyops status` and the API's log",
        )

    def _refused(self, method: str, path: str, response: requests.Response) -> DifyopsError:
        where = f"{method} {path}: HTTP {response.status_code}"
        if response.is_redirect:
            place = urlsplit(response.headers["Location"])._replace(query="").geturl()
            return DifyopsError(
                f"{where}, redirected to {excerpt(place)}", "use that address as the base URL"
            )
        body: Any = None
        with suppress(ValueError):
            body = response.json()
        if not isinstance(body, dict) or "code" not in body:
            return DifyopsError(
                f"{where}, not an answer of Dify's API: {self._redact(excerpt(response.text))}",
                f"is {self.shown_url} the API, or a gateway whose API is down?",
            )
        code, message = str(body["code"]), str(body.get("message", ""))
        return DifyApiError(
            f"{where} {code}: {self._redact(excerpt(message, 600))}",
            "see the API's log" if response.status_code >= 500 else None,
            code=code,
            status=response.status_code,
        )

    def _call(self, method: str, path: str, **kwargs: Any) -> Json:
        with self._send(method, path, **kwargs) as response:
            if response.status_code == 204:
                return {}
            body: Any = None
            with suppress(ValueError):
                body = response.json(object_hook=_Reply)
            if not isinstance(body, dict):
                kind = response.headers.get("Content-Type", "no content type")
                raise DifyopsError(
                    f"{method} {path}: answered with {kind}, not with Dify's JSON",
                    f"{self.shown_url} is perhaps the web front end: the API has its own address",
                )
            return body


def parse_sse(lines: Iterable[bytes]) -> Iterator[tuple[str, Json]]:
    """(event, data) pairs of Dify's stream, where the event's name stands inside the JSON.

    Its pings are a bare `event: ping` and are left out. Raises DifyopsError for what is no JSON
    object: skipping it would turn a garbled stream into a shorter, healthy looking answer.
    """
    data: list[bytes] = []
    for line in lines:
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            yield _event(b"\n".join(data))
            data = []
    if data:
        # The blank line that ends an event is missing: the connection was cut inside it.
        raise DifyopsError(f"the stream ends inside an event: {excerpt(b''.join(data))}")


def _event(data: bytes) -> tuple[str, Json]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        raise DifyopsError(
            f"the stream holds something that is not an event of Dify: {excerpt(data)}",
            "look for a proxy that rewrites or buffers the stream, and at the API's log",
        )
    return value["event"], value


def excerpt(body: bytes | str, limit: int = 200) -> str:
    """The beginning of an answer, on one line."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"


def lines_until(response: requests.Response, deadline: float) -> Iterator[bytes]:
    """The lines of a streamed answer; DifyUnreachable past `deadline` (time.monotonic)."""
    for line in response.iter_lines():
        if time.monotonic() > deadline:
            raise DifyUnreachable("the streamed answer did not end in time", "see the model's log")
        yield line
