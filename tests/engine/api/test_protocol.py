"""Every field that OpenAI's own types have is honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as text
from openai.types.chat import completion_create_params as chat

from difyops.engine import intake
from difyops.engine.chat import ChatTemplate
from difyops.engine.protocol import ChatRequest, CompletionRequest, parse
from difyops.serving.errors import ApiError
from difyops.serving.http import json_object

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {}, "strict": True, "description": "an x"},
}

COMMON: dict[str, list[Any]] = {
    "model": ["m"],
    "frequency_penalty": [1.5, -2],
    "logit_bias": [{"5": -100}],
    "max_tokens": [1],
    "n": [2],
    "presence_penalty": [-1],
    "seed": [-5, 0],
    "stop": ["x", ["x", "y"], []],
    "stream": [True, False],
    "temperature": [0, 2.0],
    "top_p": [0.5, 0],
    "user": ["u"],
}
#: Field -> values that are accepted.
CHAT_HONOURED = COMMON | {
    "messages": [HI],
    "logprobs": [True, False],
    "max_completion_tokens": [5],
    "metadata": [{"a": "b"}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "prompt_cache_key": ["k"],
    "reasoning_effort": ["low"],
    "response_format": [FORMAT, {"type": "text"}, {"type": "json_object"}],
    "safety_identifier": ["s"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "stream_options": [{"include_usage": True}],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[TOOL]],
    "top_logprobs": [20],
}
#: Field -> a value that OpenAI takes and we refuse.
CHAT_REFUSED: dict[str, Any] = {
    "audio": {"format": "mp3", "voice": "a"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "web_search_options": {},
}
TEXT_HONOURED = COMMON | {
    "prompt": ["a", ["a", "b"], [1, 2], [[1], [2]]],
    "echo": [True],
    "logprobs": [0, 5],
    "stream_options": [{"include_usage": True}],
}
TEXT_REFUSED: dict[str, Any] = {"best_of": 3, "suffix": "x"}
#: What a field needs beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
}


def openais(*types: Any) -> set[str]:
    return {name for kind in types for name in kind.__annotations__}


def body(kind: type[Any], **fields: Any) -> dict[str, Any]:
    base = {"messages": HI} if kind is ChatRequest else {"prompt": "a"}
    return {"model": "m"} | base | fields


def refusal(kind: type[Any], fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, fields)
    assert caught.value.status == 400
    return caught.value


def test_no_field_of_openais_is_forgotten() -> None:
    fields = openais(chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming)
    assert fields == CHAT_HONOURED.keys() | CHAT_REFUSED.keys()
    fields = openais(text.CompletionCreateParamsNonStreaming, text.CompletionCreateParamsStreaming)
    assert fields == TEXT_HONOURED.keys() | TEXT_REFUSED.keys()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, field, value)
        for kind, table in ((ChatRequest, CHAT_HONOURED), (CompletionRequest, TEXT_HONOURED))
        for field, values in table.items()
        for value in values
    ],
)
def test_honoured(kind: type[Any], field: str, value: Any) -> None:
    asked = parse(kind, body(kind, **BESIDE.get(field, {}), **{field: value}))
    assert getattr(asked, field) is not None


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, *item)
        for kind, table in ((ChatRequest, CHAT_REFUSED), (CompletionRequest, TEXT_REFUSED))
        for item in [*table.items(), ("nonsense", 1), ("best_of_all", None)]
    ],
)
def test_refused_by_name(kind: type[Any], field: str, value: Any) -> None:
    error = refusal(kind, body(kind, **{field: value})).body["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    if field in {**CHAT_REFUSED, **TEXT_REFUSED}:
        parse(kind, body(kind, **{field: None}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages.0"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.type",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"messages": HI * 8193}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"1\n": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs"),
        ({"tools": [TOOL], "response_format": FORMAT}, "response_format"),
        ({"tools": []}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools.0.function.parameters",
        ),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "enable_thinking"),
        (
            {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}},
            "enable_thinking",
        ),
        ({"reasoning_format": "none"}, "reasoning_format"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ],
)
def test_a_wrong_value_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(ChatRequest, body(ChatRequest, **fields)).body["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_wrong_completion_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(CompletionRequest, body(CompletionRequest, **fields))
    assert error.body["error"]["param"] == param


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"stop": "\xff"}', "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"tools": [{"a": "\\ud800"}]}', "invalid_value"),
        (b'{"a": "\\uDFff"}', "invalid_value"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_json"),
    ],
)
def test_a_body_that_is_no_json_object(sent: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        json_object(sent)
    assert caught.value.status == 400 and caught.value.body["error"]["code"] == code
    json.dumps(caught.value.body).encode()  # the answer itself can be sent


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
EFFORT = "{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("template", "fields", "given"),
    [
        (SWITCH, {}, {}),
        (SWITCH, {"enable_thinking": False}, {"enable_thinking": False}),
        (SWITCH, {"thinking": {"type": "enabled"}}, {"enable_thinking": True}),
        # As Dify's provider sends them, all at once.
        (
            SWITCH,
            {
                "enable_thinking": False,
                "thinking": {"type": "disabled"},
                "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
                "reasoning_format": "deepseek",
            },
            {"enable_thinking": False},
        ),
        ("{% if thinking %}{% endif %}", {"enable_thinking": True}, {"thinking": True}),
        ("it never reasons", {"chat_template_kwargs": {"thinking": False}}, {}),
        ("<think></think>", {"enable_thinking": True}, {}),
        (EFFORT, {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        (
            EFFORT,
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}},
            {"reasoning_effort": "low"},
        ),
        ("it never reasons", {"thinking": {"type": "enabled"}}, "enable_thinking"),
        ("<think> thinking </think>", {"enable_thinking": False}, "enable_thinking"),
        (
            EFFORT,
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort",
        ),
    ],
)
def test_a_switch_has_the_templates_name(
    template: str, fields: dict[str, Any], given: dict[str, Any] | str
) -> None:
    asked = parse(ChatRequest, body(ChatRequest, **fields))
    if isinstance(given, dict):
        assert intake.template_kwargs("m", asked, ChatTemplate(template)) == given
        return
    with pytest.raises(ApiError) as caught:
        intake.template_kwargs("m", asked, ChatTemplate(template))
    assert caught.value.body["error"]["param"] == given
