"""Every keyword is enforced or refused by name, and what is accepted is bounded."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from datetime import date
from typing import Any

import jsonschema
import llguidance
import pytest

from difyops.engine import grammar
from difyops.engine import schema as schema_module
from difyops.engine.schema import UnsupportedSchema, normalise
from tests.engine.constrained import (
    GRAMMARS,
    SIZE,
    STOP_IDS,
    TOKENIZER,
    accepts,
    ids,
    ids_of,
    taken,
    validates,
    write,
)

ENFORCED: dict[str, tuple[Any, list[str], list[str]]] = {
    "type": ({"type": ["integer", "null"]}, ["1", "null"], ["1.5", '"a"', "true"]),
    "const": ({"const": {"a": [1, None]}}, ['{"a":[1,null]}'], ['{"a":[1]}', "{}"]),
    "enum": ({"enum": [1, "a", None]}, ["1", '"a"', "null"], ["2", '"b"', "true"]),
    "minimum": ({"type": "integer", "minimum": -3}, ["-3", "10"], ["-4"]),
    "maximum": ({"type": "number", "maximum": 2.5}, ["2.5", "-7"], ["2.51", "3"]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3"]),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 3}, ["2.9"], ["3", "3.0"]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, ["0", "-21"], ["8"]),
    "minLength": ({"type": "string", "minLength": 2}, ['"éa"', '"日本"'], ['"日"', '""']),
    "maxLength": ({"type": "string", "maxLength": 2}, ['"日本"', '"\\n\\""'], ['"abc"']),
    "pattern": ({"type": "string", "pattern": "^a|^.?b$"}, ['"ax"', '"xb"'], ['"x"']),
    "items": ({"type": "array", "items": {"type": "null"}}, ["[]", "[null]"], ["[1]"]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "null"}, True], "items": False},
        ["[]", "[null, 4]"],
        ["[1]", "[null, 1, 2]"],
    ),
    "minItems": ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[]", "[1]"], ["[1,2]"]),
    "properties": (
        {"type": "object", "properties": {"a": {"type": "null"}}},
        ['{"a": null}', '{"b": 1}', "{}"],
        ['{"a": 1}', '{"a":null,"\\u0061":1}', '{"a":null,"a":1}'],
    ),
    "required": ({"type": "object", "required": ["a"]}, ['{"a":1}'], ["{}", '{"b":1}']),
    "additionalProperties": (
        {"properties": {"a": True}, "additionalProperties": False},
        ['{"a":1}', "3"],
        ['{"b":1}', '{"\\u0061":1}'],
    ),
    "patternProperties": (
        {"patternProperties": {"^n": {"type": "null"}}, "additionalProperties": {"type": "string"}},
        ['{"n1":null,"x":"a"}'],
        ['{"n1":"a"}', '{"\\u006e":"a"}', '{"x":null}'],
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, ["{}"], ['{"a":1,"b":2}']),
    "allOf": ({"allOf": [{"minimum": 1}, {"type": "integer"}]}, ["1"], ["0", "null"]),
    "anyOf": ({"anyOf": [{"type": "null"}, {"const": 2}]}, ["2", "null"], ["3"]),
    "oneOf": (
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {
                "a": {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
                "b": {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]},
            },
        },
        ['{"k":"a"}', '{"k":"b"}'],
        ["{}", '{"k":"c"}'],
    ),
    "$ref": (
        {
            "$ref": "#/$defs/x~1y%25",
            "$defs": {"x/y%": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
        },
        ["[]", "[[[]]]"],
        ["[[],[]]", "1"],
    ),
    "uniqueItems": ({"type": "array", "uniqueItems": False}, ["[1,1]"], ["1"]),
    "additionalItems": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"type": "null"}],
            "additionalItems": {"type": "integer"},
        },
        ["[null,1]"],
        ["[1]", "[null,null]"],
    ),
}
FORMATS = {
    "date": (["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-04-31", "24-01-01"]),
    "time": (["10:00:00Z", "23:59:59.5+01:00"], ["24:00:00Z", "10:00:00", "10:00:60Z"]),
    "date-time": (["2024-02-29T10:00:00Z"], ["2023-02-29T10:00:00Z", "2024-02-29"]),
    "duration": (["P1D", "PT2H3M"], ["P", "1D"]),
    "email": (["a@b.de"], ["a", "a@"]),
    "hostname": (["a-b.example"], ["-a", "a..b", "b" * 60 + ("." + "b" * 60) * 4]),
    "ipv4": (["1.2.3.255"], ["1.2.3.256", "1.2.3"]),
    "ipv6": (["::1", "1:2:3:4:5:6:7:8"], ["1:2:3", "g::"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    "uri": (["https://a.b/c?d#e", "urn:x"], ["no scheme", "//a"]),
}
REFUSED: list[tuple[Any, str, str]] = [
    *(
        ({"properties": {"a/b": {keyword: value}}}, f"/properties/a~1b/{keyword}", keyword)
        for keyword, value in {
            "not": {"type": "null"}, "if": True, "then": True, "else": True, "contains": True,
            "minContains": 1, "maxContains": 1, "propertyNames": True, "uniqueItems": True,
            "dependentSchemas": {}, "dependentRequired": {}, "dependencies": {},
            "unevaluatedItems": False, "unevaluatedProperties": False, "$dynamicRef": "#a",
            "$dynamicAnchor": "a", "$recursiveRef": "#", "$recursiveAnchor": True,
            "$vocabulary": {}, "nullable": True,
            "maxLenght": 3, "x-guidance": {"lenient": True}, "additionalItems": False,
            "$id": "https://a.example/b", "format": "regex", "pattern": "(?=a)", "enum": [],
        }.items()
    ),
    ({"$ref": "https://a.example/b"}, "/$ref", "$ref"),
    ({"$ref": "#anchor"}, "/$ref", "$ref"),
    ({"$ref": "#/$defs/nowhere"}, "/$ref", "$ref"),
    ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"not": {}}}}, "/$defs/a/not", "not"),
    ({"$schema": "https://a.example/mine"}, "/$schema", "$schema"),
    ({"type": "text"}, "/type", "type"),
    ({"minLength": -1}, "/minLength", "minLength"),
    ({"maxItems": 1.5}, "/maxItems", "maxItems"),
    ({"minimum": "1"}, "/minimum", "minimum"),
    ({"minimum": True}, "/minimum", "minimum"),
    ({"exclusiveMinimum": True, "minimum": 1}, "/exclusiveMinimum", "exclusiveMinimum"),
    ({"maximum": 2**53 + 1}, "/maximum", "maximum"),
    ({"const": 2**53 + 1}, "/const", "const"),
    ({"const": "a\x00"}, "/const", "const"),
    ({"multipleOf": 0}, "/multipleOf", "multipleOf"),
    ({"required": "a"}, "/required", "required"),
    ({"properties": []}, "/properties", "properties"),
    ({"items": [True]}, "/items", "items"),
    ({"allOf": []}, "/allOf", "allOf"),
    ({"anyOf": [3]}, "/anyOf/0", "schema"),
    ({"minProperties": 2}, "/minProperties", "minProperties"),
    ({"pattern": "^[^a&&b]$"}, "/pattern", "pattern"),
    ({"properties": {"a": {"oneOf": [True, True]}}}, "/properties/a/oneOf", "oneOf"),
    ({"properties": {"a": {"pattern": r"\1"}}}, "/properties/a/pattern", "pattern"),
    ({"patternProperties": {"a": True, "b": True}}, "/patternProperties", "patternProperties"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "/maximum", "maximum"),
    (False, "", "schema"),
    (3, "", "schema"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "", "$ref"),
    ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "/$defs/a", "$ref"),
    ({"const": float("nan")}, "", "schema"),
    ({"const": "\ud800"}, "", "schema"),
    ({"description": "x" * 200_000}, "", "schema"),
]  # fmt: skip


@pytest.mark.parametrize("keyword", ENFORCED)
def test_a_keyword_is_enforced(keyword: str) -> None:
    schema, good, bad = ENFORCED[keyword]
    validator = jsonschema.validators.validator_for(schema)(schema)
    for text in good:
        assert validator.is_valid(json.loads(text)) and accepts(GRAMMARS.json_schema(schema), text)
    for text in bad:
        assert not accepts(GRAMMARS.json_schema(schema), text), text
    for seed in range(8):
        text = write(GRAMMARS.json_schema(schema), seed) or ""
        validator.validate(json.loads(text))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_enforced(name: str) -> None:
    for extra in ({}, {"minLength": 1}):
        schema = {"type": "string", "format": name, **extra}
        for text in FORMATS[name][0]:
            assert accepts(GRAMMARS.json_schema(schema), json.dumps(text)), text
        for text in FORMATS[name][1]:
            assert not accepts(GRAMMARS.json_schema(schema), json.dumps(text)), text
    for seed in range(8):
        text = write(GRAMMARS.json_schema({"type": "string", "format": name}), seed)
        assert text is not None
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(
            json.loads(text), {"type": "string", "format": name}, format_checker=checker
        )


def test_every_date_there_is() -> None:
    constraint = GRAMMARS.json_schema({"type": "string", "format": "date"})
    for year in (1900, 2000, 2023, 2024):
        for month in range(1, 14):
            for day in range(33):
                text = f"{year}-{month:02}-{day:02}"
                try:
                    real = bool(date.fromisoformat(text))
                except ValueError:
                    real = False
                tokens = ids_of(json.dumps(text))
                assert taken(constraint, tokens) == real, text


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("int32", str(2**31 - 1), str(2**31)),
        ("int64", str(2**62), str(2**63)),
        ("double", "17", "null"),
    ],
)
def test_a_format_of_numbers(form: str, good: str, bad: str) -> None:
    schema = {"type": "integer", "format": form}
    assert accepts(GRAMMARS.json_schema(schema), good)
    assert not accepts(GRAMMARS.json_schema(schema), bad)


@pytest.mark.parametrize(("schema", "pointer", "keyword"), REFUSED)
def test_what_is_not_enforced_is_refused_by_name(schema: Any, pointer: str, keyword: str) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        GRAMMARS.json_schema(schema)
    assert (caught.value.pointer, caught.value.keyword) == (pointer, keyword)
    assert keyword in str(caught.value) and len(str(caught.value)) < 600


def test_annotations_aretaken() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://a.example/b",
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [1],
        "deprecated": True,
        "readOnly": True,
        "$comment": "c",
        "x-order": 3,
        "contentEncoding": "base64",
        "$defs": {"unused": {"not": {}}},
        "const": 7,
    }
    assert write(GRAMMARS.json_schema(schema)) == "7"


def test_every_keyword_of_the_drafts_is_known_here() -> None:
    """A keyword is in one of the tables above, or an annotation; none is forgotten."""
    keywords: set[str] = set()
    registry = jsonschema.validators.SPECIFICATIONS
    for uri in registry:
        if "json-schema.org/draft/2020-12" in uri or "json-schema.org/draft-07" in uri:
            contents = registry.contents(uri)
            keywords |= set(contents.get("properties", {}))
    annotations = schema_module.ANNOTATIONS
    refused = {keyword for _, _, keyword in REFUSED}
    assert len(keywords) > 50
    assert keywords <= set(ENFORCED) | refused | annotations | {"format"}


# Limits


HOSTILE = {
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "long": {"type": "string", "minLength": 10**9},
    "repeats": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "states": {"allOf": [{"type": "string", "pattern": f".*a.{{{10 + i}}}$"} for i in range(12)]},
    "unions": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}": {"const": 1}}}, {"type": "array", "minItems": i}]}
            for i in range(16)
        ]
    },
    "names": {"type": "object", "properties": {f"p{i}": {"const": i} for i in range(4000)}},
    "doubling": {
        "$ref": "#/$defs/0",
        "$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(90)}
        | {"90": {"type": "object"}},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_a_hostile_schema_is_no_hang(name: str) -> None:
    """What is accepted can be generated; the rest is refused at once, and by name."""
    try:
        constraint = GRAMMARS.json_schema(HOSTILE[name])
    except UnsupportedSchema:
        return
    for _ in range(20):
        if constraint.finished:
            break
        constraint.advance(min((ids(constraint) - STOP_IDS) or STOP_IDS))


def test_an_object_may_have_as_many_names_as_are_accepted() -> None:
    names = {f"p{i}": {"type": "integer"} for i in range(schema_module.MAX_NAMES)}
    schema = {"type": "object", "properties": names, "additionalProperties": False}
    text = write(GRAMMARS.json_schema(schema), patience=30)
    assert validates(text, schema)


def test_what_cannot_be_generated_is_refused_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with a lower limit: the real one is beyond what one schema of MAX_BYTES reaches."""
    limits = llguidance.LLParserLimits(max_items_in_row=500, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    names = {f"p{i}": {"type": "integer"} for i in range(300)}
    schema = {"anyOf": [{"type": "null"}, {"type": "object", "properties": names}]}
    with pytest.raises(
        UnsupportedSchema, match="ways at one place, and 500 are accepted"
    ) as caught:
        grammar.Grammars(TOKENIZER, SIZE, STOP_IDS).json_schema(schema)
    assert caught.value.pointer == "/anyOf/1/properties"
    assert "Parser" not in str(caught.value) and "\n" not in str(caught.value)


def alike(names: int, levels: int) -> dict[str, Any]:
    """Two branches that share names at every level, and differ nowhere that matters."""
    defs = {}
    for side in "ab":
        for level in range(levels):
            one = {"$ref": f"#/$defs/{side}{level + 1}"}
            defs[f"{side}{level}"] = {
                "type": "object",
                "properties": {f"n{i}": one for i in range(names)},
                "required": [f"n{i}" for i in range(names)],
            }
        defs[f"{side}{levels}"] = {"type": "object"}
    return {"oneOf": [{"$ref": "#/$defs/a0"}, {"$ref": "#/$defs/b0"}], "$defs": defs}


ENDLESS = {
    side: {"type": "object", "required": [*"klmnop"], "properties": dict.fromkeys("klmnop", again)}
    for side, again in (("a", {"$ref": "#/$defs/a"}), ("b", {"$ref": "#/$defs/b"}))
}


@pytest.mark.parametrize(
    "schema",
    [
        alike(20, 9),
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": ENDLESS},
        {"oneOf": [{"enum": [f"{i} {j}" for j in range(60)]} for i in range(100)]},
        {"anyOf": [{"oneOf": [{"const": i}, {"enum": list(range(20, 9000))}]} for i in range(20)]},
    ],
)
def test_comparing_branches_is_bounded(schema: Any) -> None:
    began = time.process_time()
    with contextlib.suppress(UnsupportedSchema):
        normalise(schema)
    assert time.process_time() - began < 1


def test_branches_that_differ_deep_down_are_told_apart() -> None:
    def nested(kind: str) -> Any:
        value: Any = {"const": kind}
        for _ in range(4):
            keys = ["same", "also", "kind"]
            value = {
                "type": "object",
                "required": keys,
                "properties": {"same": {"const": 1}, "also": {"type": "object"}, "kind": value},
            }
        return value

    one = {"oneOf": [nested("a"), nested("b")]}
    assert "anyOf" in normalise(one)[0]


def test_a_chain_of_references_does_not_end_the_process() -> None:
    """llguidance recurses along it, on the stack of whichever thread asks."""
    script = """
import sys, threading
from tests.engine.constrained import GRAMMARS
from difyops.engine.schema import UnsupportedSchema
def chain(n, wrap):
    defs = {str(i): wrap({"$ref": f"#/$defs/{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/0", "$defs": defs | {str(n): {"type": "object"}}}
def ask():
    wraps = [lambda x: {"items": x}, lambda x: {"properties": {"x": x}}, 
        lambda x: {"anyOf": [x, {}]}]
    for wrap in wraps:
        GRAMMARS.json_schema(chain(395, wrap))
        for n in (402, 2000):
            try:
                GRAMMARS.json_schema(chain(n, wrap))
            except UnsupportedSchema as error:
                assert error.keyword == "$ref", error
            else:
                sys.exit("not refused")
    print("alive")
thread = threading.Thread(target=ask)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr[-2000:]
