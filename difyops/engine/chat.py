"""Messages -> the prompt, by the model's own chat template; toolcalls.py reads what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """A compiled template; rendering is what transformers' `apply_chat_template` gives.

    `reads` are the variables that the template looks at. `variables` are what templates expect
    beside the messages: `bos_token`, `eos_token` and such. The sandbox keeps a template from
    Python's insides; it does not limit its time.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        """Raises ValueError for a template that is not Jinja."""
        self.source = source
        self._variables = dict(variables or {})
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.reads = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except TemplateError as error:
            raise ValueError(f"chat template, line {_line(error)}: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """`kwargs` are the request's chat_template_kwargs, for example enable_thinking.

        Raises ValueError with the template's own message when it refuses the conversation, and
        naming the part when a message has one that is not text.
        """
        extra = dict(kwargs or {})
        if taken := sorted(_RESERVED & extra.keys()):
            raise ValueError(f"chat_template_kwargs: {taken[0]} is a field of the request itself")
        context = {
            **self._variables,
            **extra,
            "messages": [_plain(m, f"messages[{i}]") for i, m in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except SecurityError as error:
            raise ValueError(f"chat template does what is not allowed: {error}") from None
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise ValueError(f"chat template fails on these messages: {error}") from None


def _plain(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message as templates expect it: content a string, the arguments of calls an object."""
    plain = dict(message)
    plain["content"] = _text(message.get("content"), f"{place}.content")
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{place}: a string or a list of parts is needed")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{place}[{i}]: a part of type {kind!r} is not supported, only text")
        texts.append(part["text"])
    return "".join(texts)


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError):
        return dict(call)
    if isinstance(arguments, dict):
        function["arguments"] = arguments
    return {**call, "function": function}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no prompt wants.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _line(error: TemplateError) -> int | str:
    return error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else "?"
