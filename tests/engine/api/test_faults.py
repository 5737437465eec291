"""Bad input, clients that leave, full queues, many at once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from difyops.engine.request import Request, SamplingParams

from .conftest import CONTEXT, HI, KEY, MODEL, Local, until

Start = Callable[..., Local]
LONG = {"model": MODEL, "messages": HI, "ignore_eos": True, "seed": 1}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def used(local: Local) -> int:
    stats = local.engine.stats()
    return stats.slots - stats.free_slots


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(server: Local, stream: bool) -> None:
    with server.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/chat/completions", json=LONG | {"stream": stream, "n": 2}, timeout=0.4
        ) if not stream else _read_a_little(client)
    steps = server.engine.stats().counters.steps
    until(server.free, 3, server.engine.stats)
    # Not when the context was full; how soon, the operating system's sockets decide.
    assert server.engine.stats().counters.steps - steps < 300
    assert 'difyops_choices_total{finish="cancelled"}' in metrics(server)


def test_a_cancelled_request_is_in_no_further_step(server: Local) -> None:
    text = server.llm.tokenizer.stream()
    request = Request([5], SamplingParams(max_tokens=CONTEXT - 1), text)
    server.engine.submit(request, lambda _: None)
    until(lambda: request.count > 3, 5)
    server.engine.cancel(request)
    steps = server.engine.stats().counters.steps
    until(server.free, 3, server.engine.stats)
    # The step that ran when it was cancelled, and no other.
    assert server.engine.stats().counters.steps - steps <= 1


def _read_a_little(client: httpx.Client) -> None:
    body = LONG | {"stream": True, "n": 2}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
    raise httpx.ReadTimeout("left on purpose")


def metrics(local: Local) -> str:
    with local.http() as client:
        return client.get("/metrics").text


def test_a_full_queue_is_429_and_the_rest_goes_on(start: Start) -> None:
    local = start(slots=1, max_waiting=1)
    ended: list[int] = []

    def ask() -> None:
        with local.http() as client:
            body = LONG | {"max_tokens": 300}
            ended.append(client.post("/v1/chat/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for count, thread in enumerate(threads):
        thread.start()
        until(lambda c=count: used(local) + local.engine.stats().waiting > c, 5)
    with local.http() as client:
        answer = client.post("/v1/chat/completions", json=LONG)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["code"] == "queue_full"
    for thread in threads:
        thread.join(30)
    assert ended == [200, 200]
    until(local.free, 5)


def test_all_of_a_requests_choices_are_queued_or_none(start: Start) -> None:
    local = start(slots=1, max_waiting=4)
    before = samples(local)
    with local.http() as client:
        body = LONG | {"stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            answer = client.post("/v1/chat/completions", json=LONG | {"n": 5})
            assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
            assert local.engine.stats().waiting == 0
            # What was never taken in was not cancelled either.
            assert samples(local).items() - before.items() >= {
                (("requests_refused_total", "queue_full"), 1.0)
            }
            assert ("choices_total", "cancelled") not in samples(local)
    until(local.free, 5, local.engine.stats)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"messages": HI, "n": 6}, "n"),
        ("completions", {"prompt": "a", "n": 6}, "n"),
        ("completions", {"prompt": ["a"] * 6}, "prompt"),
    ],
)
def test_more_choices_than_an_idle_server_takes_are_no_429(
    start: Start, path: str, fields: dict[str, Any], param: str
) -> None:
    local = start(slots=2, max_waiting=3)
    with local.http() as client:
        answer = client.post(f"/v1/{path}", json={"model": MODEL} | fields)
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, param)
        assert "6 choices" in error["message"] and "at most 5" in error["message"]


def test_200_streams_at_once_lose_nothing(start: Start) -> None:
    local = start(slots=64, context=512)

    async def one(client: httpx.AsyncClient, seed: int) -> tuple[str, str, int]:
        body = {
            "model": MODEL, "messages": HI, "stream": True, "max_tokens": 8, "seed": seed,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        text, finish, tokens, done = "", "", 0, False
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    for choice in event["choices"]:
                        text += choice["delta"].get("content", "")
                        finish += choice["finish_reason"] or ""
                    tokens += (event["usage"] or {}).get("completion_tokens", 0)
        assert done
        return text, finish, tokens

    async def every(seeds: range) -> list[tuple[str, str, int]]:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            base_url=local.url, headers=headers, limits=limits, timeout=60
        ) as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in seeds)))

    together = asyncio.run(every(range(200)))
    assert [answer[1:] for answer in together] == [("length", 8)] * 200
    alone = [asyncio.run(every(range(seed, seed + 1)))[0] for seed in (0, 99, 199)]
    assert alone == [together[0], together[99], together[199]]
    until(local.free, 5)


def test_over_long_prompts_name_both_numbers(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "hi " * CONTEXT}]
    for stream in (False, True):
        answer = http.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": long, "stream": stream}
        )
        error = error_of(answer)
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert error["n_ctx"] == CONTEXT < error["n_prompt_tokens"]
        assert (
            str(CONTEXT) in error["message"] and str(error["n_prompt_tokens"]) in error["message"]
        )
    answer = http.post("/v1/completions", json={"model": MODEL, "prompt": [5] * CONTEXT})
    assert error_of(answer)["param"] == "prompt"
    body = {"model": MODEL, "prompt": [5] * 10, "max_tokens": CONTEXT - 9}
    error = error_of(http.post("/v1/completions", json=body))
    assert error["param"] == "max_tokens" and "10 tokens" in error["message"]
    assert str(CONTEXT) in error["message"] and f"at most {CONTEXT - 10} fit" in error["message"]


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_text_that_cannot_fit_is_refused_unread(
    server: Local, http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(server.llm.tokenizer, "encode", never)
    text = "é" * (CONTEXT * server.llm.longest_token // 2 + 1)
    fields = {"messages": [{"role": "user", "content": text}], "prompt": text}
    field = "messages" if path.startswith("chat") else "prompt"
    answer = http.post(f"/v1/{path}", json={"model": MODEL, field: fields[field]})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert (error["param"], error["n_ctx"]) == (field, CONTEXT)
    assert error["n_prompt_tokens"] > CONTEXT and "bytes" in error["message"]
    assert server.llm.longest_token == max(
        len(server.llm.tokenizer.token_bytes(i)) for i in range(server.llm.tokenizer.vocabulary)
    )


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("completions", b'{"prompt":[' + b"5," * 999_000 + b"5]}", 400),
        ("completions", b'{"prompt":[' + b"5," * 7_000_000 + b"5]}", 413),
        (
            "chat/completions",
            b'{"messages":[' + b'{"role":"user","content":"a"},' * 400_000 + b"{}]}",
            413,
        ),
        (
            "chat/completions",
            b'{"messages":[' + b'{"role":"user","content":"a"},' * 90_000 + b"{}]}",
            400,
        ),
        ("completions", b'{"prompt":[' + b"[5]," * 90_000 + b"[5]]}", 400),
        ("embeddings", b'{"input":[' + b"5," * 999_000 + b"5]}", 404),
    ],
)
def test_others_are_answered_while_a_large_body_is_read(
    server: Local, http: httpx.Client, path: str, content: bytes, status: int
) -> None:
    content = content.replace(
        b"{", b'{"model":"tiny",' if path != "embeddings" else b'{"model":"x",', 1
    )
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.http() as client:
            answers.append(client.post(f"/v1/{path}", content=content))

    thread = threading.Thread(target=ask)
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        began = time.monotonic()
        assert http.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - began)
    thread.join()
    assert answers[0].status_code == status, answers[0].text
    assert slowest < 1.5


def test_a_body_must_be_called_json(http: httpx.Client) -> None:
    """A web page cannot send that to another server without asking it first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        for path in ("chat/completions", "completions", "embeddings"):
            answer = http.post(
                f"/v1/{path}", content=b'{"model": "tiny"}', headers={"Content-Type": kind}
            )
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
            assert "Content-Type: application/json" in error["message"]
    kind = "Application/JSON; charset=utf-8"
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1})
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 200
    assert http.options("/v1/completions").status_code == 405


