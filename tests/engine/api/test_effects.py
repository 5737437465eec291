"""Nothing accepted is ignored: every field changes what the engine is asked, or the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from difyops.engine import lark
from difyops.engine.chat import ChatTemplate
from difyops.engine.grammar import Grammars
from difyops.engine.intake import Job, Llm, chat_job, completion_job
from difyops.engine.protocol import ChatRequest, CompletionRequest, parse
from difyops.engine.request import FinishReason, Output, SamplingDefaults
from difyops.engine.tokens import Tokenizer
from difyops.serving.errors import ApiError
from tests.engine import tiny
from tests.engine.test_chat_template import CHATML

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
#: It reads all that a request can say.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m | tojson }}"
    "{% endfor %}{{ enable_thinking }}{{ reasoning_effort }}{# <tool_call> #}"
)
#: Field -> the request without it, and a value of it.
EFFECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "n": ({}, 2),
    "speculate": ({}, False),
    "cache_salt": ({}, "mine"),
    "max_tokens": ({}, 3),
    "temperature": ({}, 0.5),
    "top_p": ({}, 0.5),
    "top_k": ({}, 5),
    "min_p": ({}, 0.5),
    "presence_penalty": ({}, 1),
    "frequency_penalty": ({}, 1),
    "repetition_penalty": ({}, 2),
    "logit_bias": ({}, {"5": 1}),
    "stop": ({}, "call"),
    "ignore_eos": ({}, True),
    "structured_outputs": ({}, {"regex": "a"}),
}
CHAT_EFFECTS = EFFECTS | {
    "messages": ({}, [{"role": "user", "content": "bye"}]),
    "seed": ({}, 8),
    "max_completion_tokens": ({}, 3),
    "logprobs": ({}, True),
    "top_logprobs": ({"logprobs": True}, 3),
    "response_format": ({}, {"type": "json_object"}),
    "tools": ({}, [TOOL]),
    "tool_choice": ({"tools": [TOOL, OTHER]}, "none"),
    "parallel_tool_calls": ({"tools": [TOOL]}, False),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "reasoning_effort": ({}, "low"),
    "enable_thinking": ({}, False),
    "thinking": ({}, {"type": "disabled"}),
}
TEXT_EFFECTS = EFFECTS | {
    "prompt": ({}, "bye"),
    "seed": ({}, 8),
    "echo": ({}, True),
    "logprobs": ({}, 2),
}
#: Field -> why nothing here changes with it.
HARMLESS = {
    "model": "names who answers",
    "stream": "the form of the same answer; test_client.py compares the two",
    "stream_options": "the usage beside the answer; test_client.py looks for it",
    "user": "a tag of an end user",
    "metadata": "tags",
    "safety_identifier": "a tag of an end user",
    "prompt_cache_key": "a hint; what is kept of prompts has its own keys",
    "store": "false alone: nothing is stored",
    "service_tier": "there is one",
    "modalities": "text alone, which is what is answered",
    "reasoning_format": "llama.cpp's names for what is done anyway",
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(tiny.tokenizer(), {"eos_token": tiny.END})


def llm(words: Tokenizer, template: str = TEMPLATE) -> Llm:
    grammars = Grammars(words.backend, words.vocabulary, words.stop_ids)
    engine = cast(Any, SimpleNamespace(context=4096))
    return Llm("m", engine, words, ChatTemplate(template), grammars, SamplingDefaults())


def seen(job: Job, words: Tokenizer) -> list[Any]:
    """What the engine is asked, and what becomes of the same output."""
    found: list[Any] = []
    for request, choice in zip(job.requests, job.choices, strict=True):
        mask = None if request.constraint is None else request.constraint.mask()
        text = "".join(map(request.text.push, words.encode(CALL * 2)))
        choice.push(Output(text, (1,), (), FinishReason.STOP))
        answer = choice.whole()
        for call in answer.get("message", {}).get("tool_calls", ()):
            del call["id"]
        asked = (request.prompt, request.sampling, request.speculate, request.salt)
        found.append((*asked, None if mask is None else mask.tobytes(), answer))
    return found


@pytest.mark.parametrize(
    ("kind", "field"),
    [(ChatRequest, field) for field in CHAT_EFFECTS]
    + [(CompletionRequest, field) for field in TEXT_EFFECTS],
)
def test_a_field_changes_something(words: Tokenizer, kind: type[Any], field: str) -> None:
    make: Any = chat_job if kind is ChatRequest else completion_job
    start = {"messages": HI} if kind is ChatRequest else {"prompt": "hi"}
    beside, value = (CHAT_EFFECTS if kind is ChatRequest else TEXT_EFFECTS)[field]
    body = {"model": "m", "seed": 7} | start | beside

    def result(fields: dict[str, Any]) -> list[Any]:
        model = llm(words)
        return seen(make(model, parse(kind, fields)), words)

    assert result(body) == result(body) != result(body | {field: value})


@pytest.mark.parametrize(
    ("kind", "effects"), [(ChatRequest, CHAT_EFFECTS), (CompletionRequest, TEXT_EFFECTS)]
)
def test_no_field_is_forgotten(kind: type[Any], effects: dict[str, Any]) -> None:
    taken = {n for n, info in kind.model_fields.items() if info.annotation is not type(None)}
    assert taken - HARMLESS.keys() == effects.keys()


@pytest.mark.parametrize(
    ("make", "body"),
    [
        (chat_job, {"messages": HI, "n": 5, "response_format": {"type": "json_object"}}),
        (chat_job, {"messages": HI, "n": 5, "tools": [TOOL], "tool_choice": "required"}),
        (completion_job, {"prompt": ["a", "b"], "n": 2, "structured_outputs": {"json": {}}}),
    ],
)
def test_a_grammar_is_written_once_for_all_choices(
    words: Tokenizer, make: Any, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    plain = lark.from_schema  # a tool's arguments are one, too
    monkeypatch.setattr(lark, "from_schema", lambda *a, **k: written.append(1) or plain(*a, **k))
    kind: Any = ChatRequest if make is chat_job else CompletionRequest
    job = make(llm(words), parse(kind, {"model": "m"} | body))
    assert len(job.requests) > 3 and len(written) == 1
    # Each has a place of its own in it.
    first, second = (request.constraint for request in job.requests[:2])
    before = second.mask().tobytes()
    first.advance(next(i for i in range(words.vocabulary) if _allows(first, i)))
    assert second.mask().tobytes() == before != first.mask().tobytes()


def _allows(constraint: Any, token: int) -> bool:
    return bool(constraint.mask()[token // 32] >> token % 32 & 1)


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CALLED = [*HI, {"role": "assistant", "tool_calls": CALLS}]
RESULT = {"role": "tool", "tool_call_id": "1", "name": "f", "content": "?"}
ONLY_TALK = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}"
    "{{ m.tool_calls }}{% endif %}{% endfor %}"
)
AS_A_WHOLE = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
BY_ITEMS = (
    "{% for m in messages %}{% for k, v in m.items() %}{{ k }}{{ v }}{% endfor %}{% endfor %}"
)
BY_MACRO = (
    "{% macro say(m) %}{{ m['na' + 'me'] }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}"
)
NEEDS_CALLS = (
    "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    "{{ raise_exception('no calls') }}{% endif %}{{ m.role }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "refused"),
    [
        (CHATML, [{**HI[0], "name": "ann"}], "messages.0.name"),
        (CHATML, [*HI, {"role": "developer", "content": "x", "name": "ann"}], "messages.1.name"),
        (CHATML, [*HI, {"role": "assistant", "content": "x", "name": "a"}], "messages.1.name"),
        (AS_A_WHOLE, [{**HI[0], "name": "ann"}], None),
        (BY_ITEMS, [{**HI[0], "name": "ann"}], None),
        (BY_MACRO, [{**HI[0], "name": "ann"}], None),
        (CHATML, CALLED, "messages.1.tool_calls"),
        (AS_A_WHOLE, [*CALLED, RESULT], None),
        (NEEDS_CALLS, CALLED, None),
        (ONLY_TALK, CALLED, None),
        (ONLY_TALK, [*CALLED, RESULT], "messages.2.content"),
        # Read as any other role; its name and id only say again what the call has said.
        (CHATML, [*HI, RESULT], None),
        # Clients send it back as they got it, and templates leave out what is over.
        (CHATML, [*HI, {"role": "assistant", "content": "x", "reasoning_content": "y"}], None),
    ],
)
def test_what_a_template_does_not_read_is_refused(
    words: Tokenizer, template: str, messages: list[dict[str, Any]], refused: str | None
) -> None:
    asked = parse(ChatRequest, {"model": "m", "messages": messages})
    if refused is None:
        assert chat_job(llm(words, template), asked).prompt_tokens
        return
    with pytest.raises(ApiError) as caught:
        chat_job(llm(words, template), asked)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"]) == (400, refused)
    assert error["code"] == "unsupported_parameter" and "does not read it" in error["message"]
