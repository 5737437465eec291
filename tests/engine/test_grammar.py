"""Masks are exact, also after reasoning, and tool calls are as their schemas say."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import jsonschema
import pytest

from difyops.engine.grammar import GrammarFailed, Grammars
from difyops.engine.schema import UnsupportedSchema
from difyops.engine.toolcalls import ChatParser
from difyops.engine.toolformats import Tool, ToolFormat
from tests.engine.constrained import (
    BYTES,
    GRAMMARS,
    KNOWN,
    ORDINARY,
    SIZE,
    STOP_IDS,
    TOKENIZER,
    ids,
    ids_of,
    taken,
    walk_back_and_forth,
    write,
)
from tests.engine.random_model import STOPS, RandomModel, allowed, tokenizer

WORDS = ["a", "ab", "abc", "the quick", "the brown", "true", "{}", "é", 'say "x"', "\n\n", "日本"]


def test_the_mask_of_a_choice_is_what_its_words_say() -> None:
    """At every prefix of every word: exactly the tokens whose bytes keep to a word."""
    words = [word.encode() for word in WORDS]
    rng = random.Random(0)
    for word in words:
        for _ in range(3):
            constraint, done = GRAMMARS.choice(WORDS), b""
            while True:
                expected = {
                    t for t in ORDINARY if any(w.startswith(done + BYTES[t]) for w in words)
                }
                expected |= STOP_IDS if done in words else set()
                assert ids(constraint) == expected, done
                assert constraint.finished == (expected == STOP_IDS)
                ahead = [t for t in expected - STOP_IDS if word.startswith(done + BYTES[t])]
                if not ahead:
                    break
                token = rng.choice(ahead)
                constraint.advance(token)
                done += BYTES[token]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "integer"}, "n": {"enum": ["x", None]}}},
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        {"type": "number", "minimum": -1.5, "maximum": 20},
        {"type": "string", "pattern": "^[a-c]{2,}é?$"},
    ],
)
def test_the_mask_is_what_each_token_alone_would_get(schema: dict[str, Any]) -> None:
    """The tokens that advance takes, and those whose bytes one by one are taken, are the mask's."""
    single = {data: t for t, data in enumerate(BYTES) if len(data) == 1}
    rng = random.Random(1)
    constraint = GRAMMARS.json_schema(schema)
    for _ in range(25):
        mask = ids(constraint)
        for token in range(SIZE):
            one = taken(constraint, [token])
            assert one == (token in mask), token
            if (
                token in ORDINARY
                and not BYTES[token].startswith(b"<tool")
                and BYTES[token][:2] != b"</"
            ):
                spelled = [single[bytes([b])] for b in BYTES[token]]
                assert taken(constraint, spelled) == one, BYTES[token]
        if not (choices := sorted(mask - STOP_IDS)):
            break
        constraint.advance(rng.choice(choices))


def test_rollback_undoes_any_walk() -> None:
    rng = random.Random(2)
    constraint = GRAMMARS.json_schema({"type": "array", "items": {"type": "string"}})
    walk: list[int] = []
    masks = [ids(constraint)]
    for _ in range(200):
        if walk and (rng.random() < 0.4 or masks[-1] == STOP_IDS):
            n = rng.randint(1, min(5, len(walk)))
            constraint.rollback(n)
            del walk[-n:], masks[-n:]
            assert ids(constraint) == masks[-1]
        else:
            token = rng.choice(sorted(masks[-1]))
            constraint.advance(token)
            walk.append(token)
            masks.append(ids(constraint))
    with pytest.raises(ValueError, match="to take back"):
        constraint.rollback(len(walk) + 1)


def test_the_end() -> None:
    constraint = GRAMMARS.choice(["ab"])
    assert not constraint.finished and not ids(constraint) & STOP_IDS
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(min(STOP_IDS))
    for token in ids_of("ab"):
        constraint.advance(token)
    assert constraint.finished and ids(constraint) == STOP_IDS
    constraint.advance(max(STOP_IDS))
    assert constraint.finished and ids(constraint) == STOP_IDS
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(max(STOP_IDS))
    constraint.rollback(2)
    assert not constraint.finished
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(KNOWN + 1)  # an id that the tokenizer lacks
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(-1)


def test_regex_and_choice() -> None:
    for seed in range(20):
        text = write(GRAMMARS.regex(r"[a-c]{2,4}(-\d+)?/x"), seed)
        assert text is not None and re.fullmatch(r"[a-c]{2,4}(-[0-9]+)?/x", text)
        assert write(GRAMMARS.choice(WORDS), seed) in WORDS
    with pytest.raises(ValueError, match="cannot be used"):
        GRAMMARS.regex("(a")
    for bad in ([], ["a", ""], ["x"] * 2000):
        with pytest.raises(ValueError, match="choice"):
            GRAMMARS.choice(bad)
    with pytest.raises(ValueError, match="characters"):
        GRAMMARS.regex("a" * 100_000)


