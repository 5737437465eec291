"""How many tokens to guess: what a pass costs and how many guesses come true are both measured.

Pure arithmetic over measurements; knows no torch and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Weight of the newest measurement once there are many: of a pass's cost, of a guess's outcome.
FRESH_COST, FRESH_RATE = 0.1, 0.02
#: A choice that looked worse is tried again, as texts and batches change: after so many passes at
#: least, and so rarely that all such tries cost no more than this share of the time.
RETRY, SHARE = 64, 0.01
#: What a pass that was measured once may really cost: it may have carried a warm-up.
DOUBT = 0.75
#: Guessing has to be so much faster than not: measurements sway.
MARGIN = 1.02
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

    Sizes are grouped by powers of two: costs within a group differ little. What was not measured
    in a group is estimated: as a straight line between what was, or in proportion to the nearest
    group that is known. So a new group is measured without guesses and with the most, and beyond
    that only where a choice could be the best.
    """

    most: int
    rates: list[float] = field(init=False)
    #: Group -> k -> seconds of a pass, drafting included.
    costs: dict[int, dict[int, float]] = field(default_factory=dict, init=False)
    #: (group, k) -> how often it was measured, and the group's passes when it was last.
    _seen: dict[tuple[int, int], int] = field(default_factory=dict, init=False)
    _tried: dict[tuple[int, int], int] = field(default_factory=dict, init=False)
    _outcomes: list[int] = field(init=False)
    _passes: dict[int, int] = field(default_factory=dict, init=False)
    #: Group -> the best number of guesses when it was last told, and when that was.
    _told: dict[int, tuple[int, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # Optimistic, so that guessing is tried.
        self.rates = [0.8] * self.most
        self._outcomes = [0] * self.most

    def choose(self, batch: int, most: int | None = None) -> int:
        """How many tokens to guess for a batch of this size, at most `most`: the most tokens a
        second, or what is due to be tried again."""
        group, most = _group(batch), self.most if most is None else min(most, self.most)
        passes = self._passes[group] = self._passes.get(group, 0) + 1
        known = self.costs.get(group, {})
        if 0 not in known or not most:
            return 0
        if not any(self.costs[g].keys() > {0} for g in self.costs):
            return most
        best = self._best(group, most, self._hoped)
        for k in range(most + 1):
            if k != best and passes - self._tried.get((group, k), 0) >= self._wait(group, k, best):
                return k
        return best

    def settled(self, batch: int) -> int | None:
        """The best number of guesses; None while it was not measured."""
        group = _group(batch)
        best = self._best(group, self.most, self._hoped) if self.costs.get(group) else None
        return best if self._seen.get((group, best or 0), 0) >= 2 else None

    def news(self, batch: int, now: float) -> int | None:
        """What `settled` answers, if it is not what was last told of this group and that was
        TELL_EVERY seconds ago; `now` is in seconds, from any beginning."""
        k, group = self.settled(batch), _group(batch)
        told, since = self._told.get(group, (None, float("-inf")))
        if k is None or k == told or now - since < TELL_EVERY:
            return None
        self._told[group] = k, now
        return k

    def best(self, batch: int) -> int:
        """By what was measured so far; fewer guesses where it makes no difference."""
        return self._best(_group(batch), self.most, self._cost)

    def took(self, batch: int, k: int, seconds: float) -> None:
        """One pass with `k` guesses each took so long."""
        group = _group(batch)
        seen = self._seen[group, k] = self._seen.get((group, k), 0) + 1
        self._tried[group, k] = self._passes.get(group, 0)
        costs = self.costs.setdefault(group, {})
        before = costs.get(k, seconds)
        if seen <= 2:  # a warm-up, or what else was busy, can only make a pass slower
            costs[k] = min(before, seconds)
        else:
            costs[k] = before + FRESH_COST * (seconds - before)

    def _best(self, group: int, most: int, cost: Callable[[int, int], float]) -> int:
        def speed(k: int) -> float:
            return expected_tokens(self.rates[:k]) / cost(group, k) / (MARGIN if k else 1)

        return max(range(most + 1), key=lambda k: (speed(k), -k))

    def _wait(self, group: int, k: int, best: int) -> float:
        """Passes between two tries of `k`, by the time that one loses."""
        tokens = expected_tokens(self.rates[:best]) / expected_tokens(self.rates[:k])
        lost = self._cost(group, k) / self._cost(group, best) * tokens - 1
        return max(RETRY, lost * self.most / SHARE)

    def _hoped(self, group: int, k: int) -> float:
        cost = self._cost(group, k)
        return cost * DOUBT if self._seen.get((group, k), 0) == 1 else cost

    def _cost(self, group: int, k: int) -> float:
        """Seconds of a pass, measured or estimated."""
        known = self.costs.get(group) or {0: 1.0}
        if k in known:
            return known[k]
        if len(known) == 1 and (near := self._nearest(group)) is not None:
            ((j, seconds),) = known.items()
            return seconds * self._cost(near, k) / self._cost(near, j)
        below = max((j for j in known if j < k), default=min(known))
        above = min((j for j in known if j > k), default=max(known))
        if below == above:
            return known[below]
        share = (k - below) / (above - below)
        return known[below] + share * (known[above] - known[below])

    def _nearest(self, group: int) -> int | None:
        """The group next to this one in which guessing was measured."""
        others = [g for g, known in self.costs.items() if g != group and len(known) > 1]
        return min(others, key=lambda g: abs(g - group), default=None)

    def came_true(self, hits: int, tried: int) -> None:
        """The first `hits` of `tried` guesses of one request came true."""
        for place in range(min(hits + 1, tried)):
            self._outcomes[place] += 1
            weight = max(FRESH_RATE, 1 / (self._outcomes[place] + 1))
            self.rates[place] += weight * ((place < hits) - self.rates[place])


def _group(batch: int) -> int:
    """Batches that one size of graph serves."""
    return (batch - 1).bit_length()
