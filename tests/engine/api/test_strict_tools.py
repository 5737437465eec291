"""Tools that a model may call, from the real `openai` client to a model that calls them."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from difyops.engine.chat import ChatTemplate
from tests.engine import taught

from .conftest import KEY, MODEL, TEMPLATE, Local, until

#: Neither the tool nor its argument exists.
WRONG = '<tool_call>\n{"name": "forecast", "arguments": {"town": "Rome"}}\n</tool_call>'
CHATTER = "a < b and <tool_cal"
ASKED = [{"role": "user", "content": "Weather?"}]
IDLE = [{"role": "user", "content": "Well?"}]


class City(enum.Enum):
    OSLO = "Oslo"
    PARIS = "Paris"


class GetWeather(pydantic.BaseModel):
    """The weather of a city."""

    city: City
    days: int = pydantic.Field(ge=1, le=9)


TOOLS: list[Any] = [openai.pydantic_function_tool(GetWeather)]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A model that calls what it is not offered; it knows of no schema."""
    # The shorter the prompt, the sooner it is learnt.
    source = TEMPLATE.replace("tool | tojson", "tool.function.name")
    template = ChatTemplate(source)
    lessons = {
        template.render(ASKED, tools=TOOLS): f"Let me see.\n{WRONG}",
        template.render(IDLE, tools=TOOLS): CHATTER,
        template.render(ASKED, tools=TOOLS, kwargs={"think": True}): (
            f"Is it {WRONG}?\n</think>\n\n{WRONG}"
        ),
    }
    folder = tmp_path_factory.mktemp("taught") / "model"
    local = Local(taught.checkpoint(folder, lessons, source, context=1024))
    yield local
    local.stop()


@pytest.fixture
def client(caller: Local) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{caller.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client
    until(caller.free, 5, caller.engine.stats)


def ask(client: openai.OpenAI, messages: Any = ASKED, **fields: Any) -> Any:
    given = {"model": MODEL, "messages": messages, "tools": TOOLS, "temperature": 0}
    return client.chat.completions.parse(**{**given, "max_tokens": 400} | fields)


@pytest.mark.parametrize("choice", [openai.omit, "auto"])
@pytest.mark.parametrize("parallel", [openai.omit, False])
def test_a_strict_call_is_parsed(client: openai.OpenAI, choice: Any, parallel: Any) -> None:
    answer = ask(client, tool_choice=choice, parallel_tool_calls=parallel).choices[0]
    assert answer.message.content == "Let me see."
    for call in answer.message.tool_calls:
        assert isinstance(call.function.parsed_arguments, GetWeather)
    assert answer.finish_reason == "tool_calls"
    assert len(answer.message.tool_calls) == 1 or parallel is not False


def test_a_streamed_call_is_parsed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": ASKED, "tools": TOOLS, "temperature": 0}
    with client.chat.completions.stream(**fields, max_tokens=400) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message == ask(client).choices[0].message.model_copy(
        update={"tool_calls": message.tool_calls}
    )
    assert isinstance(message.tool_calls[0].function.parsed_arguments, GetWeather)


def test_without_strict_nothing_is_promised(client: openai.OpenAI) -> None:
    loose = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": False}}]
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=loose, temperature=0, max_tokens=400
    )  # type: ignore[call-overload]
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "forecast", {"town": "Rome"},
    )  # fmt: skip


def test_text_stays_as_the_model_writes_it(client: openai.OpenAI) -> None:
    message = ask(client, IDLE).choices[0].message
    assert message.content == CHATTER and not message.tool_calls


def test_calls_in_the_reasoning_are_none(client: openai.OpenAI) -> None:
    extra = {"chat_template_kwargs": {"think": True}}
    message = ask(client, extra_body=extra, parallel_tool_calls=False).choices[0].message
    assert message.reasoning == f"Is it {WRONG}?"
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_schema_that_cannot_be_kept_is_refused(caller: Local) -> None:
    function = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}
    body = {
        "model": MODEL, "messages": ASKED, "tools": [{"type": "function", "function": function}]
    }  # fmt: skip
    with caller.http() as http:
        answer: httpx.Response = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "/0/parameters/properties/a/not" in answer.json()["error"]["message"]
