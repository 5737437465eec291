"""A grammar and guesses: the mask follows the sequence inside a window, and no guess stays in it.

The grammar may begin behind the reasoning: then a window's first rows are free, the others not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor

from difyops.engine.grammar import Grammars
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import FinishReason, Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.engine.speculate import Drafter, PromptLookup
from difyops.engine.state import StatePool
from tests.engine import constrained, helped
from tests.engine.random_model import STOPS, tokenizer
from tests.engine.test_exact import answers, ended, made, prompts, running
from tests.engine.test_scheduler import NoText

WORDS = tokenizer()
WORDS.add_tokens([AddedToken("</think>", special=False)])
CLOSE = WORDS.token_to_id("</think>")
SIZE = WORDS.get_vocab_size()
STOP_IDS = frozenset(WORDS.token_to_id(stop) for stop in STOPS)
GRAMMARS = Grammars(WORDS, SIZE, STOP_IDS)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Paris", "x", None]},
        "days": {"type": "integer", "minimum": -9, "maximum": 999},
    },
    "required": ["name", "days"],
    "additionalProperties": False,
}
#: So that the reasoning of random weights ends, and white space does not go on for ever.
BIAS = {token: -50.0 for token in range(SIZE) if not WORDS.decode([token]).strip()} | {CLOSE: 5.0}

K = 4
#: Where in a window, which is the last token and K guesses, the reasoning closes; and how many of
#: the guesses behind that are right.
AIMS = [(place, right) for place in range(K + 1) for right in range(K + 1 - place)]

Prompt = tuple[int, ...]


def text_of(tokens: Sequence[int]) -> str:
    return str(WORDS.decode(list(tokens), skip_special_tokens=False))


def asked(prompt: Sequence[int], *, schema: bool = True, count: int = 48) -> Request:
    """Reasoning, and then an instance of the schema."""
    sampling = SamplingParams(count, temperature=0, logit_bias=BIAS, stop_ids=STOP_IDS)
    constraint = GRAMMARS.json_schema(SCHEMA, after="</think>") if schema else None
    return Request(list(prompt), sampling, NoText(), constraint)


def says(
    model: Decoder, drafter: Drafter | None, requests: Sequence[Request], said: list[list[int]]
) -> bool:
    """Whether an engine with this drafter says that; a request that breaks off says nothing."""
    engine = running(model, drafter, slots=32, prefix_bytes=10**9)
    try:
        return answers(engine, requests) == said
    except AssertionError:
        return False
    finally:
        ended(engine)


class Aimed(Drafter):
    """Guesses once for each request, so that its reasoning closes at one place of the window and
    so many guesses behind it are right. The wrong one is what would be said without the grammar."""

    name = "aimed"
    most = K

    def __init__(
        self, said: Mapping[Prompt, list[int]], unmasked: Mapping[Prompt, int],
        aims: Sequence[tuple[int, int]] = AIMS,
    ) -> None:  # fmt: skip
        self.said = said
        self.unmasked = unmasked
        self.aims = dict(zip(said, itertools.cycle(aims), strict=False))
        self.hit: set[tuple[int, int]] = set()

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        return torch.tensor([self._row(request, k) for request in requests])

    def _row(self, request: Request, k: int) -> list[int]:
        prompt = tuple(request.prompt)
        said, (place, right) = self.said[prompt], self.aims[prompt]
        start = said.index(CLOSE) + 1 - place
        end = start + place + right
        if request.count == end + 1:  # all of them came true, and the wrong one was replaced
            self.hit.add((place, right))
        if request.count != start:
            return [-1] * k
        return [*said[start:end], self.unmasked[*prompt, *said[:end]], *said[end : end + k]][:k]


@dataclass(frozen=True)
class Reasoned:
    """What plain decoding says, and what it would say next if there were no grammar."""

    model: Decoder
    said: Mapping[Prompt, list[int]]
    unmasked: Mapping[Prompt, int]

    def aimed(self, *aims: tuple[int, int]) -> Aimed:
        return Aimed(self.said, self.unmasked, aims)

    def same(self, drafter: Drafter | None) -> bool:
        requests = [asked(prompt) for prompt in self.said]
        return says(self.model, drafter, requests, list(self.said.values()))


@pytest.fixture(scope="module")
def reasoned() -> Reasoned:
    """Two prompts for each aim, whose reasoning is long enough for it; and they are valid."""
    plain = running(made("hybrid", vocabulary=SIZE), slots=64, prefill_tokens=1000)
    tried = prompts(240, seed=1, longest=20)
    freely = answers(plain, [asked(prompt, schema=False, count=16) for prompt in tried])
    long = [p for p, said in zip(tried, freely, strict=True) if CLOSE in set(said) - set(said[:K])]
    requests = [asked(prompt) for prompt in long[: 2 * len(AIMS)]]
    assert len(requests) == 2 * len(AIMS)
    known = {}
    for request, said in zip(requests, answers(plain, requests), strict=True):
        assert request.finish is FinishReason.STOP
        jsonschema.validate(json.loads(text_of(said).partition("</think>")[2]), SCHEMA)
        known[tuple(request.prompt)] = said
    cut = [
        (*prompt, *said[: said.index(CLOSE) + 1 + behind])
        for prompt, said in known.items()
        for behind in range(K + 1)
    ]
    # Without stop ids, so that the end is told as the token that it is.
    free = answers(plain, [Request(list(p), UNMASKED, NoText()) for p in cut])
    ended(plain)
    return Reasoned(plain.model, known, {p: said[0] for p, said in zip(cut, free, strict=True)})


UNMASKED = SamplingParams(1, temperature=0, logit_bias=BIAS)


def test_the_mask_switches_on_at_every_place_of_the_window(reasoned: Reasoned) -> None:
    drafter = reasoned.aimed(*AIMS)
    assert reasoned.same(drafter)
    assert drafter.hit == set(AIMS)


# --- Mutations: each of these faults must be noticed ---------------------------------------------


def test_a_mask_of_the_windows_first_row_alone_is_noticed(
    reasoned: Reasoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Engine._judge

    def judge(self: Engine, requests: Sequence[Request], *rest: Any) -> list[int]:
        constraints: list[Any] = [r.constraint for r in requests if r.constraint is not None]
        for constraint in constraints:
            mask = constraint.mask()
            constraint.mask = lambda mask=mask: mask
        taken = right(self, requests, *rest)
        for constraint in constraints:
            del constraint.mask
        return taken

    monkeypatch.setattr(Engine, "_judge", judge)
    assert reasoned.same(None)
    assert reasoned.same(reasoned.aimed((0, 0)))  # the first row is all that counts
    for place in range(1, K + 1):
        assert not reasoned.same(reasoned.aimed((place, 0)))


def test_a_rejected_guess_that_stays_in_the_grammar_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine tells its grammar a guess only once the model has said it. This one tells it all
    that fit, and does not take back those that were rejected."""
    plain = running(made("hybrid", vocabulary=constrained.SIZE))
    requests = [helped.asked(prompt, SCHEMA, count=30) for prompt in set(prompts(8, seed=3))]
    said = answers(plain, requests)
    known = {tuple(r.prompt): tokens for r, tokens in zip(requests, said, strict=True)}
    ended(plain)
    right = Engine._judge

    def judge(
        self: Engine, requests: Sequence[Request], logits: Tensor,
        guesses: Sequence[Sequence[int]], outputs: dict[Request, Output],
    ) -> list[int]:  # fmt: skip
        taken = right(self, requests, logits, guesses, outputs)
        for request, row, count in zip(requests, guesses, taken, strict=True):
            if request.constraint is not None and outputs[request].finish is None:
                request.constraint.rollback(1)
                for token in (*row[count - 1 :], request.tokens[-1]):
                    with contextlib.suppress(ValueError):
                        request.constraint.advance(token)
        return taken

    def same() -> bool:
        again = [helped.asked(prompt, SCHEMA, count=30) for prompt in known]
        return says(plain.model, helped.Helped(PromptLookup(), known), again, said)

    assert same()
    monkeypatch.setattr(Engine, "_judge", judge)
    assert not same()
