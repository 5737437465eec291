"""From the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from difyops.engine.request import Output

#: The outputs of one answer, each with the index of its choice.
Outputs = asyncio.Queue[tuple[int, Output]]


class Inbox:
    """One wake-up of the loop carries all that the engine has handed out since the last one: with
    hundreds of streams, a wake-up for each would cost more than the tokens.

    It is not bounded, and so the engine never waits for a slow client; what an answer can pile up
    is bounded by its max_tokens.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[Outputs, int, Output]] = deque()
        self._woken = False

    def deliver(self, outputs: Outputs, index: int) -> Callable[[Output], None]:
        """What the engine calls, on its own thread."""

        def put(output: Output) -> None:
            self._arrived.append((outputs, index, output))
            if not self._woken:
                self._woken = True
                self._loop.call_soon_threadsafe(self._sort)

        return put

    def _sort(self) -> None:
        # First the flag and then the work: what comes in between causes one wake-up too many, and
        # never one too few.
        self._woken = False
        while self._arrived:
            outputs, index, output = self._arrived.popleft()
            outputs.put_nowait((index, output))
