"""Speculation: guess tokens, let the model look at all of them in one pass, keep what it would
have said anyway.

The token of a position is a function of the model's scores there and of the request's seed (see
sample.py), so a guess is right when it is that token. Nothing that is printed depends on guesses:
not in greedy decoding, and not in sampling either, where the usual rejection scheme
(arXiv:2211.17192) keeps only the distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difyops.engine.models.decoder import Block, Decoder
from difyops.engine.request import Request
from difyops.engine.state import StatePool, StateSpec


@dataclass(frozen=True)
class Read:
    """What the model has just folded into its state, packed over sequences: prompts in prefill,
    accepted tokens in decoding.

    tokens: [N]; hidden: [N, width], after the final norm; slots: [B]; cu_seqlens: [B + 1].
    """

    tokens: Tensor
    hidden: Tensor
    slots: Tensor
    cu_seqlens: Tensor


class Drafter(ABC):
    """Guesses what follows. It is never wrong in what is printed, only in what it costs."""

    #: For /metrics and the log.
    name: str
    #: Most tokens of one guess.
    most: int

    def tracks(self) -> list[list[StateSpec]]:
        """What it keeps for each sequence: the layers of each of the pool's drafting tracks."""
        return []

    def held_bytes(self) -> int:
        """Bytes that it holds beside the model's parameters and what it keeps for each sequence."""
        return 0

    def read(self, read: Read, pool: StatePool) -> None:
        """The model went on. Called after every pass, before the next token is known."""
        return

    @abstractmethod
    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        """At most `k` guesses behind each request's last token: int64 [B, k].

        A place that it has no guess for holds -1. The pool is left as it was.
        """


class OnDevice(Drafter):
    """Guesses where the model runs: from the last token's number and the state alone, and without
    a wait for the device, so that it may be captured as a graph."""

    #: Tokens that a sequence has to have in its state before it is guessed for.
    depth: int = 0

    def blocks(self) -> Sequence[Block]:
        """What it runs that has a state."""
        return ()

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        tokens = torch.zeros(len(requests), 1 + k, dtype=torch.int64, device=slots.device)
        tokens[:, 0] = torch.tensor([request.tokens[-1] for request in requests])
        self.guess(tokens, slots, pool)
        return tokens[:, 1:]

    @abstractmethod
    def guess(self, window: Tensor, slots: Tensor, pool: StatePool) -> None:
        """Fill the places behind the first, which holds the last tokens: window [B, 1 + k]."""

    @abstractmethod
    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        """`read` of the first `accepted` ([B]) of window [B, K] with hidden states [B, K, width].

        More than one only of sequences that had `depth` tokens before.
        """

    def judged(self, guesses: Tensor, best: Tensor) -> Tensor:
        """What is compared with the model's own tokens `best`: both int64 [B, k]."""
        return guesses


def state_specs(model: Decoder, drafter: Drafter | None) -> list[StateSpec]:
    """All that a sequence keeps: the model's layers, and those of what drafts for it."""
    tracks = drafter.tracks() if drafter is not None else []
    return [*model.state_specs(), *(spec for track in tracks for spec in track)]


class PromptLookup(Drafter):
    """What followed the last time that the text's last few tokens stood there (prompt lookup
    decoding). Costs no model, and shines where answers quote their prompt."""

    name = "ngram"

    def __init__(self, most: int = 4, longest: int = 3) -> None:
        self.most = most
        self.longest = longest

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        rows = [look_up(request.tokens, self.longest, k) for request in requests]
        padded = [row + [-1] * (k - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=slots.device).view(len(rows), k)


def look_up(tokens: Sequence[int], longest: int, k: int, reach: int = 4096) -> list[int]:
    """At most `k` tokens that followed the nearest earlier place of the last `longest` tokens, or
    of fewer, down to 1. Looks back over `reach` tokens."""
    recent = list(tokens[-reach:])
    for size in range(min(longest, len(recent) - 1), 0, -1):
        ending = recent[-size:]
        for start in range(len(recent) - size - 1, -1, -1):
            if recent[start : start + size] == ending:
                return recent[start + size : start + size + k]
    return []


def window(requests: Sequence[Request], drafts: Tensor) -> Tensor:
    """What verify is given: each request's last token and its draft, [B, 1 + k]. A place without a
    guess is token 0, which `accepted` never takes for one."""
    last = torch.tensor([request.tokens[-1] for request in requests], device=drafts.device)
    return torch.cat((last[:, None], drafts.clamp_min(0)), dim=1)


def packed(rows: Tensor, accepted: Tensor) -> Tensor:
    """The first accepted[i] of each row: [B, K, …] -> [N, …]."""
    kept = torch.arange(rows.shape[1], device=rows.device) < accepted[:, None]
    return rows[kept]
