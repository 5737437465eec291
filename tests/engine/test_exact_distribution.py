"""Gate 4 by enumeration: with guesses and a grammar, sampled answers have the distribution of the
model's own masked scores, exactly.

A request draws a number in [0, 1) for each of its tokens. All the answers that there are, over a
vocabulary of 8, share the numbers among them; the engine has to give each answer at the lowest and
the highest of its numbers. Then its share is what its numbers span, and not only nearly so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from difyops.engine import drafters, sample
from difyops.engine.grammar import Grammars
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Constraint, Request, SamplingParams
from tests.engine.random_model import allowed
from tests.engine.test_exact import RECURRENT_MTP, answers, ended, made, running
from tests.engine.test_scheduler import NoText

#: 7 tokens, the last of them the end; the model's vocabulary is padded, as real ones are.
LETTERS, STOP, SIZE = "ab1,[]", 6, 8
PROMPT = (0, 2, 1)
#: Nearer than this to another answer's numbers, rounding may decide.
EDGE = 1e-9


def grammars() -> Grammars:
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken("<e>", special=True)])
    return Grammars(words, SIZE, {STOP})


GRAMMARS = grammars()
LISTS = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}}


@dataclass(frozen=True)
class Case:
    """Answers of at most `longest` tokens, out of a vocabulary of `size`."""

    size: int
    longest: int
    constraint: Callable[[], Constraint | None]


CASES = {
    "free": Case(3, 4, lambda: None),
    "schema": Case(SIZE, 6, lambda: GRAMMARS.json_schema(LISTS)),
    "reasoning": Case(SIZE, 3, lambda: GRAMMARS.regex("[ab]1?,*", after="b")),
}


@dataclass(frozen=True)
class Answer:
    """Its tokens, and for each of these and for the end the numbers that draw it."""

    tokens: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        return float(np.prod(np.subtract(self.high, self.low)))


NOTHING = Answer(())


def enumerated(
    model: Decoder, longest: int, constraint: Constraint | None, so_far: Answer = NOTHING
) -> Iterator[Answer]:
    """Every answer that begins so."""
    scores = model.logits(model(torch.tensor([[*PROMPT, *so_far.tokens]])))[0, -1]
    mask = None if constraint is None else constraint.mask()
    taken = range(len(scores)) if mask is None else allowed(mask, SIZE).tolist()
    bounds = itertools.accumulate(scores[taken].softmax(-1).tolist(), initial=0.0)
    for token, (low, high) in zip(taken, itertools.pairwise(bounds), strict=True):
        numbers = (*so_far.low, low), (*so_far.high, high)
        if token == STOP:
            yield Answer(so_far.tokens, *numbers)
            continue
        answer = Answer((*so_far.tokens, token), *numbers)
        if constraint is not None:
            constraint.advance(token)
        if len(answer.tokens) == longest or (constraint is not None and constraint.finished):
            yield answer
        else:
            yield from enumerated(model, longest, constraint, answer)
        if constraint is not None:
            constraint.rollback(1)


@pytest.mark.parametrize("name", CASES)
def test_guesses_leave_every_answer_its_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = made("hybrid", vocabulary=case.size, mtp=RECURRENT_MTP, seed=5)
    every = list(enumerated(model, case.longest, case.constraint()))
    assert len(every) > 50
    assert sum(answer.share for answer in every) == pytest.approx(1, abs=1e-12)
    drawn = [[n + EDGE for n in answer.low] for answer in every]
    drawn += [[n - EDGE for n in answer.high] for answer in every]
    monkeypatch.setattr(sample, "uniform", lambda seed, at: drawn[seed][at - len(PROMPT)])
    drafter = drafters.choose("mtp", model)
    engine = running(model, drafter, guesses=2, slots=128, max_waiting=len(drawn))
    requests = []
    for seed in range(len(drawn)):
        params = SamplingParams(case.longest, seed=seed, stop_ids=frozenset({STOP}))
        requests.append(Request(PROMPT, params, NoText(), case.constraint()))
    assert answers(engine, requests) == 2 * [list(answer.tokens) for answer in every]
    counts = engine.stats().counters
    assert 0 < counts.accepted[0] < counts.drafted[0]
    ended(engine)
