"""Drafters that were told the answers: what random weights hardly ever guess comes true, here and
there, and under a grammar too."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difyops.engine.request import Constraint, Request, SamplingParams
from difyops.engine.speculate import Drafter, Read
from difyops.engine.state import StatePool, StateSpec
from tests.engine.constrained import GRAMMARS, SIZE, STOP_IDS
from tests.engine.random_model import allowed
from tests.engine.test_scheduler import NoText

#: prompt -> what plain decoding says. A prompt has one schema, or none.
Answers = Mapping[tuple[int, ...], list[int]]


def asked(prompt: Sequence[int], schema: Any = None, *, count: int = 10, **params: Any) -> Request:
    """A greedy request for `count` tokens, or for one instance of `schema`."""
    params = {"temperature": 0.0, "stop_ids": frozenset(STOP_IDS)} | params
    after = params.pop("after", None)
    constraint = None if schema is None else GRAMMARS.json_schema(schema, after=after)
    return Request(list(prompt), SamplingParams(count, **params), NoText(), constraint)


class Helped(Drafter):
    """The drafter `own`, whose first few guesses are made true: any number of them.

    The one behind them is its own, or one that the grammar takes there, too.
    """

    name = "helped"

    def __init__(self, own: Drafter, answers: Answers, seed: int = 0) -> None:
        self.most = own.most
        self.own = own
        self.answers = answers
        self.dice = random.Random(seed)
        #: How many guesses came true in a row, where a grammar masked.
        self.came_true: set[int] = set()
        self._aimed: Counter[tuple[bool, int]] = Counter()
        self._before: dict[Request, int] = {}

    def tracks(self) -> list[list[StateSpec]]:
        return self.own.tracks()

    def read(self, read: Read, pool: StatePool) -> None:
        self.own.read(read, pool)

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        rows = self.own.draft(requests, slots, pool, k).tolist()
        for request, row in zip(requests, rows, strict=True):
            if request.constraint is not None and request in self._before:
                self.came_true.add(request.count - self._before[request] - 1)
            self._before[request] = request.count
            self._help(request, row)
        return torch.tensor(rows).view(len(rows), k)

    def _help(self, request: Request, row: list[int]) -> None:
        ahead = self.answers[tuple(request.prompt)][request.count :]
        free, most = request.constraint is None, min(len(row), len(ahead))
        right = min(range(most + 1), key=lambda n: (self._aimed[free, n], self.dice.random()))
        self._aimed[free, right] += 1
        row[:right] = ahead[:right]
        if right < most and self.dice.random() < 0.7:
            row[right] = self._another(request.constraint, ahead[: right + 1])

    def _another(self, constraint: Constraint | None, ahead: Sequence[int]) -> int:
        """A token that the grammar takes at the end of `ahead`, and that is not the right one."""
        *before, right = ahead
        found: Sequence[int] = range(SIZE)
        if constraint is not None:
            for token in before:
                constraint.advance(token)
            mask = constraint.mask()
            constraint.rollback(len(before))
            found = found if mask is None else allowed(mask, SIZE).tolist()
        return self.dice.choice([token for token in found if token != right] or [-1])
