"""A pass that was launched, and whose tokens the host has not seen.

At most one pass is on its way when the next is launched, and what it chose is taken in while that
one runs. A device does what it is given in order: whatever is launched later (another sequence in a
slot, a copy of a state) finds all that was launched before it done. So the host may give a slot
away, or keep its state under the tokens it has read, without waiting; `Request.computed` counts
what was launched.

A request that turns out to have ended was stepped once too often: its row of the later pass is
nobody's. Where the host has to look between two tokens (see sample.is_free) nothing is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from difyops.engine import sample
from difyops.engine.graphs import Stepped, Steps
from difyops.engine.request import Request
from difyops.engine.scheduler import Batch
from difyops.engine.transfer import Coming, sent


@dataclass
class Flight:
    batch: Batch
    #: When it was launched, in seconds from any beginning.
    began: float
    _parts: list[tuple[Sequence[Request], Coming]] = field(default_factory=list)

    def add(self, steps: Steps, stepped: Stepped, requests: Sequence[Request]) -> None:
        """The next token of each request, row i of what was stepped."""
        if stepped.chosen is None:
            raise ValueError("what is on its way is chosen by the device")
        chosen, device = stepped.chosen, stepped.chosen.device
        drawn = [i for i, request in enumerate(requests) if not sample.is_greedy(request)]
        if drawn:
            rows = sent(drawn, device)
            tokens = sample.pick(
                sample.part(stepped.logits, drawn),
                [requests[i] for i in drawn],
                # As many tokens are known as are read, or will be.
                [requests[i].computed for i in drawn],
            )
            steps.choose(sent([requests[i].slot or 0 for i in drawn], device), tokens)
            chosen = chosen.index_copy(0, rows, tokens)
        self._parts.append((requests, Coming(chosen)))

    def land(self) -> list[tuple[Request, int]]:
        """What was chosen for each request, waited for."""
        return [
            (request, token)
            for requests, coming in self._parts
            for request, token in zip(requests, coming.list(), strict=True)
        ]
