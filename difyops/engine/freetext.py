"""Where free text ends and a grammar begins: reasoning that closes, a tool call that opens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from difyops.engine.search import Pattern

#: Which of the texts is looked for, and how many of its bytes stand at the end of the output.
Place = tuple[int, int]

_SPACE = b" \t\n\r\v\f"


class FreeText:
    """Finds `texts`, one after the other, token by token.

    `optional`: the output may begin with the first text, after white space; one that does not
    skips it and the second. `bytes_of` tells the bytes of the tokens 0 to `known` - 1.
    """

    def __init__(
        self,
        texts: Sequence[str],
        bytes_of: Callable[[int], bytes],
        known: int,
        *,
        optional: bool = False,
    ) -> None:
        self._texts = [Pattern[int](text.encode()) for text in texts]
        self._optional = optional
        last = self._texts[-1].text[-1]
        self._tokens = [
            (token, data)
            for token, data in ((token, bytes_of(token)) for token in range(known))
            if last in data[:-1]
        ]
        self.overshooting = functools.cache(self._overshooting)

    @property
    def start(self) -> Place:
        return 0, 0

    @property
    def again(self) -> Place:
        """Only the last text is looked for."""
        return len(self._texts) - 1, 0

    def step(self, place: Place, data: bytes) -> tuple[Place, bytes | None]:
        """After `data`: the place, and the bytes behind the last text once it is there."""
        for i, byte in enumerate(data):
            place = self._next(place, byte)
            if place[0] == len(self._texts):
                return place, data[i + 1 :]
        return place, None

    def _next(self, place: Place, byte: int) -> Place:
        number, matched = place
        pattern = self._texts[number]
        if self._optional and number == 0 and pattern.text[matched] != byte:
            if matched == 0 and byte in _SPACE:
                return place
            # What was taken for the first text may be the beginning of a later one.
            return self.step((2, 0), bytes([*pattern.text[:matched], byte]))[0]
        matched = pattern.advance(matched, byte)
        return (number + 1, 0) if matched == len(pattern) else (number, matched)

    def _overshooting(self, place: Place) -> list[tuple[int, bytes]]:
        """The tokens that reach the end of the last text and go past it, with what is past it."""
        ends = ((token, self.step(place, data)[1]) for token, data in self._tokens)
        return [(token, rest) for token, rest in ends if rest]
