"""The whole engine: with scheduling, host code and everything but text."""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from difyops.bench.gpu_model import BEFORE, Row, Subject, random_tokens, step_limit
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Output, Request, SamplingParams
from difyops.engine.runner import Engine
from difyops.errors import DifyopsError

#: Tokens of each answer.
ANSWER = 128
PREFILL = 8192


class NoText:
    """In place of a tokenizer."""

    stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass
class Heard:
    """One answer as it comes: its tokens, when each output came, and how many tokens it brought."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


@contextmanager
def running(model: Decoder, **options: Any) -> Iterator[Engine]:
    """A warm engine that runs, and that ended without a failure. Raises DifyopsError else."""
    engine = Engine(model, **{"prefill_tokens": PREFILL, "max_waiting": 10**6, **options})
    engine.warm_up()
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
    if engine.failure is not None:
        raise DifyopsError(f"the engine ended: {engine.failure}")


def ask(engine: Engine, requests: Sequence[Request]) -> list[Heard]:
    """All of them at once, waited for. Raises DifyopsError when one of them fails."""
    heard = [Heard() for _ in requests]
    done: queue.SimpleQueue[Output] = queue.SimpleQueue()

    def deliver_to(one: Heard) -> Callable[[Output], None]:
        def deliver(output: Output) -> None:
            one.tokens += output.tokens
            one.times.append(time.perf_counter())
            one.counts.append(len(output.tokens))
            if output.finish is not None:
                done.put(output)

        return deliver

    engine.submit_all({r: deliver_to(one) for r, one in zip(requests, heard, strict=True)})
    if errors := [output.error for output in (done.get() for _ in requests) if output.error]:
        raise DifyopsError(f"a request failed: {errors[0]}")
    return heard


def greedy(prompts: Sequence[Sequence[int]], tokens: int) -> list[Request]:
    """Answers of exactly `tokens` tokens."""
    return [Request(p, SamplingParams(tokens, temperature=0.0), NoText()) for p in prompts]


def prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    return [random_tokens(vocabulary, length, seed) for seed in range(count)]


def engine(subject: Subject) -> Iterator[Row]:
    """The time between two tokens of the sequence that began last, so that all others run, too."""
    model = subject.model
    for size in subject.wanted.sequences:
        with running(model, slots=size, context=BEFORE + ANSWER) as made:
            asked = greedy(prompts(model.shape.vocabulary, size, BEFORE), ANSWER)
            last = ask(made, asked)[-1].times[: ANSWER // 2]
        seconds = statistics.median(b - a for a, b in pairwise(last))
        limit = step_limit(model, size, subject.limits)
        yield Row(subject.name, "engine", size, seconds, size / seconds, limit)


def throughput(model: Decoder, size: int, length: int, tokens: int) -> float:
    """Tokens a second from the first of `size` requests to the last one's end."""
    with running(model, slots=size, context=length + tokens) as made:
        ask(made, greedy(prompts(model.shape.vocabulary, size, length), 4))
        asked = greedy(prompts(model.shape.vocabulary, size, length), tokens)
        began = time.perf_counter()
        heard = ask(made, asked)
    return sum(len(one.tokens) for one in heard) / (max(o.times[-1] for o in heard) - began)
