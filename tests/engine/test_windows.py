"""Passes with guesses as the GPU runs them, here without graphs: drafting, judging and settling
where the model is change no token, and leave the state that the host's way leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from difyops.engine import drafters, windows
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Request
from difyops.engine.runner import Engine
from difyops.engine.speculate import Drafter, OnDevice
from tests.engine.test_exact import (
    Foreseen,
    answers,
    asked,
    drafting,
    ended,
    made,
    prompts,
    running,
)


def captured(model: Decoder, drafter: Drafter, **options: Any) -> Engine:
    """An engine with passes as they are captured, but nothing captures them."""
    options = {"slots": 4, "context": 256, "prefill_tokens": 48, "guesses": drafter.most} | options
    engine = Engine(model, drafter=drafter, **options)
    guesses = range(1, drafter.most + 1)
    assert engine._guessing is not None
    engine._guessing.windows = windows.Captured(
        model, engine.pool, drafter, guesses, lambda work: work
    )
    engine.start()
    return engine


def mixed(texts: Sequence[Sequence[int]]) -> list[Request]:
    """Greedy ones, sampled ones, and such as want no guesses."""
    found = []
    for number, text in enumerate(texts):
        params = {"temperature": 1.0, "seed": number} if number % 5 == 4 else {}
        (request,) = asked([text], 9 + number, **params)
        request.speculate = number % 3 > 0
        found.append(request)
    return found


@pytest.mark.parametrize(
    "name", ["mtp", "recurrent mtp", "3 mtp", "medusa", "ngram", "draft", "itself"]
)
def test_no_token_is_another(name: str) -> None:
    model, drafter = drafting(name)
    wanted = [(7,), (8, 3), *prompts(8, seed=2)]  # some are shorter than three modules are deep
    plain, engine = running(model), captured(model, drafter, prefix_bytes=10**9)
    for ask in (asked, mixed):
        said = answers(plain, ask(wanted))
        for _ in range(2):
            assert answers(engine, ask(wanted)) == said
    counts = engine.stats().counters
    assert counts.drafted[0] > 0
    if name == "itself":
        assert counts.accepted[0] > 0.6 * counts.drafted[0]
    ended(plain)
    ended(engine)


@pytest.mark.parametrize("kind", ["gated_delta", "hybrid", "mamba2"])
def test_what_is_kept_of_an_answer_is_what_it_says(kind: str) -> None:
    """Ends by a stop token, looked for or not, and by length, within windows that came true."""
    model = made(kind)
    wanted = prompts(10, seed=3)
    plain = running(model)
    said = answers(plain, asked(wanted))
    ending = []
    for number, text in enumerate(said):
        # More stop tokens than are looked for on the device.
        more = [60 + i for i in range(4)] if number % 2 else []
        ending.append(frozenset([text[5 + number % 7], *(-9 - i for i in range(len(more)))]))

    def turns(engine: Engine) -> list[list[int]]:
        first = [asked([p], 24, stop_ids=s)[0] for p, s in zip(wanted, ending, strict=True)]
        found = answers(engine, first)
        longer = [[*p, *t, 1] for p, t in zip(wanted, found, strict=True)]
        return [*found, *answers(engine, asked(longer, 11))]

    expected = turns(plain)
    foreseen = Foreseen(3, dict(zip(wanted, said, strict=True)))
    engine = captured(model, foreseen, prefix_bytes=10**9)
    assert turns(engine) == expected
    assert turns(engine) == expected
    stats = engine.stats()
    assert stats.prefix is not None and stats.prefix.reused > 0
    assert stats.counters.accepted[1] > 0
    ended(plain)
    ended(engine)


def test_a_draft_ahead_is_taken_up_only_where_it_was_made() -> None:
    model, drafter = drafting("itself")
    assert isinstance(drafter, OnDevice)
    drafts: list[int] = []
    guess = drafter.guess

    def counted(*given: Any) -> None:
        drafts.append(1)
        guess(*given)

    drafter.guess = counted  # type: ignore[method-assign]
    engine = captured(model, drafter, slots=1)
    answers(engine, asked(prompts(1), 60))
    passes = engine.stats().counters.passes
    assert passes < len(drafts) <= passes + 3
    ended(engine)


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_synthetic_acceptance_is_the_rate(rate: float) -> None:
    model, drafter = drafting("mtp")
    assert isinstance(drafter, OnDevice)
    synthetic = drafters.SyntheticAcceptance(drafter, rate, seed=1, device=torch.device("cpu"))
    engine = captured(model, synthetic)
    said = answers(engine, asked(prompts(8), 60))
    assert all(len(tokens) == 60 for tokens in said)
    counts = engine.stats().counters
    for place in (0, 1):
        share = counts.accepted[place] / counts.drafted[place]
        assert share == pytest.approx(rate, abs=0.12)
    ended(engine)


def test_what_cannot_be_captured_is_run_as_before() -> None:
    model, drafter = drafting("mtp")
    assert not windows.possible(model, drafter)  # on a CPU
    engine = Engine(model, slots=1, context=64, drafter=drafter)
    assert engine._guessing is not None
    assert isinstance(engine._guessing.windows, windows.Eager)


def test_places_count_up_to_the_first_that_does_not() -> None:
    guesses = torch.tensor([[5, 6, 7], [5, 9, 7], [5, 6, 7], [5, 6, 7], [-1, 6, 7]])
    best = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [-1, 6, 7, 8]])
    room = torch.tensor([9, 9, 2, 9, 9])
    stops = torch.tensor([[-1], [-1], [-1], [6], [-1]])
    answers, last = torch.zeros(5, 8, dtype=torch.int64), room.clone()
    windows.judge(guesses, best, room, stops, answers, last)
    assert answers[:, 0].tolist() == [4, 2, 2, 2, 1]
    assert answers[:, 1:].tolist() == torch.cat((best, guesses), dim=1).tolist()
    assert last.tolist() == [8, 6, 6, 6, -1]
