"""Which slot and which pages belong to whom. Knows no torch: the scheduler works on this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


class IntegrityError(RuntimeError):
    """The books do not add up: a slot or page is lost, or has two owners."""


@dataclass(frozen=True, eq=False)
class Lease:
    """Pages that a snapshot keeps. They hold the first `length` tokens of its sequence; what they
    hold of the first `settled` never changes.

    Two leases of the same pages are two: each is given back once.
    """

    pages: tuple[int, ...]
    length: int
    settled: int


@dataclass
class SlotTable:
    """The free lists of slots and pages. Slot 0 and page 0 are null: nobody owns them.

    `pages` may be 0: a model without softmax layers keeps nothing per token. A page has as many
    references as owners: one slot, and any number of leases and of slots that adopted one.
    `fresh` and `moved` are the slots whose tensors the state pool has yet to reset and whose page
    rows it has yet to write.
    """

    slots: int
    pages: int
    page_size: int
    fresh: set[int] = field(default_factory=set, init=False)
    moved: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.slots, 0, -1))
        self._free_pages = list(range(self.pages, 0, -1))
        self._owned: dict[int, list[int]] = {}
        self._references: Counter[int] = Counter()

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    def needed(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence fill."""
        return -(-tokens // self.page_size) if self.pages else 0

    def acquire(self) -> int | None:
        """An empty slot; None when all are taken."""
        if not self._free_slots:
            return None
        slot = self._free_slots.pop()
        self._owned[slot] = []
        self.fresh.add(slot)
        self.moved.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give the slot back, and its references to pages. Raises KeyError if it is not taken."""
        for page in self._owned.pop(slot):
            self._drop(page)
        self.fresh.discard(slot)
        self.moved.discard(slot)
        self._free_slots.append(slot)

    def grow(self, slot: int, tokens: int) -> bool:
        """Let `slot` hold `tokens` tokens in all; False, and nothing changed, without the pages."""
        owned = self._owned[slot]
        missing = self.needed(tokens) - len(owned)
        if missing > len(self._free_pages):
            return False
        for _ in range(missing):
            owned.append(self._take())
            self.moved.add(slot)
        return True

    def lease(self, slot: int, length: int, settled: int | None = None) -> Lease:
        """Keep the pages of the slot's first `length` tokens, whatever becomes of the slot.

        They may be written again only behind `settled` tokens, which is `length` unless said.
        """
        pages = tuple(self._owned[slot][: self.needed(length)])
        for page in pages:
            self._references[page] += 1
        return Lease(pages, length, length if settled is None else settled)

    def end(self, lease: Lease) -> None:
        """Give a lease back."""
        for page in lease.pages:
            self._drop(page)

    def shared(self, lease: Lease) -> int:
        """How many of its pages whoever adopts it shares; the others are copied."""
        return min(lease.settled // self.page_size, len(lease.pages))

    def adopt(self, slot: int, lease: Lease) -> list[tuple[int, int]]:
        """Make the lease's tokens those of `slot`, in place of its own.

        Pages of settled tokens alone are shared. Those that are going to be written the slot gets
        anew: the answer is (from, to) of each, to be copied. Raises MemoryError without free pages
        for them; the slot is then unchanged.
        """
        full = self.shared(lease)
        shared, written = lease.pages[:full], lease.pages[full:]
        if len(written) > len(self._free_pages):
            raise MemoryError("no free page")
        for page in shared:
            self._references[page] += 1
        copies = [(page, self._take()) for page in written]
        for page in self._owned[slot]:
            self._drop(page)
        self._owned[slot] = [*shared, *(to for _, to in copies)]
        self.moved.add(slot)
        return copies

    def pages_of(self, slot: int) -> Sequence[int]:
        return self._owned[slot]

    def check(self, leases: Sequence[Lease] = ()) -> None:
        """Every slot and page is free or owned, once. `leases` are all that are out.

        Raises IntegrityError saying what is lost.
        """
        slots = Counter(self._free_slots) + Counter(self._owned.keys())
        if slots != Counter(range(1, self.slots + 1)):
            raise IntegrityError(f"slots: {_unbalanced(slots, self.slots)}")
        counted = Counter(page for owned in self._owned.values() for page in owned)
        counted.update(page for lease in leases for page in lease.pages)
        if counted != +self._references:
            raise IntegrityError(
                f"pages: references {dict(+self._references)}, owners {dict(counted)}"
            )
        pages = Counter(self._free_pages) + Counter(counted.keys())
        if pages != Counter(range(1, self.pages + 1)):
            raise IntegrityError(f"pages: {_unbalanced(pages, self.pages)}")

    def _take(self) -> int:
        page = self._free_pages.pop()
        self._references[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._references[page] -= 1
        if not self._references[page]:
            del self._references[page]
            self._free_pages.append(page)


def _unbalanced(seen: Counter[int], count: int) -> str:
    lost = [i for i in range(1, count + 1) if not seen[i]]
    twice = [i for i, times in seen.items() if times > 1]
    return f"lost {lost}, owned twice {twice}"
