"""Calls that a model may make: free text until one opens, then nothing but a right call."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import jsonschema
import pytest

from difyops.engine.freetext import FreeText
from difyops.engine.grammar import GrammarConstraint, Grammars
from difyops.engine.schema import UnsupportedSchema
from difyops.engine.toolcalls import ChatParser
from difyops.engine.toolformats import Tool, ToolFormat
from tests.engine.constrained import walk_back_and_forth
from tests.engine.random_model import STOPS, RandomModel, allowed, tokenizer

SIZE = 500
STRICT = Tool(
    "search",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string", "maxLength": 9},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        },
        "required": ["query", "limit"],
        "additionalProperties": False,
    },
)
#: No grammar could keep to it.
LOOSE = Tool("loose", {"type": "object", "properties": {"a": {"not": {}}}}, strict=False)
TOOLS = [STRICT, LOOSE]
#: Text that begins like a tag, and is none.
PROSE = ["so", " < 3", " <tool", "<tool_call", "<tool_calls>", "</tool_call>", "<tool_<tool_", "\n"]
FORMS: list[ToolFormat] = ["hermes", "qwen3_coder"]
TAGS = [True, False, None]


@functools.cache
def made(tags: bool | None) -> tuple[Any, Grammars, set[int]]:
    words = tokenizer(special_tags=tags)
    stops = {words.token_to_id(stop) for stop in STOPS}
    return words, Grammars(words, SIZE, stops), stops


def call_of(
    tags: bool | None, form: ToolFormat, constraint: GrammarConstraint, seed: int
) -> str | None:
    """A random model's text behind the opening of a call."""
    words, _, stops = made(tags)
    ends = {} if form == "hermes" else {"end": "\n</parameter>\n", "closing": ">"}
    return RandomModel(words, SIZE, stops, seed).write(constraint, patience=30, **ends)


def say(tags: bool | None, constraint: GrammarConstraint, text: str) -> None:
    for token in made(tags)[0].encode(text).ids:
        mask = constraint.mask()
        assert mask is None or token in allowed(mask, SIZE), text
        constraint.advance(token)


