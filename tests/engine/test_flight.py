"""A step launched before the last one was seen: the same answers, in the order that pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from difyops.engine import flight, graphs
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.engine.slots import IntegrityError
from tests.engine.test_exact import CONTEXT, answers, asked, ended, made, prompts, running
from tests.engine.test_runner import Heard, Words, request

KINDS = ("hybrid", "gated_delta", "softmax")


def ahead(model: Decoder, seen: list[str] | None = None, **options: Any) -> Engine:
    """The steps of a GPU on a CPU: each graph is its work. `seen` hears what happens."""
    options = {"slots": 4, "context": CONTEXT, "prefill_tokens": 48} | options
    engine = Engine(model, **options)
    with torch.inference_mode():
        engine._steps = steps = graphs.Captured(model, engine.pool, lambda work: work)
    if seen is not None:
        run, land = steps.run, engine._land

        def runs(tokens: Sequence[int], slots: Sequence[int]) -> graphs.Stepped:
            seen.append("step on" if graphs.CHOSEN in tokens else "step")
            return run(tokens, slots)

        def lands(coming: flight.Flight | None) -> None:
            seen.append("see" if coming is not None else "")
            land(coming)

        steps.run, engine._land = runs, lands  # type: ignore[method-assign]
    engine.start()
    return engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [0, 10**9, 10**5])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_it_says_what_is_said_without(kind: str, cache: int, temperature: float) -> None:
    """Cold and warm, with preemptions, stop tokens, and sequences that end a step too late."""
    model, texts = made(kind), prompts(24)

    def wanted() -> list[Request]:
        found = asked(texts, temperature=temperature, top_p=0.9, stop_ids=frozenset({3, 17}))
        for i, one in enumerate(found):
            one.sampling = SamplingParams(
                **vars(one.sampling) | {"max_tokens": 1 + 5 * i % 24, "seed": i}
            )
        return found

    plain = running(model)
    said = answers(plain, wanted())
    ended(plain)
    engine = ahead(model, pages=12, prefix_bytes=cache)
    for _ in range(3 if cache else 1):
        assert answers(engine, wanted()) == said
    if kind != "gated_delta":
        assert engine.stats().preemptions > 0
    if cache:
        # A next turn: the answer, its end and a question.
        turns = [(*t, *s, 3, 9, 1) for t, s in zip(texts, said, strict=True)]
        plain = running(model)
        next_said = answers(plain, asked(turns))
        ended(plain)
        assert answers(engine, asked(turns)) == next_said
    ended(engine)


def test_a_step_is_launched_before_the_last_one_was_seen() -> None:
    seen: list[str] = []
    engine = ahead(made("hybrid"), seen)
    answers(engine, asked([(1, 2, 3)], count=5))
    ended(engine)
    # The prompt chooses the first token; 4 steps follow.
    assert [e for e in seen if e] == ["step on", "see"] * 4 + ["see"]


def test_a_row_that_the_host_must_look_at_makes_all_wait() -> None:
    seen: list[str] = []
    engine = ahead(made("hybrid"), seen)
    plain = running(made("hybrid"))
    for params in ({"logprobs": 1}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2}):
        texts = prompts(6)
        wanted = asked(texts[:1], **params) + asked(texts[1:])
        again = asked(texts[:1], **params) + asked(texts[1:])
        assert answers(engine, wanted) == answers(plain, again)
    ended(plain)
    ended(engine)
    assert "step" in seen and "step on" in seen


def test_a_step_that_fails_ends_its_requests_alone() -> None:
    model = made("hybrid")
    engine = ahead(model)
    real, left = engine._steps.run, [3]

    def fails(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("planted")
        return real(*args)

    engine._steps.run = fails  # type: ignore[method-assign]
    (end,) = Heard(engine, request([1, 2], 20)).all()[-1:]
    assert "RuntimeError" in str(end.error)
    assert len(Heard(engine, request([1, 2], 20)).tokens()) == 20
    ended(engine)


def test_a_cancelled_request_leaves_and_a_text_stops() -> None:
    engine = ahead(made("hybrid"))
    said = Heard(engine, request([5, 1], 9)).tokens()
    cut = next(i for i in range(1, 9) if said[i] not in said[:i])
    got = Heard(engine, Request([5, 1], SamplingParams(9, temperature=0.0), Words(said[cut])))
    assert [t for output in got.all() for t in output.tokens] == said[: cut + 1]
    heard = [Heard(engine, request([i], 200)) for i in range(1, 8)]
    heard[0].outputs.get(timeout=30)
    for one in heard:
        engine.cancel(one.request)
    assert {one.all()[-1].finish for one in heard} <= {"cancelled"}
    ended(engine)


def test_books_are_checked_when_nothing_is_on_its_way() -> None:
    engine = ahead(made("hybrid"))
    answers(engine, asked(prompts(3)))
    engine.pool.table._free_slots.pop()
    Heard(engine, request([1])).all()
    engine._thread.join(10)
    assert IntegrityError.__name__ in str(engine.failure)
    engine.stop()
