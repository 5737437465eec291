"""How many tokens to guess: what a pass costs and how many guesses come true are both measured.

Pure arithmetic over measurements; knows no torch and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Weight of the newest measurement once there are many: of a pass's cost, of a guess's outcome.
FRESH_COST, FRESH_RATE = 0.1, 0.02
#: A choice that looks worse is tried again after so many passes: texts and batches change.
RETRY = 64
#: Seconds between two tellings of what a group settled on: where choices differ little, it sways.
TELL_EVERY = 10.0


def expected_tokens(rates: Sequence[float]) -> float:
    """Tokens of one pass, its own included: 1 + a₁ + a₁a₂ + …, where aᵢ is the rate at which guess
    i comes true when those before it did. With equal rates (1 - a^(k+1)) / (1 - a)
    (arXiv:2211.17192, eq. 1)."""
    total = reached = 1.0
    for rate in rates:
        reached *= rate
        total += reached
    return total


@dataclass
class Adaptive:
    """The number of guesses for each size of batch, from 0 to `most`.

    Sizes are grouped by powers of two: costs within a group differ little.
    """

    most: int
    rates: list[float] = field(init=False)
    #: (group, k) -> seconds of a pass, drafting included.
    costs: dict[tuple[int, int], float] = field(default_factory=dict, init=False)
    _seen: dict[tuple[int, int], int] = field(default_factory=dict, init=False)
    _outcomes: list[int] = field(init=False)
    _passes: dict[int, int] = field(default_factory=dict, init=False)
    #: Group -> the best number of guesses when it was last told, and when that was.
    _told: dict[int, tuple[int, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # Optimistic, so that every depth is tried.
        self.rates = [0.8] * self.most
        self._outcomes = [0] * self.most

    def choose(self, batch: int) -> int:
        """How many tokens to guess for a batch of this size: the most tokens a second."""
        group = batch.bit_length()
        passes = self._passes[group] = self._passes.get(group, 0) + 1
        for k in range(self.most + 1):
            if self._seen.get((group, k), 0) < 2:  # the first of its kind may carry a warm-up
                return k
        if passes % RETRY == 0:
            return min(range(self.most + 1), key=lambda k: self._seen[group, k])
        return self.best(batch)

    def settled(self, batch: int) -> int | None:
        """The best number of guesses; None while not all have been tried."""
        group = batch.bit_length()
        tried = all(self._seen.get((group, k), 0) >= 2 for k in range(self.most + 1))
        return self.best(batch) if tried else None

    def news(self, batch: int, now: float) -> int | None:
        """What `settled` answers, if it is not what was last told of this group and that was
        TELL_EVERY seconds ago; `now` is in seconds, from any beginning."""
        k, group = self.settled(batch), batch.bit_length()
        told, since = self._told.get(group, (None, float("-inf")))
        if k is None or k == told or now - since < TELL_EVERY:
            return None
        self._told[group] = k, now
        return k

    def best(self, batch: int) -> int:
        """By what was measured so far; fewer guesses where it makes no difference."""
        group = batch.bit_length()
        speeds = {
            k: expected_tokens(self.rates[:k]) / cost
            for (g, k), cost in self.costs.items()
            if g == group
        }
        return max(speeds, key=lambda k: (speeds[k], -k), default=0)

    def took(self, batch: int, k: int, seconds: float) -> None:
        """One pass with `k` guesses each took so long."""
        key = (batch.bit_length(), k)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        before = self.costs.get(key, seconds)
        if seen <= 2:  # a warm-up, or what else was busy, can only make a pass slower
            self.costs[key] = min(before, seconds)
        else:
            self.costs[key] = before + FRESH_COST * (seconds - before)

    def came_true(self, hits: int, tried: int) -> None:
        """The first `hits` of `tried` guesses of one request came true."""
        for place in range(min(hits + 1, tried)):
            self._outcomes[place] += 1
            weight = max(FRESH_RATE, 1 / (self._outcomes[place] + 1))
            self.rates[place] += weight * ((place < hits) - self.rates[place])
