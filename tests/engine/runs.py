"""A whole model in a pool, run by hand: what the scheduler and the runner do for real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difyops.engine.models.decoder import Decoder
from difyops.engine.state import StatePool


@dataclass
class Run:
    """`slots` sequences of at most `context` tokens; every form answers logits."""

    model: Decoder
    pool: StatePool

    @classmethod
    def of(cls, model: Decoder, *, slots: int = 3, context: int = 128, window: int = 8) -> Run:
        return cls(
            model, StatePool(model.state_specs(), slots=slots, context=context, window=window)
        )

    def slot(self) -> int:
        slot = self.pool.table.acquire()
        assert slot is not None
        assert self.pool.table.grow(slot, self.pool.context)
        self.pool.sync()
        return slot

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """[T] -> logits [T, V]."""
        bounds = torch.tensor([0, len(tokens)])
        with torch.inference_mode():
            hidden = self.model.prefill(
                torch.tensor(tokens), self.pool, torch.tensor([slot]), bounds
            )
            return self.model.logits(hidden)

    def step(self, tokens: dict[int, int]) -> Tensor:
        """slot -> token; logits [B, V]."""
        with torch.inference_mode():
            hidden = self.model.step(
                torch.tensor(list(tokens.values())), self.pool, torch.tensor(list(tokens))
            )
            return self.model.logits(hidden)

    def verify(self, slot: int, tokens: Sequence[int], accepted: int) -> Tensor:
        """[K] -> logits [K, V]; the first `accepted` tokens are kept."""
        slots = torch.tensor([slot])
        with torch.inference_mode():
            hidden = self.model.verify(torch.tensor([tokens]), self.pool, slots)
            self.model.commit(self.pool, slots, torch.tensor([accepted]))
            return self.model.logits(hidden)[0]
