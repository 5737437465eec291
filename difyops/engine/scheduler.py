"""Who runs in the next step: admission by free slot, prompts in chunks, cancelling. No torch.

A request is its tokens and how many of them are computed. One that has a single pending token is
decoded; one with more is prefilled, whether it is new, half read or was preempted.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from difyops.engine.request import FinishReason, QueueFull, Request
from difyops.engine.slots import SlotTable


@dataclass(frozen=True)
class Limits:
    """`context`: tokens of one sequence. `prefill_tokens`: prompt tokens in one step, over all
    requests; it bounds how long a decoding stream waits for others' prompts. `window`: the most
    tokens a decode step adds to a sequence."""

    context: int
    prefill_tokens: int = 512
    max_waiting: int = 256
    window: int = 1
    #: A prompt's last part begins at a multiple of it, so that what is kept before it can be
    #: resumed by the same prompt and by others that begin alike. 0: nothing is kept.
    block: int = 0


@dataclass(frozen=True)
class Span:
    """request.tokens[start:stop] are to be read."""

    request: Request
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether the next token is sampled after it."""
        return self.stop == len(self.request.tokens)


@dataclass(frozen=True)
class Batch:
    """One step's work; empty when there is none."""

    prefill: tuple[Span, ...] = ()
    decode: tuple[Request, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)

    @property
    def requests(self) -> tuple[Request, ...]:
        return (*(span.request for span in self.prefill), *self.decode)

    def running(self) -> Batch:
        """Without those that have ended since it was chosen."""
        return Batch(
            tuple(span for span in self.prefill if span.request.finish is None),
            tuple(request for request in self.decode if request.finish is None),
        )


class Scheduler:
    """Oldest first in everything: an older request may take the pages of a younger one, so the
    oldest always gets on, and every other becomes the oldest in time."""

    def __init__(
        self,
        table: SlotTable,
        limits: Limits,
        kept: Callable[[Request], tuple[int, int]] = lambda request: (0, 0),
        resume: Callable[[Request], int] = lambda request: 0,
        reclaim: Callable[[], bool] = lambda: False,
    ) -> None:
        """`kept` says how many tokens a kept state would give a new request, and how many pages
        of it would be shared. `resume` may put that state into its slot, and says how many tokens
        that gave. `reclaim` gives back pages that nobody runs on, those that `kept` named last;
        False when there are none."""
        self.table = table
        self.limits = limits
        self._kept = kept
        self._resume = resume
        self._reclaim = reclaim
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # by age
        self.preemptions = 0

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none. Raises QueueFull, or ValueError for one that can never be
        run. Those that a free slot waits for do not count as waiting."""
        for request in requests:
            self._check(request)
        waiting = len(self.waiting) + len(requests) - self.table.free_slots
        if waiting > self.limits.max_waiting:
            raise QueueFull(len(self.waiting), retry_after=1 + len(self.waiting) // 32)
        self.waiting.extend(requests)

    def _check(self, request: Request) -> None:
        if not 0 < len(request.prompt) < self.limits.context:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens; 1 to {self.limits.context - 1} fit"
            )
        most = min(len(request.prompt) + request.sampling.max_tokens, self.limits.context)
        if self.table.needed(most + self.limits.window) > self.table.pages:
            raise ValueError(f"{most} tokens are more than all {self.table.pages} pages hold")

    def next(self) -> Batch:
        """The next step's work. Cancelled requests have left before it is chosen."""
        self._admit()
        decode, reading = [], []
        for request in tuple(self.running):
            if request.slot is None:  # preempted for an older one, just now
                continue
            if request.pending > 1:
                reading.append(request)
            elif request.pending < 1 and self.full(request, 1):
                continue  # its last token is on its way
            elif self._grow(request, request.computed + self.limits.window):
                decode.append(request)
        spans = []
        for request, count in _shares(reading, self.limits.prefill_tokens):
            stop = self._stop(request, request.computed + count)
            if request.slot is not None and self._grow(request, stop):
                spans.append(Span(request, request.computed, stop))
        # An older prompt's growth may have preempted what was chosen before it.
        return Batch(
            tuple(span for span in spans if span.request.slot is not None),
            tuple(request for request in decode if request.slot is not None),
        )

    def _stop(self, request: Request, stop: int) -> int:
        """Where a part of the prompt ends that could go on to `stop`."""
        if not self.limits.block or stop < len(request.tokens):
            return stop
        boundary = (stop - 1) // self.limits.block * self.limits.block
        return boundary if boundary > request.computed else stop

    def full(self, request: Request, more: int = 0) -> bool:
        """Whether it may not grow on, with `more` tokens than are known."""
        return (
            request.count + more >= request.sampling.max_tokens
            or len(request.tokens) + more >= self.limits.context
        )

    def finish(self, request: Request, reason: FinishReason) -> None:
        """The request has ended; its slot is free at once."""
        request.finish = reason
        if request.slot is not None:
            self.table.release(request.slot)
            request.slot = None
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def cancelled(self) -> list[Request]:
        """Those whose client has left, and who still wait or run."""
        return [r for r in (*self.waiting, *self.running) if r.cancelled]

    def everything(self) -> Iterable[Request]:
        return (*self.running, *self.waiting)

    def _admit(self) -> None:
        while self.waiting and self.table.free_slots and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            request.slot = self.table.acquire()
            request.computed = self._resume(request)
            bisect.insort(self.running, request, key=lambda r: r.number)

    def _grow(self, request: Request, tokens: int) -> bool:
        """Room for `tokens` tokens, if need be at the cost of the youngest."""
        if request.slot is None:
            return False
        while not self.table.grow(request.slot, tokens):
            if self._reclaim():
                continue
            youngest = self.running[-1]
            if youngest is request:
                return False
            self._preempt(youngest)
        return True

    def _fits(self, request: Request) -> bool:
        """Whether what a request reads first has room beside what runs already."""
        while True:
            tokens, shared = self._kept(request)
            first = min(request.pending - tokens, self.limits.prefill_tokens)
            pages = self.table.needed(tokens + first + self.limits.window) - shared
            if pages <= self.table.free_pages:
                return True
            if not self._reclaim():
                return False

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue; what was generated is read again as part of the prompt."""
        if request.slot is not None:
            self.table.release(request.slot)
        request.slot = None
        request.computed = 0
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1


def _shares(reading: list[Request], budget: int) -> list[tuple[Request, int]]:
    """How many tokens of each prompt to read, `budget` in all.

    Half goes to the oldest, so that no long prompt starves; the rest to those with the least left,
    so that a short question does not wait for somebody's book.
    """
    granted = dict.fromkeys(reading, 0)
    by_age = list(reading)
    by_rest = sorted(reading, key=lambda r: r.pending)
    for order, limit in ((by_age, budget - budget // 2), (by_rest, budget)):
        left = limit if order is by_age else budget - sum(granted.values())
        for request in order:
            more = min(request.pending - granted[request], left)
            granted[request] += more
            left -= more
    return [(request, count) for request, count in granted.items() if count]