def test_a_regex_is_refused_before_it_fails() -> None:
    text = write(GRAMMARS.regex("a?" * 500), patience=600)
    assert text is not None and set(text) <= {"a"}
    with pytest.raises(ValueError, match="cannot be used: its patterns or lengths") as caught:
        GRAMMARS.regex("a?" * 3000)
    assert len(str(caught.value)) < 100


def test_a_limit_that_is_met_later_says_so_plainly() -> None:
    """The grammar is small until its third token."""
    constraint = GRAMMARS.regex("xyz(" + "a?" * 3000 + ")")
    with pytest.raises(GrammarFailed, match="cannot be followed further: its patterns") as caught:
        for token in ids_of("xyzaaa"):
            constraint.mask()
            constraint.advance(token)
    assert "lexer" not in str(caught.value) and "\n" not in str(caught.value)


def test_json_object() -> None:
    for seed in range(5):
        assert isinstance(json.loads(write(GRAMMARS.json_object(), seed) or ""), dict)


# Reasoning


def test_nothing_is_constrained_until_the_reasoning_closes() -> None:
    constraint = GRAMMARS.choice(["abc", "true"], after="</think>")
    for token in ids_of('I think </thi <"} </thinking> {'):
        constraint.advance(token)
        assert not constraint.finished and ids(constraint) == set(range(KNOWN)) - STOP_IDS
    for token in ids_of("</think"):
        constraint.advance(token)
    (closing,) = ids_of(">")
    assert closing in ids(constraint)
    constraint.advance(closing)
    begun = {t for t in ORDINARY if b"\n\nabc".startswith(BYTES[t]) or b"abc".startswith(BYTES[t])}
    assert begun <= ids(constraint) and not ids(constraint) & STOP_IDS
    constraint.rollback(3)
    for token in ids_of("till </think>\n\ntrue"):
        constraint.advance(token)
    assert constraint.finished and ids(constraint) == STOP_IDS


def test_rollback_over_the_boundary() -> None:
    text = ids_of("so <think> it is</think>\n\nthe quick")
    constraint = GRAMMARS.choice(["the quick", "no"], after="</think>")
    walk_back_and_forth(constraint, text, seed=5, steps=300, back=0.2, most=4)


def test_a_token_that_closes_and_goes_on() -> None:
    """Such tokens are allowed exactly when what follows the end is."""
    newlines, more = TOKENIZER.token_to_id(">\n\n"), TOKENIZER.token_to_id(">x")
    for text, fits in (("abc", False), ("xyz", True)):
        constraint = GRAMMARS.choice([text], after="</think>")
        for token in ids_of("hm </think"):
            constraint.advance(token)
        forbidden = set(range(KNOWN)) - ids(constraint)
        assert forbidden == STOP_IDS | {TOKENIZER.token_to_id(">az")} | (set() if fits else {more})
        assert taken(constraint, [newlines]) and taken(constraint, [more]) == fits
        constraint.advance(more if fits else newlines)
        assert not constraint.finished and not ids(constraint) & STOP_IDS
        for token in ids_of(text[fits:]):
            constraint.advance(token)
        assert constraint.finished


def test_a_refused_end_leaves_the_grammar_where_it_was() -> None:
    constraint = GRAMMARS.choice(["abc"], after="</think>")
    for token in ids_of("hm </think"):
        constraint.advance(token)
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(TOKENIZER.token_to_id(">az"))  # its a would fit, its z does not
    constraint.advance(TOKENIZER.token_to_id(">"))
    for token in ids_of("abc"):
        constraint.advance(token)
    assert constraint.finished


def test_a_model_may_know_fewer_tokens_than_its_tokenizer() -> None:
    grammars = Grammars(TOKENIZER, KNOWN - 3, STOP_IDS)
    mask = grammars.regex("(?s:.*)").mask()
    assert mask is not None and mask.shape == ((KNOWN - 3 + 31) // 32,)
    assert len(allowed(mask, KNOWN - 3)) > 200


def test_what_was_asked_for_comes_after_the_reasoning() -> None:
    """A model that would rather stop has to close its reasoning; max_tokens bounds that."""
    made = [
        GRAMMARS.choice(["abc"], after="</think>"),
        GRAMMARS.json_object(after="</think>"),
        GRAMMARS.tools(TOOLS, "hermes", after="</think>"),
    ]
    for constraint in made:
        for token in ids_of("hm </thin"):
            assert not ids(constraint) & STOP_IDS
            for stop in STOP_IDS:
                assert not taken(constraint, [stop])
            constraint.advance(token)
        constraint.mask()[:] = 0  # whoever asks gets an array of his own
        assert len(ids(constraint)) == KNOWN - len(STOP_IDS)
    free = GRAMMARS.optional_tools(TOOLS, "hermes", after="</think>")
    assert free.mask() is None and taken(free, [min(STOP_IDS)])
    free.advance(min(STOP_IDS))
    assert free.finished and ids(free) == STOP_IDS
    free.rollback(1)
    assert not free.finished and free.mask() is None


# Tools


TOOLS = [
    Tool("no_arguments", {"type": "object", "properties": {}}),
    Tool(
        "search",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string", "minLength": 1, "maxLength": 12},
                "free": {"type": "string"},
                "unit": {"type": "string", "enum": ["c", "f</parameter", "k l"]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
                "limit": {"type": "integer", "minimum": 1, "maximum": 50},
                "exact": {"type": "boolean"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "mixed": {"type": ["string", "integer", "array"], "minimum": 5},
                "where": {"$ref": "#/$defs/place"},
            },
            "required": ["query", "where"],
            "additionalProperties": False,
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"lat": {"type": "number"}},
                }
            },
        },
    ),
]


