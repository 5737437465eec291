"""A stream's bytes -> events; refusals -> a line and its remedy."""

from __future__ import annotations

import json

import pytest

from difyops.chat import Answer, question
from difyops.errors import DifyopsError, UsageError
from difyops.openai_client import Event, EventReader, connection, key_for, refusal
from difyops.secrets import Secret

URL = "http://10.0.0.5/v1"


def chunk(**delta: object) -> bytes:
    text = json.dumps({"choices": [{"delta": delta}]}, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def read(stream: bytes, size: int) -> list[Event]:
    reader = EventReader(URL)
    events = [e for i in range(0, len(stream), size) for e in reader.feed(stream[i : i + size])]
    reader.close()
    return events


def test_our_own_key_is_for_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFYOPS_MODEL_API_KEY", raising=False)
    monkeypatch.setenv("DIFYOPS_API_KEY", "ours")
    for here in ("http://127.0.0.1:8090/v1", "http://localhost/v1", "http://[::1]:1/v1"):
        assert (key := key_for(here)) is not None and key.reveal() == "ours"
    for there in (URL, "http://127.0.0.1.example/v1", "https://api.example/v1"):
        assert key_for(there) is None
    monkeypatch.setenv("DIFYOPS_MODEL_API_KEY", "theirs")
    for url in ("http://127.0.0.1:8090/v1", URL):
        assert (key := key_for(url)) is not None and key.reveal() == "theirs"


@pytest.mark.parametrize(
    ("asked", "piped", "whole"),
    [
        (None, None, None),
        ("Sum up:", None, "Sum up:"),
        ("Sum up:", b"", "Sum up:"),
        ("Sum up:", b"a\nb\n", "Sum up:\n\na\nb"),
        (None, b" a\n", " a"),
    ],
)
def test_a_question_and_what_is_piped(
    asked: str | None, piped: bytes | None, whole: str | None
) -> None:
    assert question(asked, piped) == whole
    for nothing in ((None, b"\n"), (" ", None), ("", b" ")):
        with pytest.raises(UsageError, match="the question is empty"):
            question(*nothing)


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_events_however_the_bytes_are_cut(size: int) -> None:
    # U+2028 and U+0085 end a line for str.splitlines, and not for server-sent events.
    said = "å\u2028é\x85 😀"
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 9}}\r\n\r\n'
    stream = (
        b": a comment\nevent: x\n"
        + chunk(role="assistant", content=None)
        + chunk(reasoning_content="hm")
        + chunk(content=said)
        + b'data:{"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
        + usage
        + b"data: [DONE]\n\n"
    )
    events = read(stream, size)
    assert "".join(e.text for e in events) == said
    assert "".join(e.reasoning for e in events) == "hm"
    assert [e.finish for e in events if e.finish] == ["stop"]
    assert [(e.tokens, e.prompt_tokens) for e in events if e.tokens] == [(3, 9)]


@pytest.mark.parametrize("end", [b"", chunk(content="x"), b'data: {"choices": [], "usa'])
def test_an_end_that_is_none(end: bytes) -> None:
    with pytest.raises(DifyopsError, match="broke off"):
        read(chunk(content="a") + end, 50)


@pytest.mark.parametrize("data", [b"nonsense", b"[1]", b'"x"', b'{"choices": [7]}', b"\xff"])
def test_an_event_that_is_none(data: bytes) -> None:
    with pytest.raises(DifyopsError, match="unreadable"):
        read(b"data: " + data + b"\n\n", 50)


def test_an_error_in_the_stream_is_told() -> None:
    with pytest.raises(DifyopsError, match="the server is stopping"):
        read(b'data: {"error": {"message": "the server is\\n stopping"}}\n\n', 50)


@pytest.mark.parametrize(
    ("status", "headers", "error", "message", "hint", "loading"),
    [
        (401, {}, {"message": "no"}, "refuses the API key", "DIFYOPS_MODEL_API_KEY", False),
        (400, {}, {"code": "context_length_exceeded", "message": "9 of 8"}, "9 of 8", "/reset",
         False),
        (404, {}, {"code": "model_not_found", "message": "no x"}, "no x", "--model", False),
        (404, {}, {"message": "no route"}, "no route", "/v1", False),
        (429, {"retry-after": "7"}, {"message": "full"}, "is busy (429: full)", "in 7 s", False),
        (429, {}, None, "is busy (429)", "later", False),
        (503, {"retry-after": "1"}, {"message": "loading"}, "503: loading", "wait", True),
        (503, {}, {"code": "server_stopping", "message": "stopping"}, "stopping", None, False),
        (500, {}, None, "answered 500", None, False),
    ],
)  # fmt: skip
def test_refusals(
    status: int, headers: dict[str, str], error: object, message: str, hint: str | None,
    loading: bool,
) -> None:  # fmt: skip
    body = json.dumps({"error": error}).encode() if error else b"<html>"
    found = refusal(URL, status, headers, body)
    assert message in found.message
    assert "\n" not in found.message
    assert found.loading is loading
    assert (hint in (found.hint or "")) if hint else found.hint is None


@pytest.mark.parametrize("url", ["", "10.0.0.5:8000", "ftp://x/v1", "http://"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match="not an http or https URL"):
        connection(url, None)


def test_no_connection_is_reused_and_no_proxy_asked_on_loopback() -> None:
    assert connection(URL, None)["limits"].max_keepalive_connections == 0
    assert connection(URL, None)["trust_env"]
    assert not connection("http://127.0.0.1:1/v1", None)["trust_env"]


def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(UsageError) as caught:
        connection(URL, Secret("geheim\n"))
    assert "geheim" not in str(caught.value)


def test_speed_is_from_the_first_token_to_the_last() -> None:
    answer = Answer()
    for moment, event in [
        (2.0, Event(text="a")),
        (2.5, Event(text="bc")),
        (3.0, Event(finish="stop")),
        (9.0, Event(tokens=6)),
    ]:
        answer.add(event, moment)
    assert (answer.text, answer.finish, answer.tokens, answer.first) == ("abc", "stop", 6, 2.0)
    assert answer.tokens_per_second == pytest.approx(5 / 0.5)


def test_without_usage_events_are_counted() -> None:
    answer = Answer()
    answer.add(Event(reasoning="a"), 1.0)
    assert (answer.tokens, answer.tokens_per_second) == (1, None)
    answer.add(Event(text="b"), 1.5)
    assert answer.as_json("m")["tokens_exact"] is False
    assert answer.tokens_per_second == pytest.approx(2)
