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


def made(kind: str, **keys: Any) -> Decoder:
    torch.set_num_threads(1)
    keys = {"vocabulary": VOCABULARY, "context": CONTEXT} | keys
    return tiny.model(kind, dtype=torch.float64, **keys)[0]


def running(model: Decoder, drafter: Drafter | None = None, **options: Any) -> Engine:
    options = {"slots": 4, "context": CONTEXT, "prefill_tokens": 48} | options
    if drafter is not None:  # as many guesses as there may be, whether they pay or not
        options = {"guesses": drafter.most} | options
    engine = Engine(model, drafter=drafter, **options)
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
    wanted = prompts(20)
    said = answers(plain, asked(wanted))
    ended(plain)
    return model, dict(zip(wanted, said, strict=True))


@pytest.mark.parametrize(("k", "cache"), [(1, 0), (2, 10**9), (3, 10**5), (4, 0)])
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
    if cache == 10**9:
        assert stats.prefix is not None
        assert stats.prefix.reused > 0
    ended(engine)


def test_the_same_prompt_again_is_hardly_read_again() -> None:
    model = made("gated_delta")
    engine = running(model, prefix_bytes=10**9, prefill_tokens=512)
    (prompt,) = (tuple(i % 50 for i in range(200)),)
    first, again = (answers(engine, asked([prompt])) for _ in range(2))
    other = asked([(*prompt[:150], 7, 8)])
    answers(engine, other)
    prefix = engine.stats().prefix
    assert first == again
    # Blocks of 64: of 200 tokens the last 8 are read again, and what begins alike shares 192 or 64.
    assert prefix is not None and prefix.reused == 192
    ended(engine)


def test_a_conversation_is_gone_on_with(kind: tuple[Decoder, Said]) -> None:
    """Each turn's prompt is the last one, its answer and a question; all of that was kept."""
    model, _ = kind
    plain = running(model)
    engine = running(model, PromptLookup(), prefix_bytes=10**9)
    dice = random.Random(5)
    history = [dice.randrange(VOCABULARY) for _ in range(40)]
    for _ in range(4):
        (wanted,), (got,) = (answers(e, asked([history], 15)) for e in (plain, engine))
        assert got == wanted
        history += [*got, *(dice.randrange(VOCABULARY) for _ in range(6))]
    prefix = engine.stats().prefix
    assert prefix is not None
    assert prefix.reused > 0.8 * (prefix.looked_up - 40)
    ended(plain)
    ended(engine)


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_a_conversation_as_long_as_the_pool_is_gone_on_with(drafter: str | None) -> None:
    """What is kept of it takes no room from it: the pages are shared."""
    model = made("hybrid")
    engine = running(
        model, PromptLookup() if drafter else None, slots=1, prefix_bytes=10**9, prefill_tokens=512
    )
    history = list(range(40))
    for _ in range(4):
        (request,) = asked([history], 15)
        (got,) = answers(engine, [request])
        assert request.reused == (len(history) - 31 if len(history) > 40 else 0)
        history += [*got, *range(30)]
    assert len(history) > 0.85 * CONTEXT
    ended(engine)


MTP = [{"mixer": "softmax", **tiny.LAYERS["softmax"]}]
RECURRENT_MTP = [{"mixer": "gated_delta", **tiny.LAYERS["gated_delta"]}]


def drafting(name: str) -> tuple[Decoder, Drafter]:
    """A random model and its own drafter, which is hardly ever right."""
    if name == "medusa":
        model = made("gated_delta", medusa=3)
    else:
        count = int(name[0]) if name[0].isdigit() else 1
        pattern = RECURRENT_MTP if "recurrent" in name else MTP
        model = made("hybrid", mtp=pattern, mtp_modules=count)
    if name == "draft":
        return model, drafters.DraftModel(model, made("mamba2", seed=3))
    if name == "itself":  # always right
        return model, drafters.DraftModel(model, made("hybrid", mtp=MTP))
    drafter = drafters.choose(name.split()[-1], model)
    assert drafter is not None
    return model, drafter


@pytest.mark.parametrize(
    "name",
    ["mtp", "recurrent mtp", "2 mtp", "3 recurrent mtp", "medusa", "ngram", "draft", "itself"],
)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 7}])
def test_every_drafter_changes_no_token(name: str, sampling: dict[str, Any]) -> None:
    """Not in sampling either: the tokens are the same, and so is their distribution."""
    model, drafter = drafting(name)
    wanted = prompts(12, seed=2)
    plain = running(model)
    engine = running(model, drafter, prefix_bytes=10**9)
    said = answers(plain, asked(wanted, **sampling))
    for _ in range(2):
        assert answers(engine, asked(wanted, **sampling)) == said
    counts = engine.stats().counters
    assert counts.drafted[0] > 0
    if name == "itself" and not sampling:
        assert counts.accepted == counts.drafted
    ended(plain)
    ended(engine)


