"""Which of the packed tokens belong to which sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Sequence i's tokens are the rows begin[i]:end[i] of what is packed; without those, `count`
    rows each, one sequence behind the other. Without `kept` the state stays as it was."""

    count: int = 1
    begin: Tensor | None = None
    end: Tensor | None = None
    kept: bool = True

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Spans:
        return cls(begin=cu_seqlens[:-1], end=cu_seqlens[1:])

    @classmethod
    def beginnings(cls, lengths: Tensor, count: int) -> Spans:
        """The first `lengths` ([B]) of `count` rows each."""
        begin = torch.arange(0, len(lengths) * count, count, device=lengths.device)
        return cls(begin=begin, end=begin + lengths)

    @property
    def short(self) -> bool:
        """Whether it is a step, or a few tokens each."""
        return self.begin is None and self.count <= 8

    @property
    def pointers(self) -> tuple[Tensor, Tensor] | None:
        """What a kernel is given of begin and end."""
        return None if self.begin is None or self.end is None else (self.begin, self.end)

    def blocks(self, tokens: int, size: int) -> int:
        """A bound of the blocks of `size` tokens that the packed `tokens` are cut into, each of one
        sequence (see functions.block_of)."""
        rows = 0 if self.begin is None else len(self.begin)
        return tokens // size + rows
