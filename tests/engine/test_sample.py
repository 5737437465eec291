"""Sampling: against counting, against scipy-free chi-square, against the definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difyops.engine.request import Request, SamplingParams
from difyops.engine.sample import adjust, choose, draw, probabilities, uniform
from tests.engine.test_scheduler import NoText

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 3.0, -2.0])


def request(prompt: list[int], generated: tuple[int, ...] = (), **params: Any) -> Request:
    made = Request(prompt, SamplingParams(max_tokens=9, **params), NoText())
    made.tokens += generated
    return made


class Only:
    finished = False

    def __init__(self, *tokens: int) -> None:
        self.bits = np.zeros(1, dtype=np.int32)
        for token in tokens:
            self.bits[0] |= np.int32(1 << token)

    def mask(self) -> Any:
        return self.bits

    def advance(self, token: int) -> None: ...

    def rollback(self, tokens: int) -> None: ...


def one(logits: torch.Tensor, wanted: Request) -> int:
    (choice,) = choose(logits[None], [wanted])
    assert not isinstance(choice, Exception)
    return choice.token


def test_greedy_takes_the_largest() -> None:
    assert one(LOGITS, request([1], temperature=0)) == 5


def test_the_tokens_have_the_distribution_of_the_model() -> None:
    """Chi-square of 20,000 draws over 7 tokens; 22.46 is its 0.1% point at 6 degrees."""
    shares = probabilities(LOGITS, SamplingParams(1, temperature=0.7))
    drawn = Counter(draw(shares, uniform(3, i)) for i in range(20_000))
    expected = shares * 20_000
    chi = sum((drawn[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi < 22.46


@given(st.integers(0, 2**63), st.integers(0, 10**6))
def test_a_random_number_is_below_one(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_the_ends_of_the_distribution_are_tokens_that_may_be_drawn() -> None:
    shares = torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64)
    assert draw(shares, 0.0) == 1
    assert draw(shares, math.nextafter(1, 0)) == 2
    assert draw(shares, 0.25) == 2


def test_a_seed_repeats_whatever_runs_beside_it() -> None:
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    others = [request([1, 2, 3], seed=i) for i in range(3)]
    alone = one(rows[0], request([1, 2], seed=7))
    beside = choose(rows, [request([1, 2], seed=7), *others])[0]
    assert not isinstance(beside, Exception)
    assert beside.token == alone
    later = [one(rows[0], request([1] * n, seed=7)) for n in range(1, 40)]
    assert len(set(later)) > 1


def test_top_k_top_p_min_p_keep_what_they_say() -> None:
    def kept(**params: Any) -> set[int]:
        shares = probabilities(LOGITS, SamplingParams(1, **params))
        assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
        return set(shares.nonzero().flatten().tolist())

    assert kept(top_k=2) == {5, 0}
    assert kept(top_k=100) == set(range(7))
    assert kept(top_p=0.01) == {5}
    shares = LOGITS.double().softmax(-1)
    assert kept(top_p=float(shares[5] + shares[0] / 2)) == {5, 0}
    assert kept(min_p=0.3) == {i for i in range(7) if shares[i] >= 0.3 * shares[5]}
    assert kept(top_k=3, top_p=0.5) == {5}


def test_penalties_are_openais() -> None:
    seen = request([0, 1], (5, 5, 2), presence_penalty=0.5, frequency_penalty=0.25)
    wanted = LOGITS.clone()
    wanted[5] -= 0.5 + 2 * 0.25
    wanted[2] -= 0.5 + 0.25
    assert torch.equal(adjust(LOGITS, seen), wanted)


def test_the_repetition_penalty_sees_the_prompt_and_both_signs() -> None:
    wanted = LOGITS.clone()
    wanted[5], wanted[3] = 3.0 / 2, -1.0 * 2
    assert torch.equal(adjust(LOGITS, request([5, 3], repetition_penalty=2.0)), wanted)


def test_bias_and_mask() -> None:
    biased = request([1], temperature=0, logit_bias={6: 100.0})
    assert one(LOGITS, biased) == 6
    biased.constraint = Only(3, 4)
    assert one(LOGITS, biased) == 4
    sampled = request([1], seed=1)
    sampled.constraint = Only(3)
    assert one(LOGITS, sampled) == 3


def test_logprobs_are_the_models_own() -> None:
    wanted = LOGITS.log_softmax(-1)
    (choice,) = choose(
        LOGITS[None], [request([1], temperature=0, logprobs=2, logit_bias={6: 100.0})]
    )
    assert not isinstance(choice, Exception)
    assert choice.token == 6
    assert choice.logprob == pytest.approx(float(wanted[6]))
    assert [t for t, _ in choice.top] == [5, 0]
    assert choice.top[0][1] == pytest.approx(float(wanted[5]))


def test_scores_that_are_not_numbers_choose_nothing() -> None:
    rows = torch.stack((LOGITS, torch.full_like(LOGITS, float("nan"))))
    first, second = choose(rows, [request([1], temperature=0), request([1])])
    assert not isinstance(first, Exception)
    assert "not numbers" in str(second)


def test_a_grammar_that_fails_is_its_own_requests_failure() -> None:
    broken = request([1], temperature=0)
    broken.constraint = Only(3)
    broken.constraint.mask = fails  # type: ignore[method-assign]
    first, second = choose(torch.stack((LOGITS, LOGITS)), [broken, request([1], temperature=0)])
    assert "planted" in str(first)
    assert not isinstance(second, Exception) and second.token == 5


def fails() -> Any:
    raise RuntimeError("planted")
