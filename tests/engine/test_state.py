"""Slots, pages and snapshots under any order of use, against a model that keeps plain lists."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from difyops.engine.slots import IntegrityError, SlotTable
from difyops.engine.state import Snapshot, StatePool, StateSpec, TensorSpec

SLOTS, PAGES, SIZE, CONTEXT, WINDOW = 3, 7, 4, 18, 3
RECURRENT = StateSpec(
    slot={"S": TensorSpec((2,), torch.float64, fill=0.5)},
    replay={"x": TensorSpec((), torch.float64)},
)
PAGED = StateSpec(token={"k": TensorSpec((3,), torch.float64), "v": TensorSpec((), torch.float64)})


def made(*specs: StateSpec, pages: int | None = PAGES) -> StatePool:
    return StatePool(
        specs, slots=SLOTS, context=CONTEXT, window=WINDOW, page_size=SIZE, pages=pages
    )


@dataclass
class Sequence:
    """What a slot must hold: a number for each token, and one for the recurrent state."""

    tokens: list[float] = field(default_factory=list)
    state: float = 0.5

    def copy(self) -> Sequence:
        return Sequence(list(self.tokens), self.state)


@dataclass(eq=False)
class Kept:
    snapshot: Snapshot
    sequence: Sequence


class Use(RuleBasedStateMachine):
    """Requests that come, grow, are kept, restored and go, in a pool with too few pages."""

    kept = Bundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.pool = made(RECURRENT, PAGED, RECURRENT, PAGED)
        self.live: dict[int, Sequence] = {}
        self.snapshots: list[Kept] = []
        self.numbers = itertools.count(1)

    def slot(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.live)), label="slot")

    @rule()
    def acquire(self) -> None:
        slot = self.pool.table.acquire()
        if slot is None:
            assert len(self.live) == SLOTS
        else:
            assert slot not in (0, *self.live)
            self.live[slot] = Sequence()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(0, 9))
    def write(self, data: st.DataObject, more: int) -> None:
        """A prefill or step; without the pages nothing happens."""
        slot = self.slot(data)
        sequence, table = self.live[slot], self.pool.table
        start = len(sequence.tokens)
        more = min(more, CONTEXT - start)
        before, free = list(table.pages_of(slot)), table.free_pages
        missing = table.needed(start + more) - len(before)
        if not table.grow(slot, start + more):
            assert missing > free
            assert (list(table.pages_of(slot)), table.free_pages) == (before, free)
            return
        assert list(table.pages_of(slot))[: len(before)] == before
        self.fold(slot, [float(next(self.numbers)) for _ in range(more)])

    def fold(self, slot: int, numbers: list[float]) -> None:
        self.pool.sync()
        self.put(slot, len(self.live[slot].tokens), numbers)
        state = float(next(self.numbers))
        slots = torch.tensor([slot])
        for layer in self.pool.layers[::2]:
            layer.write(slots, {"S": torch.full((1, 2), state)})
        self.pool.advance(slots, torch.tensor([len(numbers)]))
        self.live[slot].tokens += numbers
        self.live[slot].state = state

    def put(self, slot: int, start: int, numbers: list[float]) -> None:
        positions = torch.arange(start, start + len(numbers))
        for layer in self.pool.layers[1::2]:
            rows = layer.rows(torch.tensor(slot).expand_as(positions), positions)
            values = torch.tensor(numbers, dtype=torch.float64)
            layer.token["v"][rows] = values
            layer.token["k"][rows] = values[:, None] + torch.arange(3) / 8

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, WINDOW))
    def draft(self, data: st.DataObject, count: int) -> None:
        """Verify writes behind the length what is then thrown away."""
        slot = self.slot(data)
        start = len(self.live[slot].tokens)
        if self.pool.table.grow(slot, start + count):
            self.pool.sync()
            self.put(slot, start, [-float(next(self.numbers)) for _ in range(count)])

    @rule()
    def pad(self) -> None:
        """The null slot is written by every batch that it fills up."""
        self.pool.sync()
        self.put(0, 0, [-1e9])
        for layer in self.pool.layers[::2]:
            layer.write(torch.tensor([0]), {"S": torch.full((1, 2), -1e9)})

    @precondition(lambda self: self.live)
    @rule(data=st.data(), target=kept)
    def snapshot(self, data: st.DataObject) -> Kept:
        slot = self.slot(data)
        snapshot = self.pool.snapshot(slot)
        assert snapshot.length == len(self.live[slot].tokens)
        needed = -(-snapshot.length // SIZE)
        assert list(snapshot.lease.pages) == list(self.pool.table.pages_of(slot))[:needed]
        self.snapshots.append(Kept(snapshot, self.live[slot].copy()))
        return self.snapshots[-1]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), kept=kept)
    def restore(self, data: st.DataObject, kept: Kept) -> None:
        """Into any slot, the one it was taken from too; again and again."""
        slot, table = self.slot(data), self.pool.table
        before, free = list(table.pages_of(slot)), table.free_pages
        full, partial = divmod(kept.snapshot.length, SIZE)
        try:
            self.pool.restore(slot, kept.snapshot)
        except MemoryError:
            assert partial
            assert not free
            assert list(table.pages_of(slot)) == before
            return
        pages = list(table.pages_of(slot))
        assert pages[:full] == list(kept.snapshot.lease.pages[:full])
        assert len(pages) == full + bool(partial)
        assert not partial or pages[-1] not in kept.snapshot.lease.pages
        self.live[slot] = kept.sequence.copy()

    @rule(kept=consumes(kept))
    def drop(self, kept: Kept) -> None:
        self.pool.drop(kept.snapshot)
        self.snapshots.remove(kept)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = self.slot(data)
        del self.live[slot]
        self.pool.release(slot)

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        self.pool.check()
        owned = [page for slot in self.live for page in self.pool.table.pages_of(slot)]
        assert 0 not in owned
        assert self.pool.table.free_slots == SLOTS - len(self.live)
        # A page that two slots share is behind neither's length: nobody writes it.
        for slot, sequence in self.live.items():
            writable = self.pool.table.pages_of(slot)[len(sequence.tokens) // SIZE :]
            assert all(owned.count(page) == 1 for page in writable)

    @invariant()
    def every_slot_reads_back_what_was_written(self) -> None:
        self.pool.sync()
        for slot, sequence in self.live.items():
            self.reads(slot, sequence)

    def reads(self, slot: int, sequence: Sequence) -> None:
        assert int(self.pool.lengths[slot]) == len(sequence.tokens)
        # Whatever is written where a slot has no page falls on the null page, never on another's.
        pages = list(self.pool.table.pages_of(slot))
        row = self.pool.layers[0].table[slot].tolist()
        assert row == pages + [0] * (len(row) - len(pages))
        positions = torch.arange(len(sequence.tokens))
        for recurrent, paged in zip(self.pool.layers[::2], self.pool.layers[1::2], strict=True):
            assert recurrent.read(torch.tensor([slot]))["S"].tolist() == [[sequence.state] * 2]
            rows = paged.rows(torch.tensor(slot).expand_as(positions), positions)
            assert paged.token["v"][rows].tolist() == sequence.tokens
            expected = [[token, token + 0.125, token + 0.25] for token in sequence.tokens]
            assert paged.token["k"][rows].tolist() == expected

    def teardown(self) -> None:
        """Every snapshot is still good, and in the end everything is free."""
        for slot in self.live:
            self.pool.release(slot)
        slot = self.pool.table.acquire()
        assert slot is not None
        while self.snapshots:
            kept = self.snapshots.pop()
            try:
                self.pool.restore(slot, kept.snapshot)
                self.reads(slot, kept.sequence)
            except MemoryError:
                assert not self.pool.table.free_pages
            self.pool.drop(kept.snapshot)
        self.pool.release(slot)
        self.pool.check()
        assert self.pool.table.free_pages == PAGES
        assert self.pool.table.free_slots == SLOTS


Use.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestUse = Use.TestCase


def test_a_model_without_pages_keeps_nothing_per_token() -> None:
    pool = made(RECURRENT, pages=None)
    slot = pool.table.acquire()
    assert slot is not None
    assert pool.table.pages == 0
    assert pool.table.grow(slot, 10**9)
    pool.sync()
    pool.layers[0].write(torch.tensor([slot]), {"S": torch.ones(1, 2)})
    pool.advance(torch.tensor([slot]), torch.tensor([5]))
    saved = pool.snapshot(slot)
    pool.release(slot)
    again = pool.table.acquire()
    assert again is not None
    pool.sync()
    assert pool.layers[0].slot["S"][again].tolist() == [0.5, 0.5]
    pool.restore(again, saved)
    assert pool.layers[0].slot["S"][again].tolist() == [1, 1]
    assert int(pool.lengths[again]) == saved.length == 5
    assert saved.lease.pages == ()
    pool.drop(saved)
    pool.check()


def test_a_snapshot_is_a_copy_of_constant_state_only() -> None:
    pool = made(RECURRENT, PAGED, RECURRENT)
    slot = pool.table.acquire()
    assert slot is not None
    assert pool.table.grow(slot, 9)
    pool.sync()
    pool.advance(torch.tensor([slot]), torch.tensor([9]))
    free = pool.table.free_pages
    saved = pool.snapshot(slot)
    assert saved.bytes == pool.slot_bytes == 2 * RECURRENT.slot_bytes
    assert pool.table.free_pages == free
    pool.release(slot)
    assert pool.table.free_pages == PAGES - 3
    pool.drop(saved)
    assert pool.table.free_pages == PAGES


def test_a_snapshot_that_was_dropped_is_gone() -> None:
    pool = made(PAGED)
    slot = pool.table.acquire()
    assert slot is not None
    assert pool.table.grow(slot, 4)
    pool.sync()
    pool.advance(torch.tensor([slot]), torch.tensor([4]))
    first, second = pool.snapshot(slot), pool.snapshot(slot)
    pool.drop(first)
    for use in (pool.drop, lambda gone: pool.restore(slot, gone)):
        with pytest.raises(KeyError):
            use(first)
        pool.check()
    pool.release(slot)
    assert pool.table.free_pages == PAGES - 1
    pool.drop(second)
    assert pool.table.free_pages == PAGES


def test_a_slot_given_back_twice_is_an_error() -> None:
    table = SlotTable(2, 4, 4)
    slot = table.acquire()
    assert slot is not None
    table.release(slot)
    with pytest.raises(KeyError):
        table.release(slot)
    with pytest.raises(KeyError):
        table.release(0)
    table.check()


@pytest.mark.parametrize("harm", ["lost page", "lost slot", "page twice", "lease unknown", "leak"])
def test_the_books_are_checked(harm: str) -> None:
    table = SlotTable(2, 4, 4)
    slot = table.acquire()
    assert slot is not None
    assert table.grow(slot, 7)
    lease = table.lease(slot, 5)
    table.check([lease])
    leases = [lease]
    if harm == "lost page":
        table._free_pages.pop()
    elif harm == "lost slot":
        table._free_slots.pop()
    elif harm == "page twice":
        table._free_pages.append(table.pages_of(slot)[0])
    elif harm == "lease unknown":
        leases = []
    else:
        table._owned[slot].pop()
    with pytest.raises(IntegrityError):
        table.check(leases)
