"""Chat through the real `openai` client and raw HTTP, against the real process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from .conftest import CHAT, EMBED, KEY, Running, until

HI = [{"role": "user", "content": "Say hello."}]
LONG = {"model": CHAT, "messages": HI, "max_tokens": 900, "stream": True, "ignore_eos": True}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    url = f"{server.url()}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def test_blocking(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=HI, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content
    assert answer.model == CHAT
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8


def test_stream_has_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=CHAT, messages=HI, max_tokens=12, temperature=0, seed=1
    )
    chunks = list(
        client.chat.completions.create(
            model=CHAT,
            messages=HI,
            max_tokens=12,
            temperature=0,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert {c.model for c in chunks} == {CHAT}
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stream_is_not_buffered(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json=LONG | {"max_tokens": 100}) as answer:
        arrivals = [time.monotonic() for line in answer.iter_lines() if line.startswith("data:")]
    # The tokens are spread over the time it took to make them; a buffer would pile them up.
    middle = arrivals[len(arrivals) // 2]
    assert middle - arrivals[0] > 0.2 * (arrivals[-1] - arrivals[0])
    assert arrivals[-1] - arrivals[0] > 0.2


def test_models_tell_the_context_each_request_has(client: openai.OpenAI) -> None:
    chat, embedding = (m.to_dict() for m in client.models.list())
    # 1024 for each of two slots, and not 1024 or 2048 shared.
    assert (chat["id"], chat["context_length"], chat["max_model_len"]) == (CHAT, 1024, 1024)
    assert (embedding["id"], embedding["context_length"]) == (EMBED, 256)
    assert embedding["dimensions"] == 384
    assert chat["owned_by"] == "difyops"
    assert chat["tools"] is False
    assert "tools" not in embedding
    assert client.models.retrieve(CHAT).id == CHAT
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_over_long_prompt_names_both_numbers(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "hi " * 1500}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=CHAT, messages=long, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        body = caught.value.body
        assert isinstance(body, dict)
        assert body["n_ctx"] == 1024 and body["n_prompt_tokens"] > 1500
        assert "1024 tokens" in body["message"] and str(body["n_prompt_tokens"]) in body["message"]


def test_a_full_context_ends_the_answer_and_says_so(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/chat/completions",
        json={
            "model": CHAT,
            "messages": [{"role": "user", "content": "hi " * 900}],
            "ignore_eos": True,
        },
    ).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] <= 1024


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "gpt-4", "messages": HI}, 404, "model_not_found", "model"),
        ({"model": EMBED, "messages": HI}, 400, "model_not_supported", "model"),
        ({"messages": HI}, 400, "invalid_value", "model"),
        ({"model": 5, "messages": HI}, 400, "invalid_value", "model"),
        ({"model": CHAT}, 400, "invalid_value", "messages"),
        ({"model": CHAT, "messages": []}, 400, "invalid_value", "messages"),
        ({"model": CHAT, "messages": "hi"}, 400, "invalid_value", "messages"),
        ({"model": CHAT, "messages": HI, "temperature": "hot"}, 400, None, None),
        ({"model": CHAT, "messages": HI, "n": 9}, 400, None, None),
        (
            {"model": CHAT, "messages": HI, "tools": [{"type": "function"}]},
            400,
            "unsupported_parameter",
            "tools",
        ),
        (
            {
                "model": CHAT,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}
                        ],
                    }
                ],
            },
            400,
            "invalid_value",
            "messages",
        ),
    ],
)
def test_bad_requests(
    http: httpx.Client, body: dict[str, object], status: int, code: str | None, param: str | None
) -> None:
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"] and error["type"] == "invalid_request_error"
    if status == 404:
        assert CHAT in error["message"] and EMBED in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_malformed_json(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        answer = http.post(path, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_routes_and_methods(http: httpx.Client) -> None:
    for path in ("/v1/nope", "/", "/v1/chat/completions/"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    answer = http.get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


@pytest.mark.parametrize("chunked", [False, True])
def test_body_limit(http: httpx.Client, chunked: bool) -> None:
    piece = b"x" * (1 << 20)
    content = (piece for _ in range(17)) if chunked else piece * 17
    answer = http.post("/v1/chat/completions", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}"])
def test_the_key_is_required(server: Running, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/models", "/v1/nope"):
        answer = httpx.get(server.url() + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.url()}/health", headers=headers).status_code == 200


@pytest.mark.parametrize("during", ["answer", "prompt"])
def test_a_client_that_leaves_frees_its_slot(http: httpx.Client, during: str) -> None:
    """Both slots are taken by requests of several seconds; then their clients go."""
    took = time.monotonic()
    if during == "answer":
        for _ in range(2):
            with http.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                next(answer.iter_lines())
    else:
        prompt = [{"role": "user", "content": "word " * 950}]
        for content in ("a", "b"):
            with pytest.raises(httpx.ReadTimeout):
                http.post(
                    "/v1/chat/completions",
                    json={
                        "model": CHAT,
                        "messages": [{"role": "user", "content": content}, *prompt],
                    },
                    timeout=0.3,
                )
    took = time.monotonic()
    answer = http.post(
        "/v1/chat/completions", json={"model": CHAT, "messages": HI, "max_tokens": 2}
    )
    assert answer.status_code == 200
    # 900 tokens take about nine seconds alone, and eighteen for two.
    assert time.monotonic() - took < 5


def test_a_blocking_request_of_a_client_that_left_is_cancelled(
    http: httpx.Client, server: Running
) -> None:
    before = len(server.lines)
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=LONG | {"stream": False}, timeout=0.5)
    lines = until(lambda: [x for x in server.lines[before:] if "no answer" in x], 5)
    assert "POST /v1/chat/completions no answer" in lines[0]
    began = time.monotonic()
    body = {"model": CHAT, "messages": HI, "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert time.monotonic() - began < 4


def test_twenty_chats_at_once(http: httpx.Client) -> None:
    def ask(number: int) -> str:
        body = {"model": CHAT, "messages": HI, "max_tokens": 6, "stream": bool(number % 2)}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        if number % 2:
            assert answer.text.rstrip().endswith("data: [DONE]")
            return "stream"
        return str(answer.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(20)))


def test_the_log_has_one_line_a_request_and_no_secret(http: httpx.Client, server: Running) -> None:
    before = len(server.lines)
    prompt = "the password is xyzzy"
    http.get("/v1/models?secret=plugh")
    body = {"model": CHAT, "messages": [{"role": "user", "content": prompt}], "max_tokens": 2}
    http.post("/v1/chat/completions", json=body)
    http.post("/v1/embeddings", json={"model": EMBED, "input": prompt})
    http.get("/health")
    http.get("/v1/last")
    until(lambda: "/v1/last" in server.log, 5)
    lines = server.lines[before:]
    assert len(lines) == 4, lines
    assert not any(word in server.log for word in (KEY, "xyzzy", "plugh"))


def test_json_schema_is_obeyed(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = http.post(
        "/v1/chat/completions",
        json={
            "model": CHAT,
            "messages": HI,
            "max_tokens": 60,
            "temperature": 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            },
        },
    )
    assert isinstance(json.loads(answer.json()["choices"][0]["message"]["content"])["ok"], bool)
