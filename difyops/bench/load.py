"""The load generator: N streams at a time over HTTP, and what each of them saw."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from difyops.errors import DifyopsError
from difyops.openai_client import (
    CHAT_PATH,
    Endpoint,
    EventReader,
    Message,
    chat_body,
    connection,
    explained,
    refusal,
)

#: Frequent words, each a single token (with the space before it) of the vocabularies in use.
_WORDS = (
    *("time", "people", "water", "house", "light", "world", "music", "river", "paper", "stone"),
    *("green", "night", "story", "table", "money", "north", "south", "field", "horse", "bread"),
    *("heart", "glass", "earth", "voice", "plant", "white", "black", "small", "large", "early"),
    *("ready", "quiet", "happy", "clear", "strong", "simple", "open", "round", "empty", "young"),
)
#: The system prompt has 6, the question at least 2.
FEWEST_WORDS = 8


@dataclass(frozen=True)
class Sample:
    """One answer. `first` is seconds from sending to the first text, `gaps` are the seconds from
    each piece of text to the next, as a reader sees them."""

    first: float
    gaps: tuple[float, ...]
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Round:
    """Answers that were asked for together; `seconds` is from the first request to the last end."""

    samples: tuple[Sample, ...]
    seconds: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def prompt(words: int, seed: int) -> list[Message]:
    """A chat of `words` words, FEWEST_WORDS or more, in an order of its own: no cache of prefixes
    has seen it. The words are the same for every seed, and so is their number of tokens."""
    chosen = [_WORDS[i % len(_WORDS)] for i in range(words)]
    random.Random(seed).shuffle(chosen)  # noqa: S311  (a repeatable order, not a secret)
    # The order differs from the first words on: those of the system prompt.
    return [
        {"role": "system", "content": "Words: " + " ".join(chosen[:6])},
        {"role": "user", "content": "Words: " + " ".join(chosen[6:])},
    ]


class HttpServer:
    """An OpenAI-compatible server under load. `extra` are fields of its own for every request."""

    def __init__(self, name: str, endpoint: Endpoint, extra: Mapping[str, Any]) -> None:
        self.name = name
        self._endpoint = endpoint
        self._extra = extra

    def measure(self, prompts: Sequence[list[Message]], streams: int, tokens: int) -> Round:
        """Ask all `prompts`, `streams` at a time, for answers of `tokens` tokens.

        Raises Refused or DifyopsError when one of them fails: a partial load is no measurement.
        """
        return asyncio.run(self._measure(prompts, streams, tokens))

    async def _measure(self, prompts: Sequence[list[Message]], streams: int, tokens: int) -> Round:
        options = {"max_tokens": tokens, "temperature": 0, **self._extra}
        bodies = iter([chat_body(self._endpoint.model, p, options) for p in prompts])
        settings = connection(self._endpoint.url, self._endpoint.key)
        async with httpx.AsyncClient(**settings) as client:
            began = time.perf_counter()
            done = await asyncio.gather(*(self._stream(client, bodies) for _ in range(streams)))
            seconds = time.perf_counter() - began
        return Round(tuple(sample for samples in done for sample in samples), seconds)

    async def _stream(
        self, client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]]
    ) -> list[Sample]:
        return [await self._answer(client, body) for body in bodies]

    async def _answer(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
        url = self._endpoint.url
        moments: list[float] = []
        tokens = prompt_tokens = None
        began = time.perf_counter()
        with explained(url):
            async with client.stream("POST", CHAT_PATH, json=body) as answer:
                if answer.status_code != 200:
                    raise refusal(url, answer.status_code, answer.headers, await answer.aread())
                reader = EventReader(url)
                async for chunk in answer.aiter_bytes():
                    now = time.perf_counter()
                    for event in reader.feed(chunk):
                        if event.text or event.reasoning:
                            moments.append(now)
                        if event.tokens is not None:
                            tokens, prompt_tokens = event.tokens, event.prompt_tokens
                reader.close()
        if tokens is None or prompt_tokens is None:
            raise DifyopsError(f"{url} does not count its tokens (no usage in the stream)")
        return sample(began, moments, tokens, prompt_tokens)


def sample(began: float, moments: Sequence[float], tokens: int, prompt_tokens: int) -> Sample:
    """From the moments at which text came. Raises DifyopsError when none came."""
    if not moments:
        raise DifyopsError("an answer came without any text")
    gaps = tuple(b - a for a, b in itertools.pairwise(moments))
    return Sample(moments[0] - began, gaps, tokens, prompt_tokens)
