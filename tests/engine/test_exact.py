"""Gate 3: neither speculation, nor a kept prefix, nor a grammar changes a token. In float64.

What is compared is the engine with everything on against the same engine with everything off, for
every mixer. A random model's own drafts are nearly never right, so most runs use `Foreseen`, which
knows the answer and spoils some of it: every number of accepted tokens occurs.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from difyops.engine import drafters
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import FinishReason, Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.engine.speculate import Drafter, PromptLookup
from difyops.engine.state import StatePool
from tests.engine import tiny
from tests.engine.test_scheduler import NoText

VOCABULARY = 60
CONTEXT = 256
KINDS = (*tiny.LAYERS, "hybrid")

Said = dict[tuple[int, ...], list[int]]


class Foreseen(Drafter):
    """A stand-in for a good drafter: it has read the answers, and spoils a third of its guesses."""

    name = "foreseen"

    def __init__(self, most: int, answers: Said, seed: int = 0) -> None:
        self.most = most
        self.answers = answers
        self.dice = random.Random(seed)

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        rows = []
        for request in requests:
            ahead = self.answers.get(tuple(request.prompt), [])[request.count :][:k]
            row = [t if self.dice.random() < 0.67 else self.dice.randrange(-1, VOCABULARY)
                   for t in ahead]  # fmt: skip
            rows.append(row + [-1] * (k - len(row)))
        return torch.tensor(rows).view(len(rows), k)


class Always:
    """Instead of Adaptive: always as many guesses as there may be."""

    def __init__(self, k: int) -> None:
        self.k = k

    def choose(self, batch: int) -> int:
        return self.k

    def took(self, *measured: object) -> None: ...

    def came_true(self, *counted: object) -> None: ...


def made(kind: str, **keys: Any) -> Decoder:
    torch.set_num_threads(1)
    keys = {"vocabulary": VOCABULARY, "context": CONTEXT} | keys
    return tiny.model(kind, dtype=torch.float64, **keys)[0]


def running(model: Decoder, drafter: Drafter | None = None, **options: Any) -> Engine:
    options = {"slots": 4, "context": CONTEXT, "prefill_tokens": 48} | options
    engine = Engine(model, drafter=drafter, **options)
    if drafter is not None:
        engine._adaptive = Always(drafter.most)  # type: ignore[assignment]
    engine.start()
    return engine


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    heard: list[queue.SimpleQueue[Output]] = [queue.SimpleQueue() for _ in requests]
    for request, box in zip(requests, heard, strict=True):
        engine.submit(request, box.put)
    said = []
    for box in heard:
        tokens: list[int] = []
        while True:
            output = box.get(timeout=60)
            tokens += output.tokens
            if output.finish is not None:
                assert output.finish is not FinishReason.ERROR, output.error
                break
        said.append(tokens)
    return said


def asked(prompts: Sequence[Sequence[int]], count: int = 24, **params: Any) -> list[Request]:
    params = {"temperature": 0.0} | params
    return [Request(list(p), SamplingParams(max_tokens=count, **params), NoText()) for p in prompts]


def prompts(number: int, seed: int = 0, longest: int = 90) -> list[tuple[int, ...]]:
    """Many of them share beginnings, as chats do."""
    dice = random.Random(seed)
    stems = [
        [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, longest))] for _ in range(4)
    ]
    found = []
    for _ in range(number):
        stem = dice.choice(stems)
        cut = dice.randint(0, len(stem))
        found.append(
            tuple(stem[:cut] + [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 9))])
        )
    return found


def ended(engine: Engine) -> None:
    """Stop, and see that nothing was lost."""
    engine.stop()
    assert engine.failure is None
    if engine.cache is not None:
        engine.cache.clear()
    engine.pool.check()
    stats = engine.stats()
    assert (stats.free_slots, stats.free_pages) == (stats.slots, stats.pages)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[Decoder, Said]]:
    """A model and what it says without any of it."""
    model = made(request.param)
    plain = running(model)
    wanted = prompts(30)
    said = answers(plain, asked(wanted))
    ended(plain)
    return model, dict(zip(wanted, said, strict=True))


@pytest.mark.parametrize("cache", [0, 10**6, 10**9])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_guesses_and_kept_prefixes_change_no_token(
    kind: tuple[Decoder, Said], k: int, cache: int
) -> None:
    model, said = kind
    engine = running(model, Foreseen(k, said, seed=k), prefix_bytes=cache, pages=60)
    for _ in range(2 if cache else 1):  # cold, then warm
        assert answers(engine, asked(list(said))) == list(said.values())
    stats = engine.stats()
    counts = stats.counters
    assert all(0 < counts.accepted[i] < counts.drafted[i] for i in range(k))
    assert not cache or stats.prefix is not None
    if cache == 10**9 and stats.prefix is not None:
        assert stats.prefix.reused > 0
    ended(engine)
