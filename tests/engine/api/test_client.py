"""The real `openai` client against the real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.serving.conftest import fetched

from .conftest import CONTEXT, HI, KEY, MODEL, Local

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "…",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Paris"]}, "days": {"type": "boolean"}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "news")
]


class Answer(pydantic.BaseModel):
    size: Literal["small", "large"]
    sure: bool


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": HI, "max_tokens": 12, "seed": 5} | fields
    )


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        whole.choices[0].finish_reason
    )
    assert {(c.id, c.model, c.object) for c in chunks} == {
        (chunks[0].id, MODEL, "chat.completion.chunk")
    }
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_without_asking_a_stream_has_no_usage(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "usage" not in answer.text and answer.text.endswith("data: [DONE]\n\n")


def test_a_seed_repeats_and_another_one_does_not(client: openai.OpenAI) -> None:
    texts = [chat(client, seed=s).choices[0].message.content for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    fresh = {chat(client, seed=None).choices[0].message.content for _ in range(3)}
    assert len(fresh) == 3


def test_temperature_0_needs_no_seed(client: openai.OpenAI) -> None:
    texts = {chat(client, seed=s, temperature=0).choices[0].message.content for s in (1, 2)}
    assert len(texts) == 1


def test_a_model_may_recommend_how_to_sample(start: Callable[..., Local]) -> None:
    """Greedy where a request says nothing, and what it says where it does."""
    server = start(sampling={"temperature": 0})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        silent = {chat(client, seed=s).choices[0].message.content for s in (1, 2)}
        asked = {chat(client, seed=s, temperature=1).choices[0].message.content for s in (1, 2)}
    assert (len(silent), len(asked)) == (1, 2)


def test_several_choices_differ_and_are_interleaved(client: openai.OpenAI) -> None:
    whole = chat(client, n=3, extra_body={"ignore_eos": True})
    assert [c.index for c in whole.choices] == [0, 1, 2]
    texts = [c.message.content for c in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 36
    # The first is what n=1 says: a seed names one answer.
    assert texts[0] == chat(client, extra_body={"ignore_eos": True}).choices[0].message.content
    streamed = dict.fromkeys(range(3), "")
    order, ends = [], []
    for chunk in chat(client, n=3, stream=True, extra_body={"ignore_eos": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            order.append(choice.index)
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert list(streamed.values()) == texts and ends == ["length"] * 3
    assert order != sorted(order)


def test_stop_strings(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 40, "extra_body": {"ignore_eos": True}}
    text = chat(client, **fields).choices[0].message.content
    stop = text[8:10]
    for given in (stop, ["\u2603", stop]):
        answer = chat(client, stop=given, **fields).choices[0]
        assert answer.finish_reason == "stop"
        assert answer.message.content == text[: text.index(stop)]
    streamed = chat(client, stop=stop, stream=True, **fields)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == text[: text.index(stop)]


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "temperature": 0}
    entries = chat(client, **fields).choices[0].logprobs.content
    for entry in entries:
        best = entry.top_logprobs[0]
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (best.token, best.logprob)
        assert entry.logprob <= 0 and bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    streamed = [
        entry
        for chunk in chat(client, stream=True, **fields)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    # A prompt may be read anew or its state be there, a token be guessed or not: in float32 that
    # changes the last bits of a score.
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    near = pytest.approx([entry.logprob for entry in entries], abs=1e-4)
    assert [entry.logprob for entry in streamed] == near
    plain = chat(client, logprobs=True).choices[0].logprobs.content
    assert plain and all(entry.top_logprobs == [] for entry in plain)
    assert chat(client).choices[0].logprobs is None


def test_completions(client: openai.OpenAI) -> None:
    def complete(**fields: Any) -> Any:
        return client.completions.create(
            **{"model": MODEL, "prompt": "A slot", "max_tokens": 6, "temperature": 0} | fields
        )

    whole = complete(logprobs=2)
    streamed = list(complete(logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in streamed if c.choices) == whole.choices[0].text
    assert streamed[-1].usage == whole.usage
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == whole.usage.completion_tokens
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0
    assert complete(echo=True).choices[0].text == "A slot" + complete().choices[0].text
    both = complete(prompt=["A slot", "is free"], n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == complete().choices[0].text
    assert both.choices[2].text == complete(prompt="is free").choices[0].text
    assert complete(prompt=[5, 6, 7]).usage.prompt_tokens == 3
    assert complete(max_tokens=None).usage.completion_tokens <= 16


def test_a_bias_decides(client: openai.OpenAI, server: Local) -> None:
    (token,) = server.llm.tokenizer.encode("x")
    answer = chat(client, logit_bias={str(token): 100}, max_tokens=5)
    assert answer.choices[0].message.content == "xxxxx"


@pytest.mark.parametrize("choice", ["required", "news"])
def test_tools_that_must_be_called(client: openai.OpenAI, choice: str) -> None:
    named = {"type": "function", "function": {"name": choice}}
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": choice if choice == "required" else named,
        "max_tokens": 200,
        "parallel_tool_calls": False,
    }
    answer = chat(client, **fields).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.id and call.function.name in ({"weather", "news"} if choice != "news" else {"news"})
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Oslo", "Paris") and isinstance(arguments["days"], bool)

    pieces: list[Any] = []
    for chunk in chat(client, stream=True, **fields):
        pieces += chunk.choices[0].delta.tool_calls or []
        end = chunk.choices[0].finish_reason
    assert end == "tool_calls"
    assert pieces[0].id and pieces[0].function.name == call.function.name
    assert len(pieces) > 2
    assert "".join(p.function.arguments or "" for p in pieces) == call.function.arguments


def test_the_conversation_goes_on_after_a_call(client: openai.OpenAI) -> None:
    first = chat(client, tools=TOOLS, tool_choice="required", max_tokens=200)
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": c.id, "content": "rain"} for c in message.tool_calls
    ]
    after = chat(client, messages=[*HI, message, *results], tools=TOOLS)
    assert after.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_schema_is_parsed(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model=MODEL, messages=HI, response_format=Answer, max_tokens=100, seed=seed
        )
        assert isinstance(answer.choices[0].message.parsed, Answer)
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, lambda t: len(t) == 6 and t[:3].isdigit()),
        ({"choice": ["yes", "no"]}, lambda t: t in ("yes", "no")),
        ({"json": {"type": "array", "items": {"type": "null"}, "maxItems": 3}}, json.loads),
    ],
)
def test_structured_outputs(client: openai.OpenAI, wanted: Any, right: Any) -> None:
    extra = {"structured_outputs": wanted}
    answer = chat(client, extra_body=extra, max_tokens=100).choices[0]
    assert right(answer.message.content) is not False and answer.finish_reason == "stop"
    text = client.completions.create(model=MODEL, prompt="?", max_tokens=100, extra_body=extra)
    assert right(text.choices[0].text) is not False


def test_json_object(client: openai.OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=300).choices[0]
    text = answer.message.content
    assert text.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_reasoning_has_both_names(client: openai.OpenAI, server: Local) -> None:
    tokens = server.llm.tokenizer.encode("</think>")
    extra = {"chat_template_kwargs": {"think": True}, "structured_outputs": {"choice": ["yes"]}}
    # The reasoning is free and never ends by itself here: it fills max_tokens.
    answer = chat(client, extra_body=extra, max_tokens=len(tokens) + 5).choices[0]
    assert answer.finish_reason == "length" and not answer.message.content
    assert answer.message.reasoning_content == answer.message.reasoning
    assert answer.message.reasoning
    deltas = [c.choices[0].delta for c in chat(client, extra_body=extra, stream=True, max_tokens=9)]
    assert any(getattr(d, "reasoning", None) for d in deltas)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.to_dict() == client.models.retrieve(MODEL).to_dict()
    shown = model.to_dict()
    assert (shown["context_length"], shown["max_model_len"]) == (CONTEXT, CONTEXT)
    assert shown["tools"] is True
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_errors_have_the_clients_types(client: openai.OpenAI, server: Local) -> None:
    with pytest.raises(openai.NotFoundError, match="the models are: tiny"):
        chat(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, verbosity="high")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "verbosity")
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as other,
    ):
        chat(other)
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert KEY not in httpx.get(f"{server.url}/health").text


def test_embeddings(start: Callable[..., Local], tmp_path: Path) -> None:
    files = fetched("minilm-l6", tmp_path)
    local = start(
        embedding={
            "id": "minilm",
            "model": str(files["weights"]),
            "tokenizer": str(files["tokenizer"]),
            "max_tokens": 256,
        }
    )
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key=KEY, max_retries=0) as client:
        answer = client.embeddings.create(model="minilm", input=["a slot", "a slot", "the sea"])
        a, b, c = (item.embedding for item in answer.data)
        assert a == b != c and len(a) == 384
        assert [m.id for m in client.models.list()] == [MODEL, "minilm"]
        with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
            chat(client, model="minilm")
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            client.embeddings.create(model=MODEL, input="x")
