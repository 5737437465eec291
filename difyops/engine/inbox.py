"""From the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from difyops.engine.request import Output

#: What has come for one answer since the last time, each output with the index of its choice.
Outputs = asyncio.Queue[list[tuple[int, Output]]]


#: Seconds between two hand-overs, for each answer in the first: some times what it costs to send
#: them, so that Python's lock is the engine's for most of the time.
_PAUSE_EACH = 0.0003
_PAUSE_MOST = 0.05


class Inbox:
    """One wake-up of the loop carries all that the engine has handed out since the last one, and
    wakes each answer once: with hundreds of streams, a wake-up for each token would cost more than
    the token.

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
        answers: dict[Outputs, list[tuple[int, Output]]] = {}
        while self._arrived:
            outputs, index, output = self._arrived.popleft()
            answers.setdefault(outputs, []).append((index, output))
        for outputs, arrived in answers.items():
            outputs.put_nowait(arrived)
        if answers:
            self._woken = True
            pause = min(_PAUSE_EACH * len(answers), _PAUSE_MOST)
            self._loop.call_later(pause, self._hand_over)


def merged(arrived: Iterable[tuple[int, Output]]) -> list[tuple[int, Output]]:
    """The outputs of each index as one, in the order of their first: fewer events to write."""
    by_index: dict[int, list[Output]] = {}
    for index, output in arrived:
        by_index.setdefault(index, []).append(output)
    return [(index, _joined(outputs)) for index, outputs in by_index.items()]


def _joined(outputs: list[Output]) -> Output:
    if len(outputs) == 1:
        return outputs[0]
    return Output(
        "".join(output.text for output in outputs),
        tuple(token for output in outputs for token in output.tokens),
        tuple(logprob for output in outputs for logprob in output.logprobs),
        outputs[-1].finish,
        outputs[-1].error,
    )
