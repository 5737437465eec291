"""How many tokens are guessed in each pass, and what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from difyops.engine.adapt import Adaptive
from difyops.engine.request import Request
from difyops.engine.stats import Counters
from difyops.engine.windows import Windows

log = logging.getLogger("difyops.engine")


class Guessing:
    """A fixed number of guesses, or at most `most` as long as they pay."""

    def __init__(self, windows: Windows, most: int, fixed: int | None) -> None:
        self.windows = windows
        self.adaptive = Adaptive(most) if most and fixed is None else None
        self.now = fixed or 0  # for good, where nothing adapts
        self._alone = False
        self._before = 0
        #: Those that may ever be made.
        self.numbers = range(1, most + 1) if self.adaptive else [self.now] * (self.now > 0)

    def choose(self, requests: Sequence[Request]) -> int:
        """How many tokens to guess now; the log hears what was settled."""
        k = self._chosen(requests) if any(request.speculate for request in requests) else 0
        # A GPU may still be busy with the pass before: one of another kind is measured by itself.
        self._alone, self._before = self.adaptive is not None and k != self._before, k
        if self._alone:
            self.windows.wait()
        return k

    def _chosen(self, requests: Sequence[Request]) -> int:
        batch, most = len(requests), self.windows.most(requests)
        if self.adaptive is None:
            return min(self.now, most)
        if (k := self.adaptive.news(batch, time.monotonic())) is not None:
            which = f"{k} token{'' if k == 1 else 's'}" if k else "off, it does not pay"
            log.info("speculation by %s with %d running: %s", self.windows.name, batch, which)
        self.now = self.adaptive.choose(batch, most)
        return self.now

    @contextmanager
    def measured(self, batch: int, k: int) -> Iterator[None]:
        """Around a pass with `k` guesses, the number that was chosen last."""
        began = time.monotonic()
        yield
        if self._alone:
            self.windows.wait()
        self.took(batch, k, time.monotonic() - began)

    def took(self, batch: int, k: int, seconds: float) -> None:
        if self.adaptive is not None:
            self.adaptive.took(batch, k, seconds)

    def learn(self, counts: Counters, guessed: Sequence[int], hits: int, judged: int) -> None:
        """Count guesses that came true among the first `judged` ones."""
        tried = min(judged, sum(guess >= 0 for guess in guessed))
        for place in range(tried):
            counts.drafted[place] = counts.drafted.get(place, 0) + 1
            counts.accepted[place] = counts.accepted.get(place, 0) + (place < hits)
        if self.adaptive is not None:
            self.adaptive.came_true(hits, min(judged, len(guessed)))
