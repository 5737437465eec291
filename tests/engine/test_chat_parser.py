"""What a model writes, cut anywhere, becomes the same content, reasoning and calls."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difyops.engine.toolcalls import ChatParser, convert
from difyops.engine.toolformats import Tool, ToolFormat, detect_format, detect_reasoning

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "scale": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"$ref": "#/$defs/place"},
            "note": {"type": ["string", "null"]},
        },
        "$defs": {"place": {"type": "object"}},
    },
)


@dataclass
class Joined:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)


def read(pieces: list[str], form: ToolFormat | None, **options: Any) -> Joined:
    ids = itertools.count()
    parser = ChatParser(form, [WEATHER], make_id=lambda: f"id{next(ids)}", **options)
    joined = Joined()
    deltas = [d for piece in pieces for d in parser.push(piece)] + parser.flush()
    for delta in deltas:
        joined.content += delta.content
        joined.reasoning += delta.reasoning
        assert bool(delta.content) + bool(delta.reasoning) + (delta.call is not None) == 1
        if (call := delta.call) is None:
            continue
        if call.id is not None:
            assert call.index == len(joined.calls) and call.name is not None
            joined.calls.append((call.id, call.name, ""))
        assert call.index == len(joined.calls) - 1
        number, name, arguments = joined.calls[-1]
        joined.calls[-1] = (number, name, arguments + call.arguments)
    return joined


HERMES = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a}\\"</tool_call>"}}\n</tool_call>'
)
CODER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nSão\nPaulo\n\n</parameter>\n"
    '<parameter=days>\n3\n</parameter>\n<parameter=tags>\n["x", "y"]\n</parameter>\n'
    "</function>\n</tool_call>"
)


def test_without_markers_every_byte_is_content() -> None:
    text = " \n a <b> {\n} <think>no</think> \n\n"
    for form in (None, "hermes", "qwen3_coder"):
        assert read([text], form) == Joined(content=text)
    assert read([text], "hermes", reasoning=True) == Joined(content=text)


def test_reasoning_is_split_off() -> None:
    text = "<think>\nwhy\n\nnot\n</think>\n\nBecause.\n"
    assert read([text], None, reasoning=True) == Joined("Because.\n", "why\n\nnot")
    assert read([text[8:]], None, inside=True) == Joined("Because.\n", "why\n\nnot")
    assert read([text], None, inside=True) == Joined("Because.\n", "why\n\nnot")
    assert read(["<think>cut"], None, reasoning=True) == Joined("", "cut")
    assert read(["<thi"], None, reasoning=True) == Joined("<thi")


def test_hermes_streams_arguments() -> None:
    parser = ChatParser("hermes")
    parser.push('I look.\n<tool_call>\n{"name": "f", "arguments": ')
    first = parser.push('{"a": [1')
    assert first[0].call is not None and first[0].call.name == "f"
    assert first[1].call is not None and first[1].call.arguments == '{"a": [1'
    (second,) = parser.push(", 2]}")
    assert second.call is not None and second.call.arguments == ", 2]}"
    assert parser.push("}\n</tool_call>") == [] and parser.flush() == []


def test_hermes_calls() -> None:
    joined = read([f"Look:\n{HERMES}\n{HERMES}\n"], "hermes")
    assert joined.content == "Look:"
    assert [name for _, name, _ in joined.calls] == ["get_weather"] * 2
    assert joined.calls[0][0] != joined.calls[1][0]
    assert json.loads(joined.calls[1][2]) == {"city": 'a}"</tool_call>'}


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', {"a": 1}),
        ('{"name": "f"}', {}),
        ('{"name":"f","arguments":{}}', {}),
        (' {"name" : "f" , "arguments" : {"é": "\\u00e9"} } ', {"é": "é"}),
    ],
)
def test_hermes_written_otherwise(inside: str, arguments: Any) -> None:
    joined = read([f"<tool_call>{inside}</tool_call>"], "hermes")
    assert joined.content == "" and joined.calls[0][1] == "f"
    assert json.loads(joined.calls[0][2]) == arguments


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json\n</tool_call>",
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call> and more',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "argu',
        "<tool_call",
        "a <tool_call></tool_call> b <tool_call>",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
def test_what_is_no_call_is_content(text: str, form: ToolFormat) -> None:
    assert read([text], form) == Joined(content=text)
    assert read([*text[:200], text[200:]], form) == Joined(content=text)


def test_a_call_cut_short_keeps_what_was_written() -> None:
    joined = read(['<tool_call>\n{"name": "f", "arguments": {"a": "b'], "hermes")
    assert joined.calls[0][1:] == ("f", '{"a": "b')
    joined = read(["<tool_call>\n<function=f>\n<parameter=a>\nb"], "qwen3_coder")
    assert joined.calls[0][1:] == ("f", "{") and joined.content == "\n<parameter=a>\nb"


def test_text_after_the_arguments_is_not_lost() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}, "x": 1}</tool_call>'
    joined = read([text], "hermes")
    assert joined.calls[0][1:] == ("f", "{}") and joined.content == ', "x": 1}'


def test_coder_converts_by_the_schema() -> None:
    joined = read([f"Sure.\n\n{CODER}"], "qwen3_coder")
    assert joined.content == "Sure."
    assert json.loads(joined.calls[0][2]) == {
        "city": "São\nPaulo\n",
        "days": 3,
        "tags": ["x", "y"],
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", "12", "12"),
        ("city", "", ""),
        ("city", " null", " null"),
        ("days", "12", 12),
        ("days", "1.5", "1.5"),
        ("days", "twelve", "twelve"),
        ("scale", "1e3", 1000.0),
        ("scale", "NaN", "NaN"),
        ("scale", "null", None),
        ("exact", "True", True),
        ("exact", "1", "1"),
        ("where", '{"a": 1}', {"a": 1}),
        ("note", "null", None),
        ("note", '"quoted"', '"quoted"'),
        ("note", "5", "5"),
        ("unheard of", "[1]", [1]),
        ("unheard of", "plain", "plain"),
    ],
)
def test_a_parameters_text_has_its_schemas_type(name: str, text: str, value: Any) -> None:
    schema = WEATHER.parameters["properties"].get(name, {})
    got = convert(text, schema, WEATHER.parameters)
    assert got == value and type(got) is type(value)


_PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", '{"name": "get_weather", ',
    '"arguments": ', '{"city": "x"}', "}", "{", '"', "<function=get_weather>", "</function>",
    "<parameter=city>", "<parameter=days>", "</parameter>", "7", "text", "<", "\\", HERMES, CODER,
]  # fmt: skip


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from(_PIECES), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=30),
    form=st.sampled_from([None, "hermes", "qwen3_coder"]),
    reasoning=st.booleans(),
    inside=st.booleans(),
)
def test_cutting_changes_nothing(
    parts: list[str], cuts: list[int], form: ToolFormat | None, reasoning: bool, inside: bool
) -> None:
    text = "".join(parts)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    whole = read([text], form, reasoning=reasoning, inside=inside)
    assert read(pieces, form, reasoning=reasoning, inside=inside) == whole
    assert read(list(text), form, reasoning=reasoning, inside=inside) == whole


def test_the_format_is_in_the_template() -> None:
    hermes = "{% if tools %}Answer with <tool_call>{json}</tool_call>{% endif %}"
    coder = "{% if tools %}<tool_call><function=name>{% endif %}{{ '</think>' }}"
    assert detect_format(hermes) == "hermes" and not detect_reasoning(hermes)
    assert detect_format(coder) == "qwen3_coder" and detect_reasoning(coder)
    assert detect_format("{{ messages }}") is None and detect_format(None) is None
    assert not detect_reasoning(None)