def parsed(text: str, form: ToolFormat, **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    parser = ChatParser(form, TOOLS, **options)
    content, calls = "", []
    for delta in [*parser.push(text), *parser.flush()]:
        content += delta.content
        if delta.call is not None and delta.call.name is not None:
            calls.append([delta.call.name, ""])
        if delta.call is not None:
            calls[-1][1] += delta.call.arguments
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def check(calls: list[tuple[str, Any]]) -> set[str]:
    for name, arguments in calls:
        jsonschema.validate(arguments, STRICT.parameters if name == "search" else {})
        assert name in ("search", "loose") and isinstance(arguments, dict)
    return {name for name, _ in calls}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tags", TAGS)
def test_every_call_that_is_opened_is_right(form: ToolFormat, tags: bool | None) -> None:
    _, grammars, stops = made(tags)
    seen: set[str] = set()
    for seed in range(12):
        rng = random.Random(seed)
        constraint = grammars.optional_tools(TOOLS, form, parallel=True)
        text, prose, count = "", "", rng.randint(1, 3)
        for _ in range(count):
            words_said = "".join(rng.choices(PROSE, k=rng.randint(0, 4)))
            prose += words_said
            say(tags, constraint, words_said)
            say(tags, constraint, "<tool_call>")
            assert constraint.mask() is not None and not constraint.finished
            call = call_of(tags, form, constraint, seed)
            assert call is not None and constraint.mask() is None  # free again
            text += f"{words_said}<tool_call>{call}"
        constraint.advance(min(stops))
        assert constraint.finished
        content, calls = parsed(text, form)
        assert len(calls) == count and content.replace("\n", "") == prose.replace("\n", "")
        seen |= check(calls)
    assert seen == {"search", "loose"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tags", TAGS)
def test_one_call_is_the_end(form: ToolFormat, tags: bool | None) -> None:
    constraint = made(tags)[1].optional_tools([STRICT], form)
    say(tags, constraint, "well, <tool_call>")
    text = call_of(tags, form, constraint, seed=3)
    assert text is not None and constraint.finished
    assert check(parsed(f"<tool_call>{text}", form)[1]) == {"search"}


@pytest.mark.parametrize("tags", TAGS)
def test_free_text_is_free(tags: bool | None) -> None:
    """Everywhere all tokens are allowed, but for those that open a call and go on wrongly."""
    words, grammars, stops = made(tags)
    known = words.get_vocab_size()
    bad = {words.token_to_id(piece) for piece in (">x", ">az")}
    for parallel in (False, True):
        constraint = grammars.optional_tools(TOOLS, "hermes", parallel=parallel)
        for text in [*PROSE, "<tool_call"]:
            say(tags, constraint, text)
            mask = constraint.mask()
            if text == "<tool_call":
                assert mask is not None and set(range(known)) - set(allowed(mask, SIZE)) == bad
            else:
                assert mask is None
        # A stop is no token of a call's.
        constraint.advance(min(stops))
        assert constraint.finished
        constraint.rollback(1)
        with pytest.raises(ValueError, match="not allowed"):
            constraint.advance(min(bad))
        constraint.advance(words.token_to_id(">"))
        mask = constraint.mask()
        assert mask is not None and not stops & set(allowed(mask, SIZE))


def test_the_token_that_ends_a_call_may_go_on_with_new_lines() -> None:
    words, grammars, _ = made(None)
    call = '<tool_call>\n{"name": "loose", "arguments": {}}\n</tool_call'
    constraint = grammars.optional_tools(TOOLS, "hermes", parallel=True)
    say(None, constraint, call)
    mask = constraint.mask()
    newlines = words.token_to_id(">\n\n")
    assert mask is not None
    assert set(allowed(mask, SIZE)) == {words.token_to_id(">"), newlines}
    constraint.advance(newlines)
    assert constraint.mask() is None
    say(None, constraint, call + ">")
    assert constraint.mask() is None and not constraint.finished


@pytest.mark.parametrize("tags", TAGS)
def test_rollback_over_calls_and_prose(tags: bool | None) -> None:
    words, grammars, _ = made(tags)
    call = (
        '<tool_call>\n{"name": "search", "arguments": {"query": "a<b", "limit": 7}}\n</tool_call>'
    )
    text = words.encode(f"<think>in <tool_call> here</think>\n< ok {call}\n{call} done").ids
    constraint = grammars.optional_tools(
        TOOLS, "hermes", parallel=True, begins="<think>", after="</think>"
    )
    walk_back_and_forth(constraint, list(text), seed=7, steps=600, back=0.1, most=12)


@pytest.mark.parametrize(
    ("said", "begins", "constrained"),
    [
        ("a <tool_call>", None, False),  # the prompt has opened the reasoning
        ("a <tool_call></think>\n\n<tool_call>", None, True),
        ("<think>a <tool_call>", "<think>", False),
        ("\n <think>a <tool_call></think>b<tool_call>", "<think>", True),
        ("<tool_call>", "<think>", True),
        ("<thin<tool_call>", "<think>", True),
        ("a <think><tool_call>", "<think>", True),
        ("<", "<think>", False),
    ],
)
def test_reasoning_is_free(said: str, begins: str | None, constrained: bool) -> None:
    """As the parser reads it: calls in the reasoning are none."""
    for tags in TAGS:
        constraint = made(tags)[1].optional_tools(
            TOOLS, "hermes", parallel=True, begins=begins, after="</think>"
        )
        say(tags, constraint, said)
        assert (constraint.mask() is not None) == constrained
    call = '\n{"name": "loose", "arguments": {}}\n</tool_call>'
    options = {"reasoning": begins is not None, "inside": begins is None}
    assert bool(parsed(said + call, "hermes", **options)[1]) == constrained


def test_the_places_do_not_depend_on_how_the_text_is_cut() -> None:
    free = FreeText(["<think>", "</think>", "<tool_call>"], lambda t: b"", 0, optional=True)
    rng = random.Random(1)
    pieces = ["<", "<t", "hink>", "</think>", "<tool_call>", "<tool_", "call>", " ", "\n", "x", "é"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=8)).encode()
        whole = free.step(free.start, text)
        place, at = free.start, 0
        while at < len(text):
            n = rng.randint(1, 4)
            place, rest = free.step(place, text[at : at + n])
            at += n
            if rest is not None:
                assert whole == (place, rest + text[at:])
                break
        else:
            assert whole == (place, None)
        opened = text.decode().lstrip().startswith("<think>")
        after = text.partition(b"</think>")[2] if opened else text
        assert (whole[1] is not None) == (b"<tool_call>" in after)


def test_only_strict_tools_are_refused() -> None:
    grammars = made(False)[1]
    for form in FORMS:
        with pytest.raises(UnsupportedSchema) as caught:
            grammars.optional_tools([LOOSE, Tool("bad", LOOSE.parameters)], form)
        assert caught.value.pointer == "/1/parameters/properties/a/not"


def test_a_text_that_repeats_its_beginning_is_found() -> None:
    free = FreeText(["aabaac"], lambda t: b"", 0)
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choices(["a", "aab", "aac", "b"], k=9)).encode()
        rest = free.step(free.start, text)[1]
        before, found, after = text.partition(b"aabaac")
        assert rest == (after if found else None), before
