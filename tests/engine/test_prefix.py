"""The prefix cache against a plain list of everything that was kept."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from difyops.engine.prefix import PrefixCache


@dataclass(frozen=True)
class Mark:
    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.tokens)


def cache(budget: int = 100, block: int = 3) -> tuple[PrefixCache[Mark], list[Mark]]:
    dropped: list[Mark] = []
    return PrefixCache(budget, dropped.append, block), dropped


def test_the_longest_beginning_is_found_and_never_the_whole() -> None:
    found, _ = cache()
    for n in (2, 3, 5, 7):
        found.keep(range(n), Mark(tuple(range(n))), 10)
    assert found.find(range(20)) == Mark(tuple(range(7)))
    assert found.find(range(7)) == Mark(tuple(range(5)))
    assert found.find([0, 1, 2, 9, 9]) == Mark((0, 1, 2))
    assert found.find([0, 1]) is None
    assert found.find([0, 9, 2, 3]) is None


def test_the_least_recently_used_goes_first() -> None:
    found, dropped = cache(budget=30)
    a, b, c, d = (Mark((i, i)) for i in range(4))
    for mark in (a, b, c):
        found.keep(mark.tokens, mark, 10)
    assert found.find([0, 0, 5]) == a
    assert found.has([1, 1])
    found.keep(d.tokens, d, 10)
    assert dropped == [c]
    found.keep((7, 7), Mark((7, 7)), 31)
    assert dropped == [c, Mark((7, 7))]
    found.keep(a.tokens, Mark((0, 0)), 10)
    assert len(dropped) == 3
    found.clear()
    assert (found.bytes, len(found), len(dropped)) == (0, 0, 6)


sequences = st.lists(st.integers(0, 1), max_size=12).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["keep", "find"]), sequences, st.integers(1, 40))),
    st.sampled_from([1, 2, 4]),
)
def test_any_order_of_use(calls: list[tuple[str, tuple[int, ...], int]], block: int) -> None:
    found, dropped = cache(block=block)
    model: list[tuple[Mark, int]] = []  # the least recently used first
    for what, tokens, size in calls:
        if what == "keep":
            found.keep(tokens, Mark(tokens), size)
            if tokens not in [m.tokens for m, _ in model]:
                while sum(s for _, s in model) + size > 100:
                    model.pop(0)
                model.append((Mark(tokens), size))
        else:
            fits = [e for e in model if e[0].length < len(tokens)
                    and tokens[: e[0].length] == e[0].tokens]  # fmt: skip
            best = max(fits, key=lambda e: e[0].length, default=None)
            assert found.find(tokens) == (best[0] if best else None)
            if best:
                model.remove(best)
                model.append(best)
        assert found.bytes == sum(s for _, s in model) <= 100
        assert len(found) == len(model)
    kept = sum(1 for what, _, _ in calls if what == "keep")
    assert len(dropped) + len(found) == kept
