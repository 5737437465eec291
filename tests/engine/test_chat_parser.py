"""What a model writes, cut anywhere, becomes the same content, reasoning and calls."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difyops.engine.schemafacts import ANY
from difyops.engine.toolcalls import ChatParser, convert, parameter_types
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
            "ratio": {"type": "number", "allOf": [{}], "$ref": "#/$defs/whole"},
            "odd/~name": {"$ref": "#/$defs/a~1b~0c%25"},
        },
        "$defs": {
            "place": {"type": "object"},
            "whole": {"type": "integer"},
            "a/b~c%": {"type": "integer"},
        },
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
        ("scale", "1e999", "1e999"),
        ("unheard of", "[-1e999]", "[-1e999]"),
        ("ratio", "7", 7),
        ("ratio", "7.5", "7.5"),
        ("odd/~name", "7", 7),
        ("odd/~name", "x", "x"),
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
    got = convert(text, parameter_types([WEATHER])["get_weather"].get(name, ANY))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "schema",
    [
        5, {"type": [{}]}, {"type": 5}, {"type": []}, {"type": "text"}, {"enum": 5}, {"anyOf": 7},
        {"oneOf": {}}, {"$ref": 3}, {"$ref": "#nowhere"}, {"$ref": "#/properties/9"},
        {"anyOf": [[], None]}, {"$ref": "#/$defs/list/" + "9" * 5000},
    ],
)  # fmt: skip
def test_a_schema_of_any_shape_is_no_reason_to_fail(schema: Any) -> None:
    """Tools that are not strict bring what they like."""
    for parameters in ({"properties": {"a": schema}, "$defs": {"list": [1]}}, {"properties": 3}):
        parser = ChatParser("qwen3_coder", [Tool("f", parameters, strict=False)])
        call = "<tool_call><function=f><parameter=a>\n[1]\n</parameter></function></tool_call>"
        deltas = parser.push(call) + parser.flush()
        assert "".join(d.call.arguments for d in deltas if d.call is not None) == '{"a": [1]}'
        assert parser.complete(1)


@pytest.mark.timeout(10)
def test_types_are_read_in_bounded_time() -> None:
    """References that branch at every level: read by brute force, each of these takes hours."""
    loop = {"A": {"anyOf": [{"$ref": "#/$defs/A"}] * 400}}
    split = {
        f"A{i}": {"anyOf": [{"$ref": f"#/$defs/A{i + 1}"}] * 2, "oneOf": [{"$ref": "#"}] * 2}
        for i in range(200)
    }
    wide = {"A": {"anyOf": [{"anyOf": [{"type": "null"}] * 300}] * 300}}
    for defs in (loop, split, wide):
        one = {"$ref": f"#/$defs/{min(defs)}"}
        parameters = {"properties": {f"p{i}": one for i in range(50)}, "$defs": defs}
        types = parameter_types([Tool("f", parameters)] * 8)["f"]
        assert set(types) == set(parameters["properties"])
        assert types["p49"] == ANY
    few = {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}
    defs = {"A": {"anyOf": [{"const": 3}, {"enum": ["a"]}]}}
    types = parameter_types([Tool("f", {"properties": {"a": few}, "$defs": defs})])["f"]
    assert types["a"] == {"integer", "number", "string", "null"}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" + "x" * 150_000,
        '<tool_call>{"a": "' + "x" * 150_000,
        '<tool_call>{"name": "' + "x" * 150_000,
        '<tool_call>{"name": "f", "arguments": {}' + " " * 150_000,
        "<tool_call>" + " " * 150_000,
        "<tool_call><function=" + "x" * 150_000,
        "<tool_call><function=f>" + " " * 150_000,
        "<tool_call><function=f><parameter=" + "x" * 150_000,
        "<tool_call><function=f><parameter=a>" + "x" * 150_000,
        "a" + "\n" * 150_000,
        " " * 150_000,
    ],
)
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
def test_what_never_closes_takes_linear_time(text: str, form: ToolFormat) -> None:
    began = time.process_time()
    parser = ChatParser(form, reasoning=True)
    deltas = [d for i in range(0, len(text), 4) for d in parser.push(text[i : i + 4])]
    deltas += parser.flush()
    assert time.process_time() - began < 2.5
    joined = "".join(d.content if d.call is None else d.call.arguments for d in deltas)
    assert len(joined) >= 149_990 or "arguments" in text or "function=f" in text


def test_text_that_is_no_call_does_not_wait_for_the_end() -> None:
    for form in ("hermes", "qwen3_coder"):
        parser = ChatParser(form)  # type: ignore[arg-type]
        assert [d.content for d in parser.push("<tool_call> is")] == ["<tool_call>", " is"]
        assert [d.content for d in parser.push(" a tag </tool")] == [" a tag "]
    parser = ChatParser("qwen3_coder")
    assert parser.push("<tool_call>\n<function=a") == []
    assert [d.content for d in parser.push("\n")] == ["<tool_call>", "\n<function=a\n"]


@pytest.mark.parametrize("spaces", [1000, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
def test_where_a_head_gets_too_long_does_not_depend_on_the_cuts(
    spaces: int, form: ToolFormat
) -> None:
    call = HERMES if form == "hermes" else CODER
    for text in (
        call.replace("<tool_call>", "<tool_call>" + " " * spaces),
        call.replace("get_weather", "g" * spaces),
        call.replace("<parameter=days>", " " * spaces + "<parameter=days>"),
        call.replace("<parameter=days>", "<parameter=" + "d" * spaces + ">"),
    ):
        assert read(list(text), form) == read([text], form)


@pytest.mark.parametrize(
    ("form", "text", "complete"),
    [
        ("hermes", HERMES, True),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', True),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', False),
        ("hermes", '<tool_call>{"name": "f", "arguments": {a: NaN, }}</tool_call>', False),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', False),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', True),
        ("hermes", f'{HERMES}<tool_call>{{"name": "f", "arguments": {{', False),
        ("qwen3_coder", CODER, True),
        ("qwen3_coder", CODER.replace("</tool_call>", ""), True),
        ("qwen3_coder", "<tool_call><function=f>", False),
        ("qwen3_coder", f"{CODER}<tool_call><function=f>", False),
    ],
)
def test_a_call_is_complete_with_its_arguments(form: ToolFormat, text: str, complete: bool) -> None:
    parser = ChatParser(form, [WEATHER])
    deltas = parser.push(text) + parser.flush()
    calls = 1 + max(delta.call.index for delta in deltas if delta.call is not None)
    assert parser.complete(calls) == complete
    assert parser.complete(calls - 1)


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