def test_a_full_context_ends_the_answer(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": [5] * (CONTEXT - 7), "max_tokens": 7, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"properties": {"a": {"not": {}}}}}}},
            "unsupported_parameter", "response_format", "/properties/a",
        ),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": {
                "name": "f", "parameters": {"properties": {"a": {"uniqueItems": True}}}}}]},
            "unsupported_parameter", "tools", "uniqueItems",
        ),
        ({"enable_thinking": False}, "unsupported_parameter", "enable_thinking", "always reasons"),
        ({"structured_outputs": {"regex": "("}}, "invalid_value", "structured_outputs", ""),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "invalid_value", "ignore_eos",
         ""),
        ({"logit_bias": {"999999": 1}}, "invalid_value", "logit_bias", "999999"),
        ({"chat_template_kwargs": {"shout": 1}}, "unsupported_parameter",
         "chat_template_kwargs.shout", "does not read it"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort", "not read it"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "messages", "messages"),
        ({"nonsense": 1}, "unsupported_parameter", "nonsense", "nonsense"),
        ({"stop": ["\ud800"]}, "invalid_value", "stop", "surrogate"),
        ({"model": "gpt"}, "model_not_found", "model", "tiny"),
        ({"model": None}, "invalid_value", "model", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(
    http: httpx.Client, fields: dict[str, Any], code: str, param: str, message: str
) -> None:
    body = {"model": MODEL, "messages": HI} | fields
    answer = http.post("/v1/chat/completions", content=json.dumps(body))
    error = error_of(answer)
    assert answer.status_code in (400, 404)
    assert (error["code"], error["param"]) == (code, param)
    assert message in error["message"]


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
def test_malformed_json(http: httpx.Client, path: str) -> None:
    answer = http.post(f"/v1/{path}", content=b'{"model":')
    assert answer.status_code == 400 and error_of(answer)["code"] == "invalid_json"
    assert http.get(f"/v1/{path}").status_code == 405
    assert http.get("/v1/nothing").status_code == 404


def samples(local: Local) -> dict[tuple[str, ...], float]:
    """/metrics: a name without its prefix, and the labels -> the value."""
    return {
        (sample.name.removeprefix("difyops_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics(local))
        for sample in family.samples
    }


def test_an_end_token_is_no_generated_token(start: Start) -> None:
    local = start()
    end = min(local.llm.tokenizer.stop_ids)
    with local.http() as client:
        body = {"model": MODEL, "messages": HI, "max_tokens": 500, "logit_bias": {str(end): 6}}
        answer = client.post("/v1/chat/completions", json=body | {"seed": 3}).json()
    until(local.free, 5)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert samples(local)["generated_tokens_total",] == answer["usage"]["completion_tokens"] > 0


def test_metrics_add_up(start: Start) -> None:
    local = start(slots=3)
    with local.http() as client:
        body = LONG | {"max_tokens": 9, "n": 2}
        usage = client.post("/v1/chat/completions", json=body).json()["usage"]
        client.post("/v1/chat/completions", json=body | {"bad": 1})
        until(local.free, 5)
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    seen = samples(local)
    assert seen["choices_total", "length"] == 2
    assert seen["requests_refused_total", "unsupported_parameter"] == 1
    assert seen["time_to_first_token_seconds_count",] == 1
    # Tokens that came together count once.
    assert 1 <= seen["inter_token_latency_seconds_count",] <= 16
    assert seen["request_duration_seconds_count",] == 1
    assert seen["generated_tokens_total",] == usage["completion_tokens"] == 18
    assert seen["prompt_tokens_total",] == 2 * usage["prompt_tokens"]
    assert (seen["slots",], seen["slots_used",], seen["requests_waiting",]) == (3, 0, 0)
    assert seen["state_bytes_per_slot",] == seen["state_bytes_per_slot_predicted",] > 0


def test_an_engine_that_fails_is_a_500_and_then_an_event(start: Start) -> None:
    local = start()
    with local.http() as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)

            def broken(*_: Any) -> Any:
                raise RuntimeError("planted")

            local.engine.model.step = broken  # type: ignore[method-assign]
            events = [line for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"
        local.engine.model.prefill = broken  # type: ignore[method-assign]
        answer = client.post("/v1/chat/completions", json=LONG | {"stream": True})
        assert answer.status_code == 500 and error_of(answer)["code"] == "engine_failed"
    until(local.free, 5)
