"""A model's text -> content, reasoning and tool calls, while it is being written.

How the text is cut into pieces never changes the joined result, and nothing of it is lost: what
begins like a call and is none is content.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difyops.engine import toolformats as tags
from difyops.engine.toolformats import Tool, ToolFormat

# No '<' in a name: a match never reaches past the tag that ends the call.
_HERMES_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"((?:[^"\\<]|\\[^u<])+)"\s*,\s*"arguments"\s*:\s*(?=\{)'
)
_HERMES_TAIL = re.compile(r"\s*\}\s*\Z")
_CODER_HEAD = re.compile(rf"\s*{tags.FUNCTION_OPEN}([^<>\n]+)>")
_CODER_PARAMETER = re.compile(rf"\s*{tags.PARAMETER_OPEN}([^<>\n]+)>\n?")
_JSON_START = re.compile(r"\s*(?:null|true|false|-?[0-9]|[\[{])")


@dataclass(frozen=True)
class Call:
    """A piece of a tool call. The first of an `index` has `id` and `name`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """One of the three is set."""

    content: str = ""
    reasoning: str = ""
    call: Call | None = None


def new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatParser:
    """`push` what the model writes, `flush` at its end.

    `reasoning`: the model may open with <think>; `inside`: the prompt has opened it already. New
    lines around the reasoning, and around calls, are the format's and belong to nobody.
    """

    def __init__(
        self,
        form: ToolFormat | None,
        tools: Sequence[Tool] = (),
        *,
        reasoning: bool = False,
        inside: bool = False,
        make_id: Callable[[], str] = new_id,
    ) -> None:
        self._form = form
        self._parameters = {tool.name: tool.parameters for tool in tools}
        self._make_id = make_id
        self._buffer = ""
        self._calls = 0
        self._skip_newlines = False
        self._scan = _JsonScan()
        self._ended = False
        self._step: Callable[[], Iterator[Delta | None]]
        start = self._open_reasoning if reasoning or inside else self._content
        self._must_open = not inside
        self._step = start

    def push(self, text: str) -> list[Delta]:
        self._buffer += text
        return self._run()

    def flush(self) -> list[Delta]:
        self._ended = True
        return self._run()

    def _run(self) -> list[Delta]:
        # A step gives deltas, and None once it has handed over to another step.
        deltas: list[Delta] = []
        going = True
        while going:
            going = False
            for delta in self._step():
                if delta is None:
                    going = True
                else:
                    deltas.append(delta)
        return deltas

    def _enter(self, step: Callable[[], Iterator[Delta | None]]) -> None:
        self._step = step

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _until(self, tag: str, *, trim: bool) -> tuple[str, bool]:
        """The text before `tag`, as far as it is certain, and whether `tag` was there (and taken).

        `trim`: new lines at the end wait until it is known whether the tag follows, then go.
        """
        if (at := self._buffer.find(tag)) >= 0:
            text = self._take(at)
            self._take(len(tag))
            return (text.rstrip("\n") if trim else text), True
        keep = 0 if self._ended else _overlap(self._buffer, tag)
        sure = len(self._buffer) - keep
        if trim and not self._ended:
            sure = len(self._buffer[:sure].rstrip("\n"))
        return self._take(sure), False

    def _drop_newlines(self) -> bool:
        """Whether something other than a new line has come after a place that swallows them."""
        if self._skip_newlines:
            self._buffer = self._buffer.lstrip("\n")
            self._skip_newlines = not self._buffer
        return not self._skip_newlines

    # Reasoning

    def _open_reasoning(self) -> Iterator[Delta | None]:
        text = self._buffer.lstrip()
        if text.startswith(tags.THINK_OPEN):
            self._buffer = text[len(tags.THINK_OPEN) :]
        elif tags.THINK_OPEN.startswith(text) and not self._ended:
            return
        elif self._must_open:
            self._enter(self._content)
            yield None
            return
        self._skip_newlines = True
        self._enter(self._reasoning)
        yield None

    def _reasoning(self) -> Iterator[Delta | None]:
        if not self._drop_newlines():
            return
        text, closed = self._until(tags.THINK_CLOSE, trim=True)
        if self._ended and not closed:
            text = text.rstrip("\n")
        if text:
            yield Delta(reasoning=text)
        if closed:
            self._skip_newlines = True
            self._enter(self._content)
            yield None

    # Content

    def _content(self) -> Iterator[Delta | None]:
        if not self._drop_newlines():
            return
        if self._form is None:
            if text := self._take(len(self._buffer)):
                yield Delta(content=text)
            return
        text, called = self._until(tags.CALL_OPEN, trim=True)
        if text:
            yield Delta(content=text)
        if called:
            self._enter(self._hermes if self._form == "hermes" else self._coder)
            yield None

    def _no_call(self) -> Iterator[Delta | None]:
        """The text up to the closing tag is no call: content, as soon as that is certain."""
        at = self._buffer.find(tags.CALL_CLOSE)
        if at >= 0 or self._ended:
            end = len(self._buffer) if at < 0 else at + len(tags.CALL_CLOSE)
            self._enter(self._content)
            yield Delta(content=tags.CALL_OPEN + self._take(end))
            yield None

    def _begin(self, name: str, arguments: str = "") -> Delta:
        self._calls += 1
        return Delta(call=Call(self._calls - 1, self._make_id(), name, arguments))

    def _more(self, arguments: str) -> Delta:
        return Delta(call=Call(self._calls - 1, arguments=arguments))

    def _after_call(self) -> None:
        self._skip_newlines = True
        self._enter(self._content)

    # Hermes

    def _hermes(self) -> Iterator[Delta | None]:
        if head := _HERMES_HEAD.match(self._buffer):
            self._take(head.end())
            self._scan = _JsonScan()
            self._enter(self._hermes_arguments)
            yield self._begin(json.loads(f'"{head[1]}"', strict=False))
            yield None
            return
        if (at := self._buffer.find(tags.CALL_CLOSE)) < 0:
            yield from self._no_call()
            return
        if (call := _whole_call(self._buffer[:at])) is None:
            yield from self._no_call()
            return
        self._take(at + len(tags.CALL_CLOSE))
        self._after_call()
        yield self._begin(*call)
        yield None

    def _hermes_arguments(self) -> Iterator[Delta | None]:
        end = self._scan.end(self._buffer)
        if text := self._take(len(self._buffer) if end is None else end):
            yield self._more(text)
        if end is not None:
            self._enter(self._hermes_tail)
            yield None

    def _hermes_tail(self) -> Iterator[Delta | None]:
        at = self._buffer.find(tags.CALL_CLOSE)
        if at < 0 and not self._ended:
            return
        stray = self._take(len(self._buffer) if at < 0 else at)
        self._take(len(tags.CALL_CLOSE))
        self._after_call()
        if stray.strip() and not _HERMES_TAIL.match(stray):
            yield Delta(content=stray)
        yield None

    # Qwen3-Coder

    def _coder(self) -> Iterator[Delta | None]:
        if head := _CODER_HEAD.match(self._buffer):
            self._take(head.end())
            self._name = head[1]
            self._given = 0
            self._enter(self._coder_parameters)
            yield self._begin(self._name, "{")
            yield None
            return
        yield from self._no_call()

    def _coder_parameters(self) -> Iterator[Delta | None]:
        if head := _CODER_PARAMETER.match(self._buffer):
            at = self._buffer.find(tags.PARAMETER_CLOSE, head.end() - 1)
            if at >= 0:
                value = self._buffer[head.end() : max(at, head.end())]
                self._take(at + len(tags.PARAMETER_CLOSE))
                yield self._more(self._argument(head[1], value.removesuffix("\n")))
                yield None
                return
        elif (at := self._buffer.find(tags.CALL_CLOSE)) >= 0:
            stray = self._take(at)
            self._take(len(tags.CALL_CLOSE))
            self._after_call()
            yield self._more("}")
            if stray := stray.replace(tags.FUNCTION_CLOSE, "", 1).strip():
                yield Delta(content=stray)
            yield None
            return
        if self._ended:
            yield from self._coder_cut()

    def _coder_cut(self) -> Iterator[Delta | None]:
        """The output ended inside a call."""
        rest = self._take(len(self._buffer))
        if tags.FUNCTION_CLOSE in rest:
            rest = rest.replace(tags.FUNCTION_CLOSE, "", 1)
            yield self._more("}")
        if rest.strip():
            yield Delta(content=rest)

    def _argument(self, key: str, text: str) -> str:
        properties = self._parameters.get(self._name, {}).get("properties", {})
        value = convert(text, properties.get(key, {}), self._parameters.get(self._name, {}))
        self._given += 1
        pair = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        return pair if self._given == 1 else f", {pair}"


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may begin `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is written in another order, or has no arguments."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict) or set(call) - {"name", "arguments"}:
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)


class _JsonScan:
    """Finds where an object ends, piece by piece: depth and strings, no more."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """The index after the object's last brace, if it is in `text`."""
        for i, char in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def convert(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """A parameter's text as a value of its schema's types; what is no such value stays text."""
    types = _types(schema, root, 0)
    if types == {"string"}:
        return text
    if types == {"boolean"} and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if "string" in types and not _JSON_START.match(text):
        return text
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text
    return value if _type_of(value) & types else text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_ALL = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"boolean" if isinstance(value, bool) else "null"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == value // 1 else {"number"}
    return {
        "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
    }


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > 8:
        return set(_ALL)
    types = schema.get("type")
    found = set(_ALL) if types is None else {types} if isinstance(types, str) else set(types)
    for options in (schema.get("anyOf"), schema.get("oneOf")):
        if options:
            found &= set().union(*(_types(option, root, depth + 1) for option in options))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values:
        found &= set().union(*map(_type_of, values))
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#/"):
        target: Any = root
        for part in ref[2:].split("/"):
            target = target.get(part, {}) if isinstance(target, Mapping) else {}
        found &= _types(target, root, depth + 1)
    return found
