"""Grammars as text, in llguidance's dialect of Lark; grammar.py compiles them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from difyops.engine import toolformats as tags
from difyops.engine.schema import UnsupportedSchema, escape, normalise
from difyops.engine.schemafacts import TYPES, types_of
from difyops.engine.toolformats import Tool, ToolFormat

#: Masks say what the grammar allows, not one tokenizer's favourite way of writing it.
_HEADER = '%llguidance {"no_forcing": true}\n'
#: Between JSON's tokens: nothing, a space, or a new line with its indentation. In unbounded
#: whitespace small models get lost.
_WHITESPACE = r"[ ]|\n(?:[ ]{0,40}|\t{0,20})"
#: Without \u a string has one spelling, so that no key slips past its schema as "\u0061".
_JSON = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": 'nrbtf\\"'}
MAX_PARALLEL = 16

_NO_TAG = r"~/(?s:.*)<\/parameter>(?s:.*)/"
_VALUE_END = json.dumps(f"\n{tags.PARAMETER_CLOSE}\n")
#: How a value of a type begins. Where a string may be another type as well, what reads as that type
#: is that type; see toolcalls.py.
_BEGINS = {
    "null": "null",
    "boolean": "[tT]rue|[fF]alse",
    "number": "-?[0-9]",
    "array": r"\[",
    "object": r"\{",
}
_NOT_OF_STRINGS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    | {"items", "prefixItems", "minItems", "maxItems", "properties", "patternProperties"}
    | {"additionalProperties", "required", "minProperties", "maxProperties"}
)
_RAW_KEYWORDS = frozenset({"type", "const", "enum", "pattern", "minLength", "maxLength"})


@dataclass(frozen=True)
class Source:
    """A rule's body and the rules it uses."""

    body: str
    rules: tuple[str, ...] = ()

    def grammar(self, *, gap: bool = False) -> str:
        """The whole text; `gap`: up to two new lines may come first."""
        start = f"start: AFTER_GAP? body\nAFTER_GAP: /\\n{{1,2}}/\nbody: {self.body}"
        return _HEADER + "\n".join([start if gap else f"start: {self.body}", *self.rules, ""])


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def from_schema(schema: Any, defs: Mapping[str, Any]) -> Source:
    """Of what schema.normalise returns."""
    if schema is False:
        raise UnsupportedSchema("", "schema", "is false: nothing satisfies it")
    whole = {**({} if schema is True else schema), "$defs": defs, "x-guidance": _JSON}
    return Source(f"%json {json.dumps(whole, ensure_ascii=False)}")


def from_regex(pattern: str) -> Source:
    return Source(_terminal(pattern))


def _terminal(pattern: str) -> str:
    return f"/{llguidance.regex_to_lark(pattern, 'dw')}/"


def from_choice(texts: Sequence[str]) -> Source:
    return Source(" | ".join(map(quoted, texts)))


def from_tools(
    tools: Sequence[Tool], form: ToolFormat, literal: Callable[[str], str], *, parallel: bool
) -> Source:
    """`literal`: how a tag is written in a rule of this tokenizer's grammar."""
    rules = _opened_call(tools, form, literal)
    rules.append(f"call: {literal(tags.CALL_OPEN)} opened")
    more = f' ("\\n" call){{0,{MAX_PARALLEL - 1}}}' if parallel else ""
    return Source(f"call{more}", tuple(rules))


def from_opened_call(
    tools: Sequence[Tool], form: ToolFormat, literal: Callable[[str], str], *, parallel: bool
) -> Source:
    """The rest of a call behind its opening tag. `parallel`: the token that ends it may go on with
    new lines, as those of real vocabularies do."""
    rules = _opened_call(tools, form, literal)
    if not parallel:
        return Source("opened", tuple(rules))
    return Source("opened AFTER_CALL?", (*rules, r"AFTER_CALL: /\n{1,2}/"))


def _opened_call(
    tools: Sequence[Tool], form: ToolFormat, literal: Callable[[str], str]
) -> list[str]:
    """The rule `opened`, and those that it uses."""
    if not tools:
        raise UnsupportedSchema("", "tools", "is empty: there is nothing to call")
    rules: list[str] = []
    calls = []
    for i, tool in enumerate(tools):
        try:
            source = (_hermes if form == "hermes" else _coder)(tool, f"t{i}_")
        except UnsupportedSchema as error:
            raise error.inside(f"/{i}/parameters") from None
        rules += [f"tool{i}: {source.body}", *source.rules]
        calls.append(f"tool{i}")
    closing = literal(tags.CALL_CLOSE)
    return [f'opened: "\\n" ({" | ".join(calls)}) "\\n" {closing}', *rules]


