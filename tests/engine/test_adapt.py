"""The number of guesses, against a machine whose costs and whose luck are known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difyops.engine.adapt import RETRY, TELL_EVERY, Adaptive, expected_tokens
from difyops.engine.speculate import look_up


def play(
    adaptive: Adaptive, rate: float, step: float, guess: float, *, batch: int = 1, passes: int = 600
) -> list[int]:
    """`step` seconds a pass and `guess` more for each guess; the choices that were made."""
    dice = random.Random(1)
    chosen = []
    for _ in range(passes):
        k = adaptive.choose(batch)
        chosen.append(k)
        adaptive.took(batch, k, step + guess * k)
        hits = next((i for i in range(k) if dice.random() > rate), k)
        adaptive.came_true(hits, min(hits + 1, k))
    return chosen


@pytest.mark.parametrize(
    ("rate", "guess", "best"),
    # Seconds of a pass are 1 + k * guess, tokens 1 + a + … + a^k.
    [(0.9, 0.05, 4), (0.85, 0.4, 4), (0.5, 0.3, 1), (0.5, 0.02, 4), (0.1, 0.3, 0), (0.0, 0.01, 0)],
)
def test_it_settles_on_the_most_tokens_a_second(rate: float, guess: float, best: int) -> None:
    speeds = [expected_tokens([rate] * k) / (1 + guess * k) for k in range(5)]
    chosen = play(Adaptive(4), rate, 1.0, guess)[300:]
    # Where choices differ by less than 8 %, either will do.
    good = {k for k in range(5) if speeds[k] > 0.92 * max(speeds)}
    assert best in good
    assert sum(k in good for k in chosen) > 0.9 * len(chosen)


def test_what_looked_bad_is_tried_again() -> None:
    adaptive = Adaptive(2)
    assert set(play(adaptive, 0.0, 1.0, 0.5)[-RETRY:]) > {0}
    assert adaptive.best(1) == 0
    play(adaptive, 0.95, 1.0, 0.1, passes=2000)
    assert adaptive.best(1) == 2


@pytest.mark.parametrize("slow", [0, 1])
def test_a_warm_up_is_not_what_a_pass_costs(slow: int) -> None:
    adaptive = Adaptive(1)
    for number in range(2):
        adaptive.took(1, 0, 1.0)
        adaptive.took(1, 1, 5.0 if number == slow else 1.1)
    assert adaptive.settled(1) == 1


def test_what_sways_is_told_now_and_then() -> None:
    adaptive = Adaptive(1)
    assert adaptive.news(1, 5.0) is None  # nothing was tried yet
    play(adaptive, 0.9, 1.0, 0.1)
    assert (adaptive.news(1, 5.0), adaptive.news(1, 500.0)) == (1, None)
    play(adaptive, 0.0, 1.0, 0.9, batch=4)
    assert adaptive.news(4, 5.0) == 0  # a group of its own
    play(adaptive, 0.0, 1.0, 0.9)
    swayed = [adaptive.news(1, 501.0)]
    play(adaptive, 0.99, 1.0, 0.01, passes=900)
    swayed += [adaptive.news(1, 501.1), adaptive.news(1, 501.0 + TELL_EVERY)]
    assert swayed == [0, None, 1]


def test_batches_have_costs_of_their_own() -> None:
    adaptive = Adaptive(2)
    play(adaptive, 0.8, 1.0, 0.05)
    play(adaptive, 0.8, 1.0, 2.0, batch=64)
    assert (adaptive.best(1), adaptive.best(64)) == (2, 0)


def test_expected_tokens_is_the_papers() -> None:
    assert expected_tokens([]) == 1
    assert expected_tokens([0.8] * 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_prompt_lookup_repeats_what_followed(tokens: list[int], longest: int, k: int) -> None:
    guess = look_up(tokens, longest, k)
    assert len(guess) <= k
    # The longest ending that stood there before, and its nearest place: by brute force.
    for size in range(longest, 0, -1):
        places = [
            i for i in range(len(tokens) - size) if tokens[i : i + size] == tokens[-size:]
        ] if size < len(tokens) else []  # fmt: skip
        if places:
            after = places[-1] + size
            assert guess == tokens[after : after + k]
            return
    assert guess == []


def seconds_a_token(rate: float, costs: Sequence[float], tokens: int, most: int = 4) -> float:
    """Of a fresh engine that makes so many tokens; the first pass of its kind takes twice."""
    adaptive, dice = Adaptive(most), random.Random(2)
    made, spent, seen = 0, 0.0, set[int]()
    while made < tokens:
        k = adaptive.choose(8)
        cost = costs[k] * (1 if k in seen else 2)
        seen.add(k)
        adaptive.took(8, k, cost)
        hits = next((i for i in range(k) if dice.random() > rate), k)
        adaptive.came_true(hits, min(hits + 1, k))
        spent, made = spent + cost, made + 1 + hits
    return spent / made


#: Seconds of a pass with 0 to 4 guesses.
MACHINES = {
    "cpu": (7.0, 13.0, 18.0, 22.0, 27.0),
    "gpu": (1.0, 1.25, 1.4, 1.55, 1.7),
    "full gpu": (1.0, 1.8, 2.4, 3.0, 3.6),
}


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("machine", MACHINES)
def test_it_is_not_slower_than_without_guesses(machine: str, rate: float) -> None:
    costs = MACHINES[machine]
    assert seconds_a_token(rate, costs, 4000) < 1.025 * costs[0]
    # What is learnt from a short answer costs few passes, too.
    warm_up = costs[0] / 16
    assert seconds_a_token(rate, costs, 16) - warm_up < 1.8 * costs[0]


def test_a_new_size_of_batch_learns_from_another() -> None:
    adaptive = Adaptive(4)
    play(adaptive, 0.9, 1.0, 0.05)
    assert [adaptive.choose(30), adaptive.took(30, 0, 3.0)] == [0, None]
    assert adaptive.choose(30) == 4  # without a try of each


def test_no_more_guesses_than_there_are_graphs_for() -> None:
    adaptive = Adaptive(4)
    play(adaptive, 0.95, 1.0, 0.01)
    assert {adaptive.choose(1, 2) for _ in range(200)} <= {0, 1, 2}
    assert adaptive.choose(1, 0) == 0
