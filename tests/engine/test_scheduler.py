"""The scheduler against a machine that only counts: nobody starves, nothing is lost."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difyops.engine.request import FinishReason, QueueFull, Request, SamplingParams
from difyops.engine.scheduler import Batch, Limits, Scheduler
from difyops.engine.slots import IntegrityError, SlotTable


class NoText:
    stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def request(prompt: int, generate: int = 5) -> Request:
    return Request(list(range(prompt)), SamplingParams(max_tokens=generate), NoText())


def make(
    *, slots: int = 2, pages: int = 0, page: int = 4, context: int = 1000, **limits: int
) -> Scheduler:
    return Scheduler(SlotTable(slots, pages, page), Limits(context, **limits))


def run(scheduler: Scheduler, batch: Batch) -> None:
    """What the runner does, without a model: every sampled token is 0."""
    for span in batch.prefill:
        span.request.computed = span.stop
    for r in batch.decode:
        r.computed += 1
    sampled = [span.request for span in batch.prefill if span.last] + list(batch.decode)
    for r in sampled:
        r.tokens.append(0)
        if r.count >= r.sampling.max_tokens:
            scheduler.finish(r, FinishReason.LENGTH)


def test_it_knows_no_torch() -> None:
    code = "import sys, difyops.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_admission_is_a_free_slot() -> None:
    scheduler = make(slots=2)
    requests = [request(3) for _ in range(3)]
    for r in requests:
        scheduler.submit(r)
    batch = scheduler.next()
    assert [span.request for span in batch.prefill] == requests[:2]
    assert list(scheduler.waiting) == requests[2:]
    scheduler.finish(requests[0], FinishReason.STOP)
    assert requests[2] in [span.request for span in scheduler.next().prefill]


def test_prompts_are_read_in_chunks_beside_decoding() -> None:
    scheduler = make(prefill_tokens=8)
    chatting, book = request(2, 50), request(40)
    scheduler.submit(chatting)
    run(scheduler, scheduler.next())
    scheduler.submit(book)
    seen = []
    while book.pending > 1:
        batch = scheduler.next()
        assert batch.decode == (chatting,)
        seen += [(span.start, span.stop) for span in batch.prefill]
        run(scheduler, batch)
    assert seen == [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40)]


def test_the_last_part_of_a_prompt_begins_at_a_block() -> None:
    for length, parts in ((20, [(0, 16), (16, 20)]), (17, [(0, 16)]), (16, [(0, 8), (8, 16)]),
                          (5, [(0, 5)])):  # fmt: skip
        scheduler = make(block=8)
        one = request(length)
        scheduler.submit(one)
        seen = []
        while one.pending > 1:
            batch = scheduler.next()
            seen += [(span.start, span.stop) for span in batch.prefill]
            run(scheduler, batch)
            if one.count:
                break
        assert seen == parts


def test_a_short_question_does_not_wait_for_a_book() -> None:
    scheduler = make(prefill_tokens=8, slots=3)
    book, question = request(400), request(4)
    scheduler.submit(book)
    run(scheduler, scheduler.next())
    scheduler.submit(question)
    spans = {s.request: s.stop - s.start for s in scheduler.next().prefill}
    assert spans == {book: 4, question: 4}


def test_the_queue_has_a_limit_behind_the_free_slots() -> None:
    scheduler = make(slots=2, max_waiting=1)
    scheduler.submit(request(1), request(1), request(1))
    with pytest.raises(QueueFull) as full:
        scheduler.submit(request(1))
    assert full.value.retry_after >= 1
    idle = make(slots=2, max_waiting=0)
    idle.submit(request(1), request(1))
    assert len(idle.next().prefill or idle.next().decode) == 2


def test_requests_are_queued_all_or_none() -> None:
    scheduler = make(slots=1, max_waiting=2)
    with pytest.raises(QueueFull):
        scheduler.submit(*(request(1) for _ in range(4)))
    with pytest.raises(ValueError, match="999"):
        scheduler.submit(request(1), request(5000))
    assert not scheduler.waiting


@pytest.mark.parametrize("length", [0, 1000, 1001])
def test_a_prompt_that_cannot_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="999"):
        make().submit(request(length))


def test_a_request_larger_than_all_pages_is_refused() -> None:
    scheduler = make(pages=5)
    scheduler.submit(request(10, generate=9))
    with pytest.raises(ValueError, match="pages"):
        scheduler.submit(request(10, generate=11))


def test_out_of_pages_the_youngest_starts_again() -> None:
    scheduler = make(pages=6, slots=3)
    old, young = request(10, 8), request(9, 8)
    scheduler.submit(old)
    scheduler.submit(young)
    run(scheduler, scheduler.next())
    while old.finish is None:
        run(scheduler, scheduler.next())
    assert scheduler.preemptions == 1
    assert young.finish is None
    assert young.count > 0  # what it had said is kept, and read again
    while young.finish is None:
        run(scheduler, scheduler.next())
    scheduler.table.check()
    assert scheduler.table.free_pages == 6


def test_a_cancelled_request_gives_its_slot_back() -> None:
    scheduler = make(slots=1)
    first, second = request(4), request(4)
    scheduler.submit(first)
    scheduler.submit(second)
    run(scheduler, scheduler.next())
    first.cancelled = second.cancelled = True
    assert scheduler.cancelled() == [second, first]
    for r in scheduler.cancelled():
        scheduler.finish(r, FinishReason.CANCELLED)
    assert not scheduler.next()
    assert scheduler.table.free_slots == 1
    scheduler.table.check()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_whatever_comes_everything_ends(seed: int) -> None:
    """Random loads, cancels, few slots and pages: each request ends, and the books add up."""
    dice = random.Random(seed)
    pages = dice.choice([0, 12, 20, 60])
    scheduler = make(
        slots=dice.randint(1, 5), pages=pages, context=48,
        prefill_tokens=dice.choice([1, 5, 16, 64]), window=dice.choice([1, 1, 4]),
    )  # fmt: skip
    made: list[Request] = []
    for _ in range(4000):
        if len(made) < 15 and dice.random() < 0.4:
            r = request(dice.randint(1, 30), dice.randint(1, 12))
            scheduler.submit(r)
            made.append(r)
        if dice.random() < 0.05 and made:
            dice.choice(made).cancelled = True
        for r in scheduler.cancelled():
            scheduler.finish(r, FinishReason.CANCELLED)
        batch = scheduler.next()
        work = [s.request for s in batch.prefill] + list(batch.decode)
        assert len(set(work)) == len(work)
        assert sum(s.stop - s.start for s in batch.prefill) <= scheduler.limits.prefill_tokens
        assert not any(r.cancelled for r in work)
        if scheduler.running:
            assert scheduler.running[0] in work, "the oldest always gets on"
        for r in work:
            assert r.slot is not None
            held = len(scheduler.table.pages_of(r.slot)) * 4
            assert not pages or held >= max(r.computed + 1, 1)
        run(scheduler, batch)
        scheduler.table.check()
        if len(made) == 15 and not scheduler.running and not scheduler.waiting:
            break
    assert len(made) == 15
    assert all(r.finish for r in made)


def test_lost_and_doubled_pages_are_noticed() -> None:
    table = SlotTable(2, 4, 4)
    slot = table.acquire()
    assert slot is not None
    table.grow(slot, 8)
    table.check()
    lease = table.lease(slot, 6)
    with pytest.raises(IntegrityError, match="references"):
        table.check()
    table.check([lease])
    table._free_pages.pop()
    with pytest.raises(IntegrityError, match="lost"):
        table.check([lease])
