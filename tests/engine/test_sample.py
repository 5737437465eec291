"""Sampling: against counting, against scipy-free chi-square, against the definitions."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difyops.engine.request import Request, SamplingParams
from difyops.engine.sample import (
    BLOCK,
    adjust,
    choose,
    draw,
    is_free,
    pick,
    probabilities,
    uniform,
)
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
    shares = probabilities(LOGITS[None], [SamplingParams(1, temperature=0.7)])
    numbers = torch.tensor([uniform(3, i) for i in range(20_000)], dtype=torch.float64)
    drawn = Counter(draw(shares.expand(20_000, -1), numbers).tolist())
    expected = shares[0] * 20_000
    chi = sum((drawn[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi < 22.46


@given(st.integers(0, 2**63), st.integers(0, 10**6))
def test_a_random_number_is_below_one(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_the_ends_of_the_distribution_are_tokens_that_may_be_drawn() -> None:
    shares = torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64).expand(3, -1)
    numbers = torch.tensor([0.0, math.nextafter(1, 0), 0.25], dtype=torch.float64)
    assert draw(shares, numbers).tolist() == [1, 2, 2]
    # Over several blocks, the last of them empty.
    far = torch.zeros(3, 4 * BLOCK + 5, dtype=torch.float64)
    far[:, 7], far[:, 2 * BLOCK] = 0.25, 0.75
    assert draw(far, numbers).tolist() == [7, 2 * BLOCK, 2 * BLOCK]


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
        (shares,) = probabilities(LOGITS[None], [SamplingParams(1, **params)])
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
    assert torch.equal(adjust(LOGITS[None], [seen])[0][0], wanted)


def test_the_repetition_penalty_sees_the_prompt_and_both_signs() -> None:
    wanted = LOGITS.clone()
    wanted[5], wanted[3] = 3.0 / 2, -1.0 * 2
    penalised = request([5, 3], repetition_penalty=2.0)
    assert torch.equal(adjust(LOGITS[None], [penalised])[0][0], wanted)


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


def by_itself(scores: torch.Tensor, wanted: Request, bits: Any) -> int:
    """One row's token in the plainest form: what a batch must choose, too."""
    s, scores = wanted.sampling, scores.clone()
    for token in set(wanted.tokens) if s.repetition_penalty != 1 else ():
        by = s.repetition_penalty
        scores[token] = scores[token] / by if scores[token] > 0 else scores[token] * by
    for token, count in Counter(wanted.generated).items():
        scores[token] -= s.presence_penalty + s.frequency_penalty * torch.tensor(float(count))
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    if bits is not None:
        scores[[not bits[i // 32] >> i % 32 & 1 for i in range(len(scores))]] = -math.inf
    if not s.temperature:
        return int(scores.argmax())
    scores = scores.double() / s.temperature
    if 0 < s.top_k < len(scores):
        scores[scores < scores.sort(descending=True).values[s.top_k - 1]] = -math.inf
    shares = scores.softmax(-1)
    if s.top_p < 1:
        ordered = shares.sort(descending=True).values
        count = int((ordered.cumsum(-1) < s.top_p).sum())
        shares[shares < ordered[min(count, len(ordered) - 1)]] = 0
    shares[shares < s.min_p * shares.max()] = 0
    reached = (shares / shares.sum()).cumsum(-1)
    number = reached[-1] * uniform(s.seed, len(wanted.tokens))
    place = int(torch.searchsorted(reached, number, right=True))
    return min(place, int(shares.nonzero()[-1]))


@pytest.mark.parametrize("size", [7, 511, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_chooses_what_each_row_does_by_itself(size: int, dtype: torch.dtype) -> None:
    dice = random.Random(size)
    generator = torch.Generator().manual_seed(size)
    for count in (1, 2, 9, 40):
        logits = (3 * torch.randn(count, size, generator=generator)).to(dtype)
        rows, masks = [], []
        for i in range(count):
            params: dict[str, Any] = {
                "temperature": dice.choice([0.0, 0.3, 1.0, 2.5]),
                "top_k": dice.choice([0, 0, 1, 5, size, 2 * size]),
                "top_p": dice.choice([1.0, 0.9, 0.3, 0.999]),
                "min_p": dice.choice([0.0, 0.0, 0.1]),
                "presence_penalty": dice.choice([0.0, 0.0, 0.4]),
                "frequency_penalty": dice.choice([0.0, 0.0, -0.3]),
                "repetition_penalty": dice.choice([1.0, 1.0, 1.3]),
                "logit_bias": dice.choice([{}, {3: 2.5, 5: -100.0}]),
            }
            said = tuple(dice.randrange(size) for _ in range(dice.randint(0, 9)))
            rows.append(request([1, 4, 1], said, seed=i, **params))
            masks.append(None)
            if dice.random() < 0.3:
                words = np.array([dice.getrandbits(31) | 2 for _ in range(-(-size // 32))])
                masks[-1] = words.astype(np.int32)
                constraint = Only()
                constraint.bits = masks[-1]
                rows[-1].constraint = constraint
        wanted = [by_itself(*row) for row in zip(logits.float(), rows, masks, strict=True)]
        assert [getattr(one, "token", one) for one in choose(logits, rows)] == wanted
        free = [i for i, row in enumerate(rows) if is_free(row)]
        if free:
            positions = [len(rows[i].tokens) for i in free]
            picked = pick(logits[free], [rows[i] for i in free], positions)
            assert picked.tolist() == [wanted[i] for i in free]


def test_rows_without_numbers_are_told_apart() -> None:
    rows = torch.stack((LOGITS, torch.full_like(LOGITS, float("nan")), LOGITS))
    asked = [request([1], seed=i) for i in range(3)]
    wanted = [getattr(one, "token", -1) for one in choose(rows, asked)]
    assert wanted[1] == -1
    assert pick(rows, asked, [1, 1, 1]).tolist() == wanted