def _hermes(tool: Tool, prefix: str) -> Source:
    arguments, defs = normalise(dict(tool.parameters) if tool.strict else {}, prefix)
    if not types_of(arguments) & {"object"}:
        raise UnsupportedSchema("/type", "type", "must be object: a tool's arguments are named")
    call = {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            "arguments": {"allOf": [{"type": "object"}, arguments]},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return from_schema(call, defs)


def _coder(tool: Tool, prefix: str) -> Source:
    if not tool.strict:
        return _loose_coder(tool, prefix)
    schema, defs = normalise(dict(tool.parameters), prefix)
    for keyword in (
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "const",
        "enum",
        "minProperties",
        "maxProperties",
    ):
        if keyword in schema:
            raise UnsupportedSchema(
                f"/{keyword}", keyword, "beside a tool's properties is not supported in this format"
            )
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if stray := next((name for name in required if name not in properties), None):
        raise UnsupportedSchema("/required", "required", f"{stray!r} is not among the properties")
    rules, body = [], [quoted(f"{tags.FUNCTION_OPEN}{tool.name}>\n")]
    for i, (name, value) in enumerate(properties.items()):
        rule = f"{prefix.lower()}p{i}"
        if any(c in name for c in ">\n"):
            raise UnsupportedSchema(
                "/properties", "properties", f"{name!r} does not fit into a tag"
            )
        start = quoted(f"{tags.PARAMETER_OPEN}{name}>\n")
        rules.append(f"{rule}: {start} {rule}v")
        rules += _coder_value(value, defs, rule, f"/properties/{escape(name)}")
        body.append(rule if name in required else f"{rule}?")
    body.append(quoted(tags.FUNCTION_CLOSE))
    return Source(" ".join(body), tuple(rules))


def _loose_coder(tool: Tool, prefix: str) -> Source:
    """Any parameters, with any text."""
    name = prefix.upper()
    start = quoted(f"{tags.FUNCTION_OPEN}{tool.name}>\n")
    return Source(
        f"{start} ({name}NAME {name}TEXT)* {quoted(tags.FUNCTION_CLOSE)}",
        (
            rf"{name}NAME: /{tags.PARAMETER_OPEN}[^<>\n]+>\n/",
            f"{name}TEXT: {_raw_string({}, set(), '')}",
        ),
    )


def _coder_value(value: Any, defs: Mapping[str, Any], rule: str, at: str) -> list[str]:
    """Rules of one parameter: strings as they are, all else as JSON."""
    branches = _branches(value, defs)
    others = set().union(*map(types_of, branches)) - {"string"}
    options, rules = [], []
    for i, branch in enumerate(branches):
        if "string" in types_of(branch):
            name, body = f"{rule.upper()}V{i}", _raw_string(branch, others, at)
        else:
            name, body = f"{rule}v{i}", f"{from_schema(branch, defs).body} {_VALUE_END}"
        options.append(name)
        rules.append(f"{name}: {body}")
    return [f"{rule}v: {' | '.join(options)}", *rules]


def _branches(value: Any, defs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Alternatives that are either strings or never strings."""
    if isinstance(value, bool):
        value = {} if value else {"enum": []}
    if set(value) == {"$ref"}:
        return _branches(defs[value["$ref"].removeprefix("#/$defs/")], defs)
    if set(value) == {"anyOf"}:
        return [branch for option in value["anyOf"] for branch in _branches(option, defs)]
    types = types_of(value)
    if "string" not in types or types == {"string"}:
        return [value]
    given = value.get("type", list(TYPES))
    strings = {k: v for k, v in value.items() if k not in _NOT_OF_STRINGS} | {"type": "string"}
    rest = {**value, "type": [t for t in given if t != "string"]}
    if "enum" in value:
        strings["enum"] = [v for v in value["enum"] if isinstance(v, str)]
        rest["enum"] = [v for v in value["enum"] if not isinstance(v, str)]
    return [strings, rest]


def _raw_string(branch: dict[str, Any], others: set[str], at: str) -> str:
    """A terminal: the string's own text, without what would end it or read as another type."""
    if stray := next((k for k in branch if k not in _RAW_KEYWORDS), None):
        raise UnsupportedSchema(
            f"{at}/{stray}", stray, "on a tool's text parameter is not supported in this format"
        )
    texts = [branch["const"]] if "const" in branch else branch.get("enum")
    parts = ["/(?s:.*)/" if texts is None else f"({' | '.join(map(quoted, texts))})"]
    if "pattern" in branch:
        parts.append(_search(branch["pattern"]))
    if "minLength" in branch or "maxLength" in branch:
        parts.append(f"/(?s:.{{{branch.get('minLength', 0)},{branch.get('maxLength', '')}}})/")
    parts.append(_NO_TAG)
    if begins := "|".join(_BEGINS[t] for t in sorted(others)):
        parts.append(rf"~/(?s:\s*(?:{begins}).*)/")
    # One terminal with its end: the lexer is greedy, and would take the end for text.
    return f"({' & '.join(parts)}) {_VALUE_END}"


def _search(pattern: str) -> str:
    """A terminal of the texts in which `pattern` is found."""
    anchored = pattern.startswith("^") and pattern.endswith("$") and "|" not in pattern
    if not anchored or pattern.endswith("\\$"):
        pattern = f"(?s:.*)(?:{pattern})(?s:.*)"
    return _terminal(pattern)
