"""The engine on a GPU: what it says is what the CPU says, with graphs, guesses and kept prefixes.

In float32 two sums may differ in their last bits, so an answer may leave the other's where the two
largest scores are nearly equal. That is looked at in float64, counted and printed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difyops.engine import drafters, graphs, windows
from difyops.engine.load import load
from difyops.engine.mixers import Mixer, Softmax
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Request
from difyops.engine.runner import Engine
from difyops.engine.speculate import Drafter
from difyops.engine.state import StatePool
from tests.engine import tiny
from tests.engine.test_exact import (
    CONTEXT,
    VOCABULARY,
    Foreseen,
    answers,
    asked,
    drafting,
    ended,
    prompts,
)

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

HYBRID = Path(__file__).parents[2] / "models" / "tiny-hybrid"
#: Gap of the two largest scores below which float32 may choose either.
MARGIN = 1e-4


def made(kind: str) -> Decoder:
    """In float64, on the CPU."""
    if kind == "tiny-hybrid":
        return load(HYBRID, dtype="float64").model
    model: Decoder = tiny.model(kind, dtype=torch.float64, vocabulary=VOCABULARY, context=CONTEXT)[
        0
    ]
    return model


def on_gpu(model: Decoder, drafter: Drafter | None = None, **options: int) -> Engine:
    guesses = {"guesses": drafter.most} if drafter is not None else {}
    options = {"slots": 5, "context": CONTEXT, "prefill_tokens": 48} | guesses | options
    engine = Engine(copy.deepcopy(model).float().cuda(), drafter=drafter, **options)
    engine.warm_up()
    assert isinstance(engine._steps, graphs.Captured)
    engine.start()
    return engine


def mixers(engine: Engine) -> list[Mixer]:
    return [block.mixer for block in engine.model.blocks]


class Guessing(Foreseen):
    """Where the slots are."""

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        return super().draft(requests, slots, pool, k).to(slots.device)


@torch.inference_mode()
def differ(model: Decoder, requests: Sequence[Request], wanted: list, got: list) -> int:
    """How many answers leave the others; each must do so at a near-tie."""
    found = 0
    for request, want, had in zip(requests, wanted, got, strict=True):
        if want == had:
            continue
        place = next(i for i, (a, b) in enumerate(zip(want, had, strict=True)) if a != b)
        read = torch.tensor([[*request.prompt, *want[:place]]])
        first, second = model.logits(model(read)[0, -1]).topk(2).values.tolist()
        assert first - second < MARGIN, f"{want} {had} differ at {place}"
        found += 1
    return found


@pytest.mark.parametrize("kind", [*tiny.PATTERNS, "tiny-hybrid"])
def test_it_says_what_the_cpu_says(kind: str) -> None:
    model = made(kind)
    texts = prompts(24)
    cpu = Engine(copy.deepcopy(model).float(), slots=5, context=CONTEXT)
    cpu.start()
    wanted = answers(cpu, asked(texts))
    ended(cpu)
    plain = on_gpu(model)
    asking = asked(texts)
    got = answers(plain, asking)
    ended(plain)
    known = dict(zip(texts, got, strict=True))
    ties = [differ(model, asking, wanted, got)]
    guessing = on_gpu(model, Guessing(3, known), prefix_bytes=1 << 24)
    for _ in range(2):  # again, from kept prefixes
        asking = asked(texts)
        ties.append(differ(model, asking, got, answers(guessing, asking)))
    if all(isinstance(m, Softmax) or getattr(m, "in_place", False) for m in mixers(guessing)):
        assert isinstance(guessing._guessing.windows, windows.Captured)
    assert guessing.stats().counters.accepted[0] > 20
    ended(guessing)
    print(f"{kind}: of {len(texts)} answers {ties} differ, at near-ties")


@pytest.mark.parametrize("name", ["mtp", "recurrent mtp", "3 mtp", "medusa", "ngram", "draft"])
def test_windows_under_graphs_are_the_eager_ones(name: str) -> None:
    """The same answers, and the same guesses behind the same texts."""
    model, texts = drafting(name)[0].float().cuda(), prompts(16, seed=2)
    found, counts = [], []
    for eager in (False, True):
        drafter = drafters.choose(name.split()[-1], model, copy.deepcopy(model))
        assert drafter is not None
        options = {"slots": 5, "context": CONTEXT, "prefill_tokens": 48, "prefix_bytes": 1 << 24}
        engine = Engine(model, drafter=drafter, guesses=drafter.most, **options)
        engine.warm_up()
        assert engine._guessing is not None
        assert isinstance(engine._guessing.windows, windows.Captured)
        if eager:
            engine._guessing.windows = windows.Eager(model, engine.pool, drafter)
        engine.start()
        found.append(answers(engine, asked(texts)) + answers(engine, asked(texts)))
        counts.append(engine.stats().counters.accepted)
        ended(engine)
    ties = differ(copy.deepcopy(model).cpu().double(), asked(texts) * 2, *found)
    print(f"{name}: {ties} of {len(found[0])} answers differ, at near-ties; accepted {counts}")
    # A prompt shorter than a module is deep is first stepped, and guesses may be near-ties, too.
    total, other = (sum(count.values()) for count in counts)
    assert abs(total - other) <= 6 + 0.05 * other


def test_nothing_is_lost_under_a_random_load() -> None:
    model, dice = made("hybrid"), random.Random(0)
    engine = on_gpu(model, Guessing(2, {}), slots=7, pages=60, prefix_bytes=1 << 20)
    for seed in range(4):
        requests = asked(prompts(60, seed=seed), count=dice.randint(1, 30))
        for request in requests:
            if dice.random() < 0.2:
                request.cancelled = True
        answers(engine, requests)
    ended(engine)
