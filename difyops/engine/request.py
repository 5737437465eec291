"""The nouns that the engine's parts share. Knows no torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop string, or a grammar that is complete
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"  # the client left
    ERROR = "error"  # the engine failed; Output.error says how


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. Temperature 0 is greedy.

    `logprobs` is how many alternatives to report beside each token (0: only the token's own; None:
    none). `stop_ids` end the output and are not part of its text. `seed` makes a request repeatable
    whatever runs beside it: the random number of a position depends on the seed and the position.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that does not say: OpenAI's values, unless the model brings its own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Constraint(Protocol):
    """A grammar's position in one request; see grammar.py. Used by the runner's thread only."""

    @property
    def finished(self) -> bool:
        """Nothing but the end may follow."""
        ...

    def mask(self) -> NDArray[np.int32] | None:
        """The allowed tokens as packed bits, int32 of shape [ceil(V / 32)]; None: all are."""
        ...

    def advance(self, token: int) -> None:
        """`token` was chosen. Raises ValueError if it is not allowed here."""
        ...

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` calls of advance back."""
        ...


class TextStream(Protocol):
    """Tokens -> text that may be shown; see tokens.py."""

    def push(self, token: int) -> str:
        """The text that is certain now: no half character, nothing that may begin a stop string."""
        ...

    def flush(self) -> str:
        """The end was reached: the rest of the text."""
        ...

    @property
    def stopped(self) -> bool:
        """A stop string was met; the text ends before it."""
        ...


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms; `top` holds (token, logprob), the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one engine step adds to a request. The last one has `finish`."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None


_numbers = itertools.count(1)


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine.

    `tokens` is the prompt and what was generated; the first `computed` of them are in the state of
    `slot`, once all that was launched is done. The model may be ahead of what the host has seen of
    its tokens: then as many are computed as are known, or one more. A request that waits, or that
    was preempted, has no slot and nothing computed.
    Without `speculate` nothing is guessed for it; states that are kept serve only requests with
    the same `salt`. Neither changes a token.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    text: TextStream
    constraint: Constraint | None = None
    speculate: bool = True
    salt: str = ""
    number: int = field(default_factory=lambda: next(_numbers))

    tokens: list[int] = field(init=False)
    computed: int = field(default=0, init=False)
    #: Tokens of the prompt whose state was there already.
    reused: int = field(default=0, init=False)
    slot: int | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)
    finish: FinishReason | None = field(default=None, init=False)
    #: The stop token that ended it, which is none of its `tokens`.
    ended_by: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def generated(self) -> Sequence[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def count(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - len(self.prompt)

    @property
    def pending(self) -> int:
        """Tokens that are known but not in the state yet; 1 is a decode step, and so is 0: the
        token to be read next is then on its way to the host."""
        return len(self.tokens) - self.computed


class QueueFull(Exception):
    """The queue is at its limit; `retry_after` is in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.waiting = waiting
        self.retry_after = retry_after


class EngineStopped(Exception):
    """The engine takes no more requests."""
