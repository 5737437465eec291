"""From the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from difyops.engine.request import Output

#: The outputs of one answer, each with the index of its choice.
Outputs = asyncio.Queue[tuple[int, Output]]


#: Seconds between two hand-overs, for each answer in the first: about what it costs to send them,
#: so that Python's lock is the engine's for half of the time at least.
_PAUSE_EACH = 0.0001
_PAUSE_MOST = 0.02


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
                self._loop.call_soon_threadsafe(self._hand_over)

        return put

    def _hand_over(self) -> None:
        # First the flag and then the work: what comes in between causes one wake-up too many, and
        # never one too few.
        self._woken = False
        answers = set()
        while self._arrived:
            outputs, index, output = self._arrived.popleft()
            outputs.put_nowait((index, output))
            answers.add(id(outputs))
        if answers:
            self._woken = True
            pause = min(_PAUSE_EACH * len(answers), _PAUSE_MOST)
            self._loop.call_later(pause, self._hand_over)


def merged(arrived: Iterable[tuple[int, Output]]) -> list[tuple[int, Output]]:
    """The outputs of each index as one, in the order of their first: fewer events to write."""
    whole: dict[int, Output] = {}
    for index, new in arrived:
        if (old := whole.get(index)) is None:
            whole[index] = new
        else:
            whole[index] = Output(
                old.text + new.text,
                old.tokens + new.tokens,
                old.logprobs + new.logprobs,
                new.finish,
                new.error,
            )
    return list(whole.items())
