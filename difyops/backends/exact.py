"""Does a server answer the same whichever way an answer takes through it?

A greedy answer is a function of its prompt. A prefix cache, speculation and batching are to change
how fast it comes and nothing else; on recurrent state they are easily wrong, and the text still
reads well. So the same requests are asked by every way that can be told apart from outside.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from difyops.backends import probe
from difyops.errors import DifyopsError
from difyops.secrets import Secret

#: Two tokens whose log probabilities differ by less are a tie that rounding decides. Ours computes
#: in 32 bits; others round their weights, states or activations to 8 or 16 bits, and a batch of
#: another shape rounds otherwise. llama.cpp with quantised weights and no fault: up to 0.27, in 80
#: comparisons of all ways.
NEAR_TIE = 0.05
NEAR_TIE_ROUNDED = 0.5
#: Of each answer.
TOKENS = 16
#: Seconds for one of them: a large model on a processor takes its time.
PATIENCE = 300.0

#: About 130 tokens: several blocks of any prefix cache.
_STORY = (
    "Once there was a lighthouse on a rock, far out in the sea, and its keeper wrote down "
    "everything that passed. On Monday he saw two ships with red sails and a whale. On Tuesday "
    "there was fog, and he saw nothing, but he heard a bell. On Wednesday a small boat came with "
    "bread, apples, lamp oil and a book about birds. On Friday the wind broke a window. On "
    "Saturday he mended it, and in the evening the two ships with the red sails came back."
)
_QUESTION = "Tell what the keeper saw on Sunday."
_SECOND = "And on the Monday after that?"

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Ways:
    """Fields of a request by which this server goes another way (None: it knows none), and how
    near to each other two tokens have to be for its rounding to choose."""

    uncached: Mapping[str, Any] | None = None
    unguessed: Mapping[str, Any] | None = None
    near_tie: float = NEAR_TIE_ROUNDED


@dataclass(frozen=True)
class Difference:
    """Two answers to one request. `at` counts characters that are the same; `gap` is between the
    two greatest log probabilities there (None: the server does not say), and below `limit` it is
    a tie."""

    ways: tuple[str, str]
    texts: tuple[str, str]
    at: int
    gap: float | None
    limit: float

    @property
    def near_tie(self) -> bool:
        return self.gap is not None and self.gap < self.limit

    def __str__(self) -> str:
        one, other = (text[self.at : self.at + 30] for text in self.texts)
        if self.gap is None:
            judged = "the server gives no logprobs there: a tie cannot be told from a fault"
        else:
            judged = (
                f"gap of the two likeliest tokens: {self.gap:.2g}, a near-tie is below "
                f"{self.limit:g}"
            )
        return (
            f"after {self.at} equal characters {self.ways[0]} says {one!r}, {self.ways[1]} "
            f"{other!r} ({judged})"
        )


@dataclass(frozen=True)
class Comparison:
    """`seen` are the ways that were gone. `difference` is the worst."""

    answers: int
    seen: tuple[str, ...]
    difference: Difference | None


def ways(backend: str, base_url: str, model: str, api_key: Secret | None) -> Ways:
    """What is known of our own servers, and of those that name themselves in `/v1/models`.

    Nothing is tried out: many servers ignore fields that they do not know, which would prove
    nothing. Raises DifyopsError as `probe.describe` does.
    """
    engine = backend
    if backend == "external":
        found = probe.describe(base_url, api_key)
        engine = next((about.engine or "" for about in found if about.id == model), "")
    if engine == "native":
        return Ways({"cache_salt": secrets.token_hex(8)}, {"speculate": False}, NEAR_TIE)
    if engine == "llamacpp":
        return Ways({"cache_prompt": False})
    return Ways({"cache_salt": secrets.token_hex(8)}) if engine == "vllm" else Ways()


def compare(
    base_url: str,
    model: str,
    api_key: Secret | None = None,
    *,
    ways: Ways,
    tokens: int = TOKENS,
    tell: Callable[[str], None] = lambda way: None,
) -> Comparison:
    """Ask, compare, and where two answers differ look how near to a tie that place is. `tell`
    hears each way before it is gone.

    Raises DifyopsError when a request fails.
    """
    return _Asking(base_url, model, api_key, ways, tokens, tell).compare()


class _Asking:
    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: Secret | None,
        ways: Ways,
        tokens: int,
        tell: Callable[[str], None],
    ) -> None:
        self._tell = tell
        self._server = (base_url, model, api_key)
        self._ways = ways
        self._tokens = tokens
        self._said: list[list[tuple[str, str]]] = []  # (way, answer) for each conversation
        self._asked: list[Conversation] = []

    def compare(self) -> Comparison:
        # A beginning that no cache has seen: an earlier run must not warm this one.
        mark = f"Story {secrets.randbelow(10**6):06d}."
        first = [{"role": "user", "content": f"{mark} {_STORY} {_QUESTION}"}]
        answer = self._ask(first, "cold")
        self._ask(first, "warm")
        second = [
            *first,
            {"role": "assistant", "content": answer or "Nothing."},
            {"role": "user", "content": _SECOND},
        ]
        self._ask(second, "a second turn on the first's history")
        if self._ways.uncached is None:
            self._ask(second, "the second turn again")
        else:
            self._ask(second, "the second turn, nothing cached", self._ways.uncached)
        if self._ways.unguessed is not None:
            self._ask(first, "no speculation", self._ways.unguessed)
        self._tell("two at the same time")
        with ThreadPoolExecutor(2) as threads:
            together = [threads.submit(self._text, each, {}) for each in (first, second)]
            for number, text in enumerate(together):
                self._said[number].append(("two at the same time", text.result()))
        return self._compared()

    def _ask(
        self, conversation: Conversation, way: str, extra: Mapping[str, Any] | None = None
    ) -> str:
        self._tell(way)
        text = self._text(conversation, extra or {})
        if conversation not in self._asked:
            self._asked.append(conversation)
            self._said.append([])
        self._said[self._asked.index(conversation)].append((way, text))
        return text

    def _text(self, conversation: Conversation, extra: Mapping[str, Any]) -> str:
        return self._greedy(conversation, extra)[0]

    def _greedy(
        self, conversation: Conversation, extra: Mapping[str, Any]
    ) -> tuple[str, list[probe.ScoredToken]]:
        return probe.greedy(
            *self._server,
            messages=conversation,
            max_tokens=self._tokens,
            extra=extra,
            timeout=PATIENCE,
        )

    def _compared(self) -> Comparison:
        different = [
            self._difference(conversation, said[0], other)
            for conversation, said in zip(self._asked, self._said, strict=True)
            for other in said[1:]
            if other[1] != said[0][1]
        ]
        seen = tuple(dict.fromkeys(way for said in self._said for way, _ in said))
        # One that cannot be judged weighs less than one that is no tie, and more than a tie.
        worst = max(different, key=lambda d: d.limit if d.gap is None else d.gap, default=None)
        return Comparison(sum(map(len, self._said)), seen, worst)

    def _difference(
        self, conversation: Conversation, one: tuple[str, str], other: tuple[str, str]
    ) -> Difference:
        pairs = zip(one[1], other[1], strict=False)
        shorter = min(len(one[1]), len(other[1]))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        gap = self._gap(conversation, one[1][:at])
        ways = (one[0], other[0])
        return Difference(ways, (one[1], other[1]), at, gap, self._ways.near_tie)

    def _gap(self, conversation: Conversation, common: str) -> float | None:
        """Where the answer leaves `common`; None when the server does not score tokens, or takes a
        third way meanwhile. Asked only now: scores may make a server go another way."""
        extra = {"logprobs": True, "top_logprobs": 2, **(self._ways.uncached or {})}
        try:
            _, tokens = self._greedy(conversation, extra)
        except DifyopsError:
            return None
        text = ""
        for token in tokens:
            text += token.text
            if len(text) > len(common):
                return token.gap if text.startswith(common) else None
        return None
