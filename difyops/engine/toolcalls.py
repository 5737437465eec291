"""A model's text -> content, reasoning and tool calls, while it is being written.

How the text is cut into pieces never changes the joined result, and nothing of it is lost: what
begins like a call and is none is content.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NoReturn

from difyops.engine import toolformats as tags
from difyops.engine.schemafacts import ANY, Types, value_types
from difyops.engine.toolformats import Tool, ToolFormat

# No '<' in a name: a match never reaches past the tag that ends the call.
_HERMES_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"((?:[^"\\<]|\\[^u<])+)"\s*,\s*"arguments"\s*:\s*(?=\{)'
)
_HERMES_TAIL = re.compile(r"\s*\}\s*\Z")
_CODER_HEAD = re.compile(rf"\s*{tags.FUNCTION_OPEN}([^<>\n]+)>")
_CODER_PARAMETER = re.compile(rf"\s*{tags.PARAMETER_OPEN}([^<>\n]+)>\n?")
#: Heads are looked for in so many characters. Without a limit a text that nearly is one would be
#: read again from its beginning with every piece.
_HEAD = 1024
#: Subschemas that are read for the parameters of all the tools of a request.
_TYPES_BUDGET = 20_000
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
        self._types = parameter_types(tools) if form == "qwen3_coder" else {}
        self._make_id = make_id
        self._buffer = ""
        self._searched: dict[str, int] = {}  # tag -> how much of the buffer does not have it
        self._newlines = 0  # that wait before the buffer, until it is known what follows
        self._arguments: list[str] = []  # of the call that is open
        self._calls = 0
        self._complete: set[int] = set()
        self._skip_newlines = False
        self._blank = 0  # how much white space the buffer begins with
        self._scan = _JsonScan()
        self._ended = False
        self._step: Callable[[], Iterator[Delta | None]]
        start = self._open_reasoning if reasoning or inside else self._content
        self._must_open = not inside
        self._step = start

    def push(self, text: str) -> list[Delta]:
        # Python appends in place to a local variable only: this way no piece copies the buffer.
        buffer, self._buffer = self._buffer, ""
        buffer += text
        self._buffer = buffer
        return self._run()

    def complete(self, calls: int) -> bool:
        """Whether the first `calls` calls all have arguments that are one JSON object."""
        return self._complete >= set(range(calls))

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
        self._searched.clear()
        return taken

    def _find(self, tag: str, start: int = 0) -> int:
        """The place of `tag` in the buffer from `start` on, or -1; looks at nothing twice."""
        at = self._buffer.find(tag, max(start, self._searched.get(tag, 0) - len(tag) + 1))
        if at < 0:
            self._searched[tag] = len(self._buffer)
        return at

    def _match_head(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        # The end of a call is looked for where no head is; more text makes none of the first _HEAD.
        if self._searched.get(tags.CALL_CLOSE, 0) >= _HEAD:
            return None
        return pattern.match(self._buffer, 0, _HEAD)

    def _until(self, tag: str, *, trim: bool) -> tuple[str, bool]:
        """The text before `tag`, as far as it is certain, and whether `tag` was there (and taken).

        `trim`: new lines at the end wait until it is known whether the tag follows, then go.
        """
        at = self._find(tag)
        found, final = at >= 0, at < 0 and self._ended
        keep = 0 if final else _overlap(self._buffer, tag)
        text = self._take(at if found else len(self._buffer) - keep)
        if found:
            self._take(len(tag))
        if not trim:
            return text, found
        shown = text if final else text.rstrip("\n")
        before = self._newlines
        waiting = len(text) - len(shown) + (0 if shown else before)
        self._newlines = 0 if found or final else waiting
        return ("\n" * before + shown if shown or final else ""), found

    def _drop_newlines(self) -> bool:
        """Whether something other than a new line has come after a place that swallows them."""
        if self._skip_newlines:
            self._buffer = self._buffer.lstrip("\n")
            self._skip_newlines = not self._buffer
        return not self._skip_newlines

    # Reasoning

    def _open_reasoning(self) -> Iterator[Delta | None]:
        while self._buffer[self._blank : self._blank + 1].isspace():
            self._blank += 1
        text = self._buffer[self._blank :]
        if text.startswith(tags.THINK_OPEN):
            self._take(self._blank + len(tags.THINK_OPEN))
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
        """What was taken for a call is none: content up to the closing tag and with it."""
        self._enter(self._passed)
        yield Delta(content=tags.CALL_OPEN)
        yield None

    def _passed(self) -> Iterator[Delta | None]:
        text, closed = self._until(tags.CALL_CLOSE, trim=False)
        if text := text + tags.CALL_CLOSE * closed:
            yield Delta(content=text)
        if closed:
            self._enter(self._content)
            yield None

    def _begin(self, name: str, arguments: str = "") -> Delta:
        self._calls += 1
        self._arguments = [arguments]
        return Delta(call=Call(self._calls - 1, self._make_id(), name, arguments))

    def _more(self, arguments: str) -> Delta:
        self._arguments.append(arguments)
        return Delta(call=Call(self._calls - 1, arguments=arguments))

    def _end_arguments(self) -> None:
        if _json_object("".join(self._arguments)) is not None:
            self._complete.add(self._calls - 1)

    def _after_call(self) -> None:
        self._skip_newlines = True
        self._enter(self._content)

    # Hermes

    def _hermes(self) -> Iterator[Delta | None]:
        if head := self._match_head(_HERMES_HEAD):
            self._take(head.end())
            self._scan = _JsonScan()
            self._enter(self._hermes_arguments)
            yield self._begin(json.loads(f'"{head[1]}"', strict=False))
            yield None
            return
        begun = self._buffer[:_HEAD].lstrip()[:1]
        if begun != "{" and (begun or len(self._buffer) >= _HEAD):
            yield from self._no_call()
            return
        if (at := self._find(tags.CALL_CLOSE)) < 0:
            if self._ended:
                yield from self._no_call()
            return
        if (call := _whole_call(self._buffer[:at])) is None:
            yield from self._no_call()
            return
        self._take(at + len(tags.CALL_CLOSE))
        self._after_call()
        yield self._begin(*call)
        self._end_arguments()
        yield None

    def _hermes_arguments(self) -> Iterator[Delta | None]:
        end = self._scan.end(self._buffer)
        if text := self._take(len(self._buffer) if end is None else end):
            yield self._more(text)
        if end is not None:
            self._end_arguments()
            self._enter(self._hermes_tail)
            yield None

    def _hermes_tail(self) -> Iterator[Delta | None]:
        at = self._find(tags.CALL_CLOSE)
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
        if head := self._match_head(_CODER_HEAD):
            self._take(head.end())
            self._name = head[1]
            self._given = 0
            self._enter(self._coder_parameters)
            yield self._begin(self._name, "{")
            yield None
        elif self._ended or not _may_be_head(self._buffer):
            yield from self._no_call()

    def _coder_parameters(self) -> Iterator[Delta | None]:
        if head := self._match_head(_CODER_PARAMETER):
            at = self._find(tags.PARAMETER_CLOSE, head.end())
            if at >= 0:
                value = self._buffer[head.end() : at]
                self._take(at + len(tags.PARAMETER_CLOSE))
                yield self._more(self._argument(head[1], value.removesuffix("\n")))
                yield None
                return
        elif (at := self._find(tags.CALL_CLOSE)) >= 0:
            stray = self._take(at)
            self._take(len(tags.CALL_CLOSE))
            self._after_call()
            yield self._more("}")
            self._end_arguments()
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
            self._end_arguments()
        if rest.strip():
            yield Delta(content=rest)

    def _argument(self, key: str, text: str) -> str:
        value = convert(text, self._types.get(self._name, {}).get(key, ANY))
        self._given += 1
        pair = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        return pair if self._given == 1 else f", {pair}"


def _may_be_head(text: str) -> bool:
    """Whether what follows may still make a qwen3_coder head of `text`, which is none yet."""
    if len(text) >= _HEAD:
        return False
    begun = text.lstrip()
    if len(begun) <= len(tags.FUNCTION_OPEN):
        return tags.FUNCTION_OPEN.startswith(begun)
    return begun.startswith(tags.FUNCTION_OPEN) and not any(
        c in "<>\n" for c in begun[len(tags.FUNCTION_OPEN) :]
    )


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may begin `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def _json_object(text: str) -> dict[str, Any] | None:
    """JSON as its standard has it: without Python's NaN and infinities."""
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is written in another order, or has no arguments."""
    call = _json_object(text)
    if call is None or not isinstance(call.get("name"), str):
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


def parameter_types(tools: Sequence[Tool]) -> dict[str, dict[str, frozenset[str]]]:
    """Tool -> parameter -> the types that its schema allows; the schemas may be anything."""
    found, budget = {}, _TYPES_BUDGET
    for tool in tools:
        reader = Types(tool.parameters, budget)
        properties = tool.parameters.get("properties")
        given = properties if isinstance(properties, Mapping) else {}
        found[tool.name] = {name: reader.of(schema) for name, schema in given.items()}
        budget = reader.budget
    return found


def convert(text: str, types: Set[str]) -> Any:
    """A parameter's text as a value of one of `types`; what is no such value stays text."""
    if types == {"string"}:
        return text
    if types == {"boolean"} and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if "string" in types and not _JSON_START.match(text):
        return text
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return text
    return value if value_types(value) & types else text


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} cannot be written as JSON")
