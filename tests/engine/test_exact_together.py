"""Gate 3 as a whole: every mixer x {off, MTP with k = 1..4, n-gram} x {cold, warm, a next turn} x
{free, JSON schema}, greedily and in float64, against an engine with none of it.

1,080 prompts are asked, half of them with a schema: 20 for each mixer and way of guessing. Ten of
these are asked cold and warm; the other ten go on from the answers to them. Two models with several
MTP modules come on top.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import pytest

from difyops.engine import drafters
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import FinishReason, Request
from difyops.engine.runner import Engine
from tests.engine import tiny
from tests.engine.constrained import SIZE, TOKENIZER
from tests.engine.helped import Helped, asked
from tests.engine.test_exact import KINDS, answers, ended, made, running

GUESSING = ("off", "mtp 1", "mtp 2", "mtp 3", "mtp 4", "ngram 4")
#: For each mixer and way of guessing, in two turns.
PROMPTS = 20
SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "days": {"type": "integer", "minimum": -50, "maximum": 50},
        },
        "required": ["name"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "the quick", 7, None]}, "maxItems": 4},
    {"anyOf": [{"type": "integer", "minimum": -99, "maximum": 99}, {"type": "null"}]},
]
#: prompt -> the schema of its answer, or none.
Turns = Mapping[tuple[int, ...], Any]


def test_a_thousand_prompts_are_compared() -> None:
    """As many as each test below says that it has compared."""
    assert len(KINDS) * len(GUESSING) * PROMPTS >= 1000


@pytest.fixture(scope="module", params=[*KINDS, "gated_delta 2", "hybrid 3"])
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    """An engine that neither guesses nor keeps; its model has MTP of the same mixer: one module, or
    as many as the name says."""
    pattern, _, count = request.param.partition(" ")
    name = "softmax" if pattern == "hybrid" else pattern
    mtp = [{"mixer": name, **tiny.LAYERS[name]}]
    model = made(pattern, vocabulary=SIZE, mtp=mtp, mtp_modules=int(count or 1))
    engine = running(model, slots=PROMPTS // 2, prefill_tokens=400)
    yield request.param, engine
    ended(engine)


def helped(model: Decoder, guessing: str, known: dict[tuple[int, ...], list[int]]) -> Helped | None:
    drafter = drafters.choose(guessing.split()[0], model)
    return None if drafter is None else Helped(drafter, known)


def first_turns(dice: random.Random) -> Turns:
    """Around a block of the prefix cache, which has 64 tokens."""
    turns: dict[tuple[int, ...], Any] = {}
    for i in range(PROMPTS // 2):
        prompt = tuple(dice.randrange(SIZE) for _ in range(dice.choice((3, 64, 65, 80, 129))))
        turns[prompt] = SCHEMAS[i // 2 % len(SCHEMAS)] if i % 2 else None
    return turns


def plain_answers(plain: Engine, turns: Turns) -> dict[tuple[int, ...], list[int]]:
    said = answers(plain, [asked(*turn) for turn in turns.items()])
    return dict(zip(turns, said, strict=True))


def check_valid(requests: Sequence[Request], turns: Turns) -> None:
    """What has ended by itself is an instance of its schema; some have."""
    over = [r for r in requests if r.constraint and r.finish is FinishReason.STOP]
    for r in over:
        text = TOKENIZER.decode(list(r.generated), skip_special_tokens=False)
        jsonschema.validate(json.loads(text), turns[tuple(r.prompt)])
    assert over


@pytest.mark.parametrize("guessing", GUESSING)
def test_nothing_of_it_changes_a_token(kind: tuple[str, Engine], guessing: str) -> None:
    name, plain = kind
    dice = random.Random(f"{name}, {guessing}")
    known: dict[tuple[int, ...], list[int]] = {}
    drafter = helped(plain.model, guessing, known)
    k = int(guessing[-1]) if drafter is not None else None
    engine = running(
        plain.model, drafter, guesses=k, slots=PROMPTS, prefix_bytes=10**9, prefill_tokens=400
    )

    def compare(turns: Turns) -> list[Request]:
        requests = [asked(*turn) for turn in turns.items()]
        assert answers(engine, requests) == [known[prompt] for prompt in turns]
        check_valid(requests, turns)
        return requests

    first = first_turns(dice)
    known |= plain_answers(plain, first)
    assert not any(r.reused for r in compare(first))
    second = {
        (*prompt, *known[prompt], *(dice.randrange(SIZE) for _ in range(3))): schema
        for prompt, schema in first.items()
    }
    known |= plain_answers(plain, second)
    again = compare({**first, **second})
    for prompt, warm, next_turn in zip(first, again, again[len(first) :], strict=False):
        # Whole blocks, and never the last token; and all of a turn but what it chose last.
        assert warm.reused >= (len(prompt) - 1) // 64 * 64
        assert next_turn.reused >= len(prompt) + len(known[prompt]) - 1
    assert len(known) == PROMPTS
    if isinstance(drafter, Helped):
        assert drafter.came_true == set(range(int(guessing[-1]) + 1))
    ended(engine)
