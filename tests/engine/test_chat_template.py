"""Prompts are what transformers makes of the same template."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from difyops.engine.chat import ChatTemplate
from difyops.engine.toolformats import detect_format, detect_reasoning, starts_inside

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A ChatML template that speaks up when there is no system message, as small chat models have it.
GREETING = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Tools as lines of JSON, calls as JSON between tags.
HERMES = """\
{%- if tools %}
    <|im_start|>system
You may call these:
    {%- for tool in tools %}
{{ tool | tojson }}
    {%- endfor %}
Write <tool_call>{"name": …, "arguments": …}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- "\\n<tool_call>\\n" }}
            {{- {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
            {{- "\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

# Reasoning of older turns is dropped, parameters stand in tags, thinking can be turned off.
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if ns.last < 0 %}
    {{- raise_exception("somebody has to ask: " ~ (messages | length) ~ " messages, no user") }}
{%- endif %}
{%- macro shown(tool) %}{{ tool.function.name }}({{ tool.function.parameters | tojson(indent=2) }})
{%- endmacro %}
{{- bos_token }}
{%- if tools is iterable and tools | length > 0 %}
    {{- "<|im_start|>system\\n" }}
    {%- for tool in tools %}{{ shown(tool) }}{% endfor %}
    {{- "\\n<tool_call>\\n<function=name>\\n<parameter=key>\\n…\\n</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" ~ message["role"] ~ "\\n" }}
    {%- set content = message.content if message.content is string else "" %}
    {%- if "</think>" in content and loop.index0 < ns.last %}
        {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {{- content | trim }}
    {%- for call in message.tool_calls or [] %}
        {{- "\\n<tool_call>\\n<function=" ~ call.function.name ~ ">\\n" }}
        {%- for key, value in call.function.arguments | items %}
            {{- "<parameter=" ~ key ~ ">\\n" }}
            {{- value if value is string else value | tojson }}
            {{- "\\n</parameter>\\n" }}
        {%- endfor %}
        {{- "</function>\\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- else %}
        {{- "<think>\\n" }}
    {%- endif %}
{%- endif %}
"""

TOOL = {
    "type": "function",
    "function": {
        "name": "wetter",
        "description": "it's <b>höher</b> & 'besser'",
        "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
    },
}
CALLING: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is Köln?  \n"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "wetter", "arguments": {"ort": "Köln", "tage": [1, 2]}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain & <wind>"},
    {"role": "tool", "tool_call_id": "call_1", "content": "more"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nRain."},
    {"role": "user", "content": "And now?"},
]
PLAIN = [{"role": "user", "content": "Hi\n"}]


@pytest.mark.parametrize("template", [CHATML, GREETING, HERMES, THINKING])
@pytest.mark.parametrize("messages", [PLAIN, CALLING])
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("prompted", [True, False])
def test_prompts_are_those_of_transformers(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    kwargs: dict[str, Any],
    prompted: bool,
) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompted,
        **special,
        **kwargs,
    )
    made = ChatTemplate(template, special)
    got = made.render(messages, tools=tools, add_generation_prompt=prompted, kwargs=kwargs)
    assert got == expected


def test_detection_by_template_and_prompt() -> None:
    assert [detect_format(t) for t in (CHATML, HERMES, THINKING)] == [None, "hermes", "qwen3_coder"]
    assert [detect_reasoning(t) for t in (CHATML, HERMES, THINKING)] == [False, False, True]
    template = ChatTemplate(THINKING)
    assert starts_inside(template.render(PLAIN))
    assert not starts_inside(template.render(PLAIN, kwargs={"enable_thinking": False}))


def test_arguments_as_the_api_has_them() -> None:
    """In a request they are a string of JSON; templates expect the object."""
    given = [{**m} for m in CALLING]
    function = {"name": "wetter", "arguments": '{"ort": "Köln", "tage": [1, 2]}'}
    given[2] = {**given[2], "content": None, "tool_calls": [{"function": function}]}
    template = ChatTemplate(HERMES)
    assert template.render(given, tools=[TOOL]) == template.render(CALLING, tools=[TOOL])
    assert function["arguments"] == '{"ort": "Köln", "tage": [1, 2]}'


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    template = ChatTemplate(CHATML)
    joined = template.render([{"role": "user", "content": "a b"}])
    assert template.render([{"role": "user", "content": parts}]) == joined


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"content\[0\].*'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], r"content\[1\].*'input_audio'"),
        ([{"type": "text"}], r"content\[0\].*'text'"),
        (["a"], r"content\[0\].*'str'"),
        (3, r"messages\[1\]\.content"),
    ],
)
def test_what_is_not_text_is_named(content: Any, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        ChatTemplate(CHATML).render([*PLAIN, {"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (THINKING, "chat template: somebody has to ask: 1 messages, no user"),
        ("{{ messages[0].content.nothing.more }}", "no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "fails on these messages"),
        ("{{ 1 // 0 }}", "fails on these messages"),
        ("{{ messages.append(1) }}", "not safe|not allowed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|not allowed"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big|fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on these messages"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ],
)
def test_a_template_that_fails_says_why(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ChatTemplate(template, {"bos_token": ""}).render([{"role": "system", "content": "x"}])


def test_a_template_that_is_not_jinja_names_its_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("\n{% if %}")


def test_the_requests_own_fields_are_not_kwargs() -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs: tools"):
        ChatTemplate(CHATML).render(PLAIN, kwargs={"tools": []})


def test_the_clock() -> None:
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(PLAIN)
    assert re.fullmatch(r"2\d{3}-\d\d-\d\d", text)
