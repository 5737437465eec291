"""Which sequences were read before: snapshots on a hash chain, least recently used out first.

A snapshot stands at the end of some whole blocks and a shorter tail. Blocks are chained by hash,
so that a lookup costs one hash a block and not a comparison with everything that is kept. Knows no
torch: a snapshot is whatever has a length and a size.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar


class Kept(Protocol):
    """A state that can be gone on from."""

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        ...


K = TypeVar("K", bound=Kept)

#: The hash of whole blocks, and the tokens of the block that is not whole.
Place = tuple[bytes, tuple[int, ...]]


@dataclass
class Usage:
    """In tokens: what was looked up, and what of it had been kept. `evicted` counts snapshots;
    `kept` are those there are now, of `bytes`, which never exceed `budget`."""

    looked_up: int = 0
    reused: int = 0
    evicted: int = 0
    kept: int = 0
    bytes: int = 0
    budget: int = 0


class PrefixCache(Generic[K]):
    """Snapshots by the tokens they hold, within `budget` bytes.

    `drop` is called for a snapshot that is no longer kept.
    """

    def __init__(self, budget: int, drop: Callable[[K], None], block: int = 64) -> None:
        self.budget = budget
        self.block = block
        self.bytes = 0
        self.usage = Usage()
        self._drop = drop
        self._entries: OrderedDict[Place, tuple[K, int]] = OrderedDict()
        #: Lengths of the tails that are kept behind a chain of blocks.
        self._tails: dict[bytes, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def stats(self) -> Usage:
        """The usage at this moment."""
        return replace(self.usage, kept=len(self), bytes=self.bytes, budget=self.budget)

    def find(self, tokens: Sequence[int], salt: str = "") -> K | None:
        """The longest snapshot of a beginning of `tokens` that was kept with this `salt`; never of
        all of them, because the last token's scores have yet to be computed."""
        most = len(tokens) - 1
        for count, chained in reversed(list(_chain(tokens, self.block, salt))):
            for tail in sorted(self._tails.get(chained, ()), reverse=True):
                end = count + tail
                place = (chained, tuple(tokens[count:end]))
                if end <= most and place in self._entries:
                    self._entries.move_to_end(place)
                    return self._entries[place][0]
        return None

    def has(self, tokens: Sequence[int], salt: str = "") -> bool:
        """Whether exactly these tokens are kept; they count as used."""
        place = self._place(tokens, salt)
        if place not in self._entries:
            return False
        self._entries.move_to_end(place)
        return True

    def keep(self, tokens: Sequence[int], snapshot: K, size: int, salt: str = "") -> None:
        """Keep the state behind `tokens`, `size` bytes of it; the cache owns it from now on."""
        place = self._place(tokens, salt)
        if place in self._entries or size > self.budget:
            self._drop(snapshot)
            return
        while self.bytes + size > self.budget:
            self.evict()
        self._entries[place] = (snapshot, size)
        self.bytes += size
        chained, tail = place
        tails = self._tails.setdefault(chained, {})
        tails[len(tail)] = tails.get(len(tail), 0) + 1

    def evict(self) -> bool:
        """Drop what was not used for longest; False when nothing is kept."""
        if not self._entries:
            return False
        (chained, tail), (snapshot, size) = self._entries.popitem(last=False)
        tails = self._tails[chained]
        tails[len(tail)] -= 1
        if not tails[len(tail)]:
            del tails[len(tail)]
        if not tails:
            del self._tails[chained]
        self.bytes -= size
        self.usage.evicted += 1
        self._drop(snapshot)
        return True

    def clear(self) -> None:
        while self.evict():
            pass

    def _place(self, tokens: Sequence[int], salt: str) -> Place:
        *_, (count, chained) = _chain(tokens, self.block, salt)
        return chained, tuple(tokens[count:])


def _chain(tokens: Sequence[int], block: int, salt: str) -> Iterator[tuple[int, bytes]]:
    """(tokens in whole blocks, their hash), from none on. 128 bits: two chains never meet."""
    chained = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    yield 0, chained
    for start in range(0, len(tokens) - block + 1, block):
        part = struct.pack(f"<{block}I", *tokens[start : start + block])
        chained = hashlib.blake2b(chained + part, digest_size=16).digest()
        yield start + block, chained