def calls_in(text: str, form: ToolFormat) -> list[tuple[str, str]]:
    parser = ChatParser(form, TOOLS)
    deltas = [*parser.push(text), *parser.flush()]
    assert not any(d.content or d.reasoning for d in deltas), text
    calls: list[list[str]] = []
    for delta in deltas:
        assert delta.call is not None
        if delta.call.name is not None:
            calls.append([delta.call.name, ""])
        calls[-1][1] += delta.call.arguments
    return [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_a_random_model_calls_tools_as_it_should(
    form: ToolFormat, parallel: bool, special: bool
) -> None:
    """From the grammar through the parser: a known tool and arguments that its schema takes."""
    made = tokenizer(special_tags=special)
    stops = {made.token_to_id(stop) for stop in STOPS}
    grammars = Grammars(made, SIZE, stops)
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    most = 0
    for seed in range(25):
        constraint = grammars.tools(TOOLS, form, parallel=parallel)
        model = RandomModel(made, SIZE, stops, seed)
        end = "\n</parameter>\n" if form == "qwen3_coder" else ""
        text = model.write(constraint, patience=150 if parallel else 40, end=end)
        assert text is not None and text.startswith("<tool_call>\n")
        calls = calls_in(text, form)
        most = max(most, len(calls))
        assert calls
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
    assert (most > 1) == parallel


def test_a_named_tool_is_the_one_that_is_called() -> None:
    for form in ("hermes", "qwen3_coder"):
        text = write(GRAMMARS.tools(TOOLS[:1], form))  # type: ignore[arg-type]
        assert text is not None and calls_in(text, form)[0][0] == "no_arguments"  # type: ignore[arg-type]


def test_tools_after_reasoning() -> None:
    constraint = GRAMMARS.tools(TOOLS, "hermes", after="</think>")
    for token in ids_of("hm</think>\n\n"):
        constraint.advance(token)
    text = write(constraint)
    assert text is not None and calls_in(text, "hermes")


@pytest.mark.parametrize(
    ("form", "parameters", "pointer"),
    [
        ("hermes", {"properties": {"a": {"not": {}}}}, "/1/parameters/properties/a/not"),
        ("hermes", {"type": "string"}, "/1/parameters/type"),
        (
            "hermes",
            {"properties": {"a": {"pattern": "(?=a)"}}},
            "/1/parameters/properties/a/pattern",
        ),
        ("qwen3_coder", {"anyOf": [{"required": ["a"]}]}, "/1/parameters/anyOf"),
        ("qwen3_coder", {"required": ["a"]}, "/1/parameters/required"),
        ("qwen3_coder", {"properties": {"a>": {}}}, "/1/parameters/properties"),
        (
            "qwen3_coder",
            {"properties": {"a": {"type": "string", "format": "uri"}}},
            "/1/parameters/properties/a/format",
        ),
    ],
)
def test_a_tool_that_cannot_be_enforced_is_named(
    form: ToolFormat, parameters: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        GRAMMARS.tools([TOOLS[0], Tool("bad", parameters)], form)
    assert caught.value.pointer == pointer
    with pytest.raises(UnsupportedSchema, match="tools"):
        GRAMMARS.tools([], form)


# One for all


def test_grammars_are_compiled_once_and_forgotten_in_turn() -> None:
    grammars = Grammars(TOKENIZER, SIZE, STOP_IDS, cache=2)
    for text in ("a", "b", "a", "c"):
        grammars.choice([text])
    assert len(grammars._compiled) == 2
    assert ['"a"' in key for key in grammars._compiled] == [True, False]


def test_threads_share_grammars() -> None:
    grammars = Grammars(TOKENIZER, SIZE, STOP_IDS, cache=3)
    schemas = [
        {"type": "array", "items": {"const": i}, "minItems": 2, "maxItems": 2} for i in range(6)
    ]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for n in range(12):
            i = (seed + n) % len(schemas)
            text = write(grammars.json_schema(schemas[i]), seed)
            if text is None or json.loads(text) != [i, i]:
                wrong.append((i, text))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stop_ids_have_to_exist() -> None:
    for bad in (set(), {KNOWN}, {-1}):
        with pytest.raises(ValueError, match="stop_ids"):
            Grammars(TOKENIZER, SIZE, bad)
