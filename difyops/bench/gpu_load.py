"""A random load on one engine: everything at once, for a while, and nothing may be lost."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from difyops.bench.gpu_engine import NoText, ask, greedy, running
from difyops.bench.gpu_exact import TRAINED, Parting, partings, summary, trained
from difyops.bench.gpu_model import Limits, Row, Wanted
from difyops.engine import drafters
from difyops.engine.grammar import GrammarConstraint, Grammars
from difyops.engine.load import Loaded
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import FinishReason, Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.errors import DifyopsError

CONTEXT, SLOTS = 768, 48
#: Far fewer than full slots would need: sequences are set back all the time.
PAGES = SLOTS * CONTEXT // 16 // 8
PREFIX_BYTES = 64 << 20
#: Requests of one wave; after each wave the engine is empty, and its books are looked at.
WAVE = (20, 160)
#: Greedy answers that are asked for again, alone.
AGAIN = 48
_SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "number"],
    "properties": {"name": {"enum": ["a", "b"]}, "number": {"type": "integer"}},
}  # fmt: skip


@dataclass
class Asked:
    """A request, what came of it, and after how many outputs its client leaves (None: never)."""

    request: Request
    leaves: int | None
    plain: bool
    tokens: list[int] = field(default_factory=list)
    outputs: int = 0
    finish: FinishReason | None = None


class Dice:
    """Random requests over one tokenizer."""

    def __init__(self, loaded: Loaded, seed: int) -> None:
        self._dice = random.Random(seed)  # noqa: S311  (a load, not a secret)
        words = loaded.tokenizer
        self._ids = [n for n in range(words.vocabulary) if n not in words.stop_ids]
        self._ends = frozenset(words.stop_ids)
        self._grammars = Grammars(words.backend, loaded.model.shape.vocabulary, words.stop_ids)
        self._stems = [self._text(300) for _ in range(8)]

    def wave(self) -> list[Asked]:
        return [self._asked() for _ in range(self._dice.randint(*WAVE))]

    def _text(self, most: int) -> list[int]:
        return self._dice.choices(self._ids, k=self._dice.randint(1, most))

    def _asked(self) -> Asked:
        dice = self._dice
        stem = dice.choice(self._stems)
        prompt = stem[: dice.randint(0, len(stem))] + self._text(dice.choice((8, 60, 400)))
        kind = dice.choices(("plain", "sampled", "grammar"), (5, 3, 2))[0]
        params: dict[str, Any] = {"temperature": 0.0}
        constraint: GrammarConstraint | None = None
        if kind == "sampled":
            params = {
                "temperature": dice.choice((0.5, 1.0)), "top_p": dice.choice((0.9, 1.0)),
                "top_k": dice.choice((0, 20)), "seed": dice.randrange(1 << 30),
                "repetition_penalty": dice.choice((1.0, 1.1)),
                "logprobs": dice.choice((None, 3)),
            }  # fmt: skip
        elif kind == "grammar":
            params["stop_ids"] = self._ends
            constraint = dice.choice(
                (
                    lambda: self._grammars.json_schema(_SCHEMA),
                    lambda: self._grammars.choice(["yes", "no", "perhaps"]),
                    lambda: self._grammars.regex(r"[0-9]{1,12}"),
                )
            )()
        sampling = SamplingParams(dice.randint(1, 160), **params)
        request = Request(prompt[: CONTEXT - 200], sampling, NoText(), constraint,
                          speculate=dice.random() < 0.9)  # fmt: skip
        leaves = dice.randint(0, 40) if dice.random() < 0.15 else None
        return Asked(request, leaves, kind == "plain")


@dataclass
class Tally:
    requests: int = 0
    tokens: int = 0
    cancelled: int = 0
    waves: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    finished: list[Asked] = field(default_factory=list)


def load(wanted: Wanted, limits: Limits) -> Iterator[Row]:
    there, here = trained("bfloat16", "cuda"), trained("float32", "cpu")
    yield from loading(there, here.model, wanted.seconds)


def loading(loaded: Loaded, reference: Decoder, seconds: float, **options: Any) -> Iterator[Row]:
    """Half of the time with each kind of guesses. Raises DifyopsError for a request that failed,
    IntegrityError for a slot or page that was lost."""
    dice = Dice(loaded, 0)
    room: dict[str, Any] = {"slots": SLOTS, "context": CONTEXT, "pages": PAGES, **options}
    plain: list[Asked] = []
    for kind in ("mtp", "ngram"):
        drafter = drafters.choose(kind, loaded.model)
        with running(loaded.model, drafter=drafter, prefix_bytes=PREFIX_BYTES, **room) as engine:
            tally = _waves(engine, dice, seconds / 2)
            guesses = engine.stats().counters
        emptied(engine)
        rate = tally.tokens / tally.seconds
        right, made = sum(guesses.accepted.values()), sum(guesses.drafted.values())
        note = (
            f"{tally.requests} requests in {tally.waves} waves, {tally.cancelled} left, "
            f"{tally.preemptions} preemptions, {right} of {made} guesses right; nothing lost"
        )
        facts = {name: value for name, value in vars(tally).items() if name != "finished"}
        yield Row(TRAINED, f"load, {kind}", round(tally.seconds), None, rate, None, note,
                  "seconds", facts=facts)  # fmt: skip
        plain += [a for a in tally.finished if a.plain and a.finish is FinishReason.LENGTH]
    yield _again(loaded.model, reference, plain[:: max(1, len(plain) // AGAIN)][:AGAIN])


def _waves(engine: Engine, dice: Dice, seconds: float) -> Tally:
    tally, began = Tally(), time.perf_counter()
    while not tally.waves or time.perf_counter() - began < seconds:
        asked = dice.wave()
        _wave(engine, asked)
        engine.pool.check()
        stats = engine.stats()
        if stats.running or stats.waiting or stats.free_slots != stats.slots:
            raise DifyopsError(f"after a wave {stats.running} run, {stats.waiting} wait")
        tally.waves += 1
        tally.requests += len(asked)
        tally.tokens += sum(len(one.tokens) for one in asked)
        tally.cancelled += sum(one.finish is FinishReason.CANCELLED for one in asked)
        tally.finished += asked
    tally.seconds = time.perf_counter() - began
    tally.preemptions = engine.stats().preemptions
    return tally


def _wave(engine: Engine, asked: Sequence[Asked]) -> None:
    """All of them, a few at a time, until the last has ended."""
    heard: queue.SimpleQueue[tuple[Asked, Output]] = queue.SimpleQueue()

    def deliver_to(one: Asked) -> Callable[[Output], None]:
        return lambda output: heard.put((one, output))

    waiting, going = list(asked), 0
    while waiting or going:
        for one in waiting[:8]:
            engine.submit(one.request, deliver_to(one))
        going, waiting = going + len(waiting[:8]), waiting[8:]
        one, output = heard.get()
        while True:
            going -= _took(engine, one, output)
            if heard.empty():
                break
            one, output = heard.get()


def _took(engine: Engine, one: Asked, output: Output) -> bool:
    """Whether the request has ended. Raises DifyopsError when it failed."""
    one.tokens += output.tokens
    one.outputs += 1
    if one.leaves is not None and one.outputs == one.leaves + 1 and output.finish is None:
        engine.cancel(one.request)
    if output.finish is FinishReason.ERROR:
        raise DifyopsError(f"a request failed: {output.error}")
    one.finish = output.finish
    return output.finish is not None


def emptied(engine: Engine) -> None:
    """Of an engine that has ended: with nothing kept, all is free. Raises DifyopsError,
    IntegrityError."""
    if engine.cache is not None:
        engine.cache.clear()
    engine.pool.check()
    stats = engine.stats()
    if (stats.free_slots, stats.free_pages) != (stats.slots, stats.pages):
        raise DifyopsError(
            f"{stats.slots - stats.free_slots} slots and {stats.pages - stats.free_pages} pages "
            "are lost"
        )


def _again(model: Decoder, reference: Decoder, asked: Sequence[Asked]) -> Row:
    """Greedy answers of the load, asked for again one by one with nothing beside them. Where both
    differ, the first that is not float32's best says how near a choice it was."""
    alone = []
    with running(model, slots=1, context=CONTEXT) as engine:
        for one in asked:
            request = greedy([one.request.prompt], one.request.sampling.max_tokens)
            alone.append(ask(engine, request)[0].tokens)
    partings = [
        _nearer(reference, one.request.prompt, one.tokens, tokens) if one.tokens != tokens else None
        for one, tokens in zip(asked, alone, strict=True)
    ]
    return summary(TRAINED, "load, again alone", partings, sum(map(len, alone)))


def _nearer(
    reference: Decoder, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]
) -> Parting:
    """Where two answers part: the gap of the float32 scores at that place."""
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    read = [*prompt, *one[:same]]
    (found,) = partings(reference, [read], [[-1]])
    if found is None:
        raise DifyopsError("no token is -1")
    return Parting(same, found.gap)
