"""Searches for a text in what arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

Symbol = TypeVar("Symbol")


class Pattern(Generic[Symbol]):
    """How much of `text` what was read ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: Sequence[Symbol]) -> None:
        """`text` is not empty."""
        self.text = text
        # _border[i]: the longest proper prefix of text[:i + 1] that it also ends with.
        self._border = [0]
        for symbol in text[1:]:
            self._border.append(self.advance(self._border[-1], symbol))

    def __len__(self) -> int:
        return len(self.text)

    def advance(self, matched: int, symbol: Symbol) -> int:
        """The length that matches after `symbol`; `matched`, before it, is less than the whole."""
        while matched and self.text[matched] != symbol:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == symbol)