def test_sampling_with_guesses_has_the_models_distribution() -> None:
    """Three tokens over a vocabulary of 4: 64 answers, enumerated. Chi-square at 63 degrees; 103.4
    is its 0.1% point. The second token of an answer is the first that could be a guess."""
    size, number = 4, 3200
    model = made("gated_delta", vocabulary=size)
    prompt = [1, 2]
    exact = torch.ones(size, size, size, dtype=torch.float64)
    for first in range(size):
        for second in range(size):
            pool = StatePool(model.state_specs(), slots=1, context=8)
            pool.table.acquire()
            pool.sync()
            ids = torch.tensor([*prompt, first, second])
            hidden = model.prefill(ids, pool, torch.tensor([1]), torch.tensor([0, 4]))
            one, two, three = model.logits(hidden[1:]).softmax(-1)
            exact[first, second] = one[first] * two[second] * three
    assert float(exact.sum()) == pytest.approx(1)
    small = made("gated_delta", vocabulary=size, seed=1)
    engine = running(model, drafters.DraftModel(model, small, most=2), slots=64)
    counts = torch.zeros_like(exact)
    for start in range(0, number, 200):
        seeds = range(start, start + 200)
        wanted = [r for seed in seeds for r in asked([prompt], 3, temperature=1.0, seed=seed)]
        for said in answers(engine, wanted):
            counts[tuple(said)] += 1
    accepted = engine.stats().counters.accepted
    assert 0 < accepted[0] < engine.stats().counters.drafted[0]
    ended(engine)
    expected = exact * number
    assert float(((counts - expected) ** 2 / expected).sum()) < 103.4


def test_mtp_guesses_what_its_own_whole_sequence_reference_guesses() -> None:
    """In float64, against the module run over the whole sequence at once, without any state."""
    model, drafter = drafting("mtp")
    (prompt,) = prompts(1, seed=4)
    seen: list[tuple[list[int], int]] = []
    draft = drafter.draft

    def spy(requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        guesses = draft(requests, slots, pool, k)
        seen.append((list(requests[0].tokens), int(guesses[0, 0])))
        return guesses

    drafter.draft = spy  # type: ignore[method-assign]
    engine = running(model, drafter)
    answers(engine, asked([prompt], 30))
    ended(engine)
    module = model.extra["mtp"]
    for tokens, guess in seen:
        ids = torch.tensor(tokens)
        x = model.embed(ids)
        for block in model.blocks:
            x = block(x, lambda mixer, y, _: mixer.reference(y), None)  # type: ignore[arg-type]
        hidden = model.norm(x)
        run = module(model.embed(ids[1:]), hidden[:-1], lambda m, y, _: m.reference(y), [None])
        assert guess == int(model.logits(run[-1]).argmax())
    assert len(seen) > 20


# --- Mutations: each of these faults must be noticed ---------------------------------------------


def faulty_runs(model: Decoder, said: Said) -> bool:
    """Whether the engine with guesses says what it says without."""
    engine = running(model, Foreseen(3, said))
    same = answers(engine, asked(list(said))) == list(said.values())
    engine.stop()
    return same


RECURRENT = [name for name in tiny.LAYERS if name != "softmax"]


#: diag keeps tokens by position, as softmax does: what is too much is written over.
FAULTS = [
    (name, fault)
    for name in RECURRENT
    for fault in ("no rollback", "one too many", "one too few")
    if name != "diag" or fault == "one too few"
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_wrong_commit_is_noticed(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    wanted = prompts(8, seed=6, longest=30)
    plain = running(model)
    said = dict(zip(wanted, answers(plain, asked(wanted)), strict=True))
    ended(plain)
    assert faulty_runs(model, said)
    kind = type(model.blocks[0].mixer)
    right = kind.commit

    def commit(self: Any, state: Any, slots: Tensor, accepted: Tensor) -> None:
        if fault == "no rollback":
            accepted = torch.full_like(accepted, 4)
        else:
            accepted = (accepted + (1 if fault == "one too many" else -1)).clamp(0, 4)
        right(self, state, slots, accepted)

    monkeypatch.setattr(kind, "commit", commit)
    assert not faulty_runs(model, said)


@pytest.mark.parametrize("name", ["gated_delta", "mamba2"])
def test_a_dropped_convolution_tail_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    wanted = prompts(8, seed=6, longest=30)
    plain = running(model)
    said = dict(zip(wanted, answers(plain, asked(wanted)), strict=True))
    ended(plain)
    kind = type(model.blocks[0].mixer)
    right = kind.commit

    def commit(self: Any, state: Any, slots: Tensor, accepted: Tensor) -> None:
        right(self, state, slots, accepted)
        state.slot["tail"][slots] = 0

    monkeypatch.setattr(kind, "commit", commit)
    assert not faulty_runs(model, said)
