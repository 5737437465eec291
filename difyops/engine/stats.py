"""What the engine tells of itself. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from difyops.engine.prefix import Usage
from difyops.engine.request import FinishReason


@dataclass
class Counters:
    """What has happened since the start."""

    steps: int = 0
    prompt_tokens: int = 0  # read, again after a preemption
    generated_tokens: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )
    #: Sequences in decoding passes of the model, summed: without guesses each makes one token.
    passes: int = 0
    #: By place behind the last token: guesses made, and those that came true.
    drafted: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """The engine at one moment. Bytes are those allocated."""

    running: int
    waiting: int
    slots: int
    free_slots: int
    pages: int
    free_pages: int
    preemptions: int
    slot_bytes: int
    token_bytes: int
    state_bytes: int
    counters: Counters
    prefix: Usage | None  # None: no prefix cache
    guesses: int  # of the last pass, for each sequence
