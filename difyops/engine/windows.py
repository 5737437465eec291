"""A pass with guesses as CUDA graphs: draft, verify, settle. The host sends a few numbers for each
sequence, waits for as many, and looks at them while the GPU settles and drafts on.

There are three graphs for each size of batch and number of guesses (see graphs.py for what holds of
every graph). Where all rows are greedy, the GPU finds by itself how many guesses came true; where
one is not, the host says so between verify and settle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from difyops.engine import graphs, sample
from difyops.engine.mixers import Mixer, Softmax
from difyops.engine.mixers.base import RecurrentMixer
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import Request
from difyops.engine.speculate import Drafter, OnDevice, Read, packed, window
from difyops.engine.state import StatePool

#: Tokens of one pass: with more the products are bound by arithmetic, and no guess pays.
MOST_TOKENS = 512
#: Stop tokens of a request that the GPU looks for. A sequence that ends by another one has read on
#: behind its end, and what it has read is not kept for later prompts.
STOPS = 4
#: Rows of what is sent: each sequence's last token, slot and room, then stop tokens, then guesses.
_LAST, _SLOT, _ROOM, _STOP, _GUESS = 0, 1, 2, 3, 3 + STOPS


@dataclass(frozen=True)
class Seen:
    """What a pass over B sequences showed. guesses [B][k], as they were judged; best [B][1 + k]:
    the model's own token at each place, or graphs.BROKEN; None: nobody has looked. accepted [B]:
    places that are in the state now; None: the host is to say so, by logits [B, 1 + k, V]."""

    guesses: list[list[int]]
    best: list[list[int]] | None
    logits: Tensor | None
    accepted: list[int] | None


class Windows(Protocol):
    """What runs passes with guesses."""

    #: Of what drafts.
    name: str

    def most(self, requests: Sequence[Request]) -> int:
        """Guesses that can be made for all of them."""
        ...

    def run(self, requests: Sequence[Request], k: int, context: int) -> Seen:
        """A token for each, and of `k` guesses behind it those that come true. A sequence holds at
        most `context` tokens."""
        ...

    def settle(self, accepted: Sequence[int]) -> Sequence[int]:
        """What `run` left to the host: the first places of each sequence go into the state."""
        ...

    def wait(self) -> None:
        """Until the device has done all of it."""
        ...


class Eager:
    """Kernel by kernel, on any device; the host judges."""

    def __init__(self, model: Decoder, pool: StatePool, drafter: Drafter) -> None:
        self.name = drafter.name
        self._model, self._pool, self._drafter = model, pool, drafter
        self._run: tuple[Tensor, Tensor, Tensor] | None = None

    def most(self, requests: Sequence[Request]) -> int:
        return self._drafter.most

    def run(self, requests: Sequence[Request], k: int, context: int) -> Seen:
        device = self._model.embed.weight.device
        slots = torch.tensor([request.slot or 0 for request in requests], device=device)
        drafts = self._drafter.draft(requests, slots, self._pool, k)
        tokens = window(requests, drafts)
        hidden = self._model.verify(tokens, self._pool, slots)
        self._run = tokens, hidden, slots
        return Seen(drafts.tolist(), None, self._model.logits(hidden), None)

    def settle(self, accepted: Sequence[int]) -> Sequence[int]:
        if self._run is None:
            raise ValueError("there was no pass")
        tokens, hidden, slots = self._run
        counts = torch.tensor(accepted, device=slots.device)
        self._model.commit(self._pool, slots, counts)
        bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        read = Read(packed(tokens, counts), packed(hidden, counts), slots, bounds)
        self._drafter.read(read, self._pool)
        return accepted

    def wait(self) -> None:
        _mark(self._model.embed.weight.device)()


def reader(drafter: Drafter | None) -> OnDevice | None:
    """What reads along in the graphs of the plain step."""
    able = isinstance(drafter, OnDevice) and all(_settles(b.mixer) for b in drafter.blocks())
    return drafter if able and isinstance(drafter, OnDevice) else None


def possible(model: Decoder, drafter: Drafter) -> bool:
    """Whether passes with the guesses of this drafter can be captured."""
    blocks = [*model.blocks]
    if isinstance(drafter, OnDevice):
        blocks += drafter.blocks()
    elif drafter.tracks():  # it reads packed tokens, whose number the host would have to know
        return False
    return graphs.possible(model) and all(_settles(block.mixer) for block in blocks)


def _settles(mixer: Mixer) -> bool:
    """Whether neither verify nor commit waits for the GPU."""
    in_place = isinstance(mixer, Softmax) or (isinstance(mixer, RecurrentMixer) and mixer.in_place)
    return mixer.graphable and in_place


def judge(
    guesses: Tensor, best: Tensor, room: Tensor, stops: Tensor, answers: Tensor, last: Tensor,
    fused: bool = False,
) -> None:  # fmt: skip
    """Find how many places of each row count: those up to the first wrong guess, behind a stop
    token none, and at most `room`.

    guesses [B, k], best [B, 1 + k], room [B], stops [B, S]. A row of answers ([B, 2 + 2 k]) becomes
    the count, the best tokens and the guesses, and `last` ([B]) the best token of the last place
    that counts.
    """
    if fused:
        from difyops.engine.kernels import draft as kernel

        kernel.judge(guesses, best, room, stops, answers, last)
        return
    before = best[:, :-1]
    going = (guesses == before) & (guesses >= 0)
    going &= ~(before[:, :, None] == stops[:, None]).any(-1)
    count = torch.minimum(1 + going.cumprod(1).sum(1), room)[:, None]
    answers.copy_(torch.cat((count, best, guesses), dim=1))
    last.copy_(best.gather(1, (count - 1).clamp_min(0))[:, 0])


class _Buffers:
    """What passes of any size read and write, for `rows` tokens at most."""

    def __init__(self, model: Decoder, pool: StatePool, most: int, rows: int) -> None:
        weight, slots = model.head.weight, pool.table.slots
        pinned = weight.is_cuda
        self.sent = torch.zeros(_GUESS + most, slots, dtype=torch.int64, pin_memory=pinned)
        self.inputs = torch.zeros_like(self.sent, device=weight.device)
        #: Of each sequence, a column: places accepted, the best token of each place, the guesses.
        #: Kernels read the first row as it lies.
        self.answers = self.inputs.new_zeros(2 + 2 * most, slots)
        self.heard = torch.zeros(self.answers.shape, dtype=torch.int64, pin_memory=pinned)
        self.window = self.inputs.new_zeros(rows)
        self.best = self.inputs.new_zeros(rows)
        self.logits = weight.new_zeros(rows, model.shape.vocabulary)

    def ask(self) -> None:
        self.inputs.copy_(self.sent, non_blocking=True)


class _Pass:
    """`size` sequences with `k` guesses each: what is done to the buffers."""

    def __init__(
        self, model: Decoder, pool: StatePool, drafter: Drafter, buffers: _Buffers, size: int,
        k: int, record: Callable[[graphs.Work], graphs.Work],
    ) -> None:  # fmt: skip
        self.size, self.k = size, k
        self._model, self._pool = model, pool
        rows = size * (1 + k)
        self._last, self._slots, self._room = buffers.inputs[:_STOP, :size]
        self._stops = buffers.inputs[_STOP:_GUESS, :size].T
        self._window = buffers.window[:rows].view(size, 1 + k)
        self._on_device = drafter if isinstance(drafter, OnDevice) else None
        self._guesses = self._window[:, 1:]
        if self._on_device is None:
            self._guesses = buffers.inputs[_GUESS : _GUESS + k, :size].T
        self.logits = buffers.logits[:rows].view(size, 1 + k, -1)
        self._best = buffers.best[:rows].view(size, 1 + k)
        self._answers = buffers.answers[: 2 + 2 * k, :size].T
        self.accepted = buffers.answers[0, :size]
        self.draft, self.verify, self.settle = map(
            record, (self._draft, self._verify, self._settle)
        )

    def _draft(self) -> None:
        self._window[:, 0] = self._last
        if self._on_device is not None:
            self._on_device.guess(self._window, self._slots, self._pool)
        else:
            self._window[:, 1:] = self._guesses.clamp_min(0)

    def _verify(self) -> None:
        self._hidden = self._model.verify(self._window, self._pool, self._slots)
        graphs.score(
            self._model, self._hidden.flatten(0, 1), self.logits.flatten(0, 1), self._best.flatten()
        )
        guesses = self._guesses
        if self._on_device is not None:
            guesses = self._on_device.judged(guesses, self._best[:, :-1])
        judge(
            guesses, self._best, self._room, self._stops, self._answers, self._last,
            self._model.fused,
        )  # fmt: skip

    def _settle(self) -> None:
        self._model.commit(self._pool, self._slots, self.accepted)
        if self._on_device is not None:
            self._on_device.follow(
                self._window, self._hidden, self.accepted, self._slots, self._pool
            )


class Captured:
    """By graphs, with any number of `guesses` that is named, which are made here."""

    def __init__(
        self,
        model: Decoder,
        pool: StatePool,
        drafter: Drafter,
        guesses: Sequence[int],
        record: Callable[[graphs.Work], graphs.Work] | None = None,
    ) -> None:
        """`record` makes a graph of some work, as a graphs.Recorder does."""
        self.name = drafter.name
        self._drafter, self._pool = drafter, pool
        record = record or graphs.Recorder()
        forms = [
            (size, k)
            for size in reversed(graphs.sizes(pool.table.slots))
            for k in guesses
            if size * (1 + k) <= MOST_TOKENS
        ]
        rows = max((size * (1 + k) for size, k in forms), default=0)
        self._buffers = _Buffers(model, pool, max(guesses, default=0), rows)
        self._passes = {
            form: _Pass(model, pool, drafter, self._buffers, *form, record) for form in forms
        }
        self._current: _Pass | None = None
        #: What the draft that was made ahead goes on from: slots, and the tokens of each sequence.
        self._ahead: tuple[_Pass, list[tuple[int, int | None, int]]] | None = None

    def most(self, requests: Sequence[Request]) -> int:
        depth = self._drafter.depth if isinstance(self._drafter, OnDevice) else 0
        if any(request.computed < depth for request in requests):
            return 0
        return max((k for size, k in self._passes if size >= len(requests)), default=0)

    def run(self, requests: Sequence[Request], k: int, context: int) -> Seen:
        count, buffers = len(requests), self._buffers
        size = min(size for size, j in self._passes if j == k and size >= count)
        this = self._current = self._passes[size, k]
        drafted = self._ahead == (this, _where(requests, [0] * count))
        self._ahead = None
        self._send(requests, this, context)
        if not drafted:
            this.draft()
        this.verify()
        buffers.heard.copy_(buffers.answers, non_blocking=True)
        ready = _mark(buffers.inputs.device)
        alone = all(sample.is_greedy(request) for request in requests)
        if alone:
            this.settle()
            if isinstance(self._drafter, OnDevice):
                this.draft()
        ready()
        heard = buffers.heard[:, :count].T.tolist()
        taken = [row[0] for row in heard]
        if alone and isinstance(self._drafter, OnDevice):
            self._ahead = this, _where(requests, taken)
        return Seen(
            [row[2 + k : 2 + 2 * k] for row in heard],
            [row[1 : 2 + k] for row in heard],
            None if alone else this.logits[:count],
            taken if alone else None,
        )

    def settle(self, accepted: Sequence[int]) -> Sequence[int]:
        if self._current is None:
            raise ValueError("there was no pass")
        self._current.accepted[: len(accepted)] = torch.tensor(accepted)
        self._current.settle()
        return accepted

    def wait(self) -> None:
        _mark(self._buffers.inputs.device)()

    def _send(self, requests: Sequence[Request], this: _Pass, context: int) -> None:
        rows = [_row(request, context) for request in requests]
        if not isinstance(self._drafter, OnDevice):
            slots = torch.tensor([request.slot or 0 for request in requests])
            drafts = self._drafter.draft(requests, slots, self._pool, this.k).tolist()
            rows = [[*row, *draft] for row, draft in zip(rows, drafts, strict=True)]
        width = len(rows[0])
        padded = [*rows, *[[0] * width] * (this.size - len(rows))]
        self._buffers.sent[:width, : this.size] = torch.tensor(padded).T
        self._buffers.ask()


def _row(request: Request, context: int) -> list[int]:
    """What is sent of a request."""
    params, known = request.sampling, len(request.tokens)
    room = min(params.max_tokens - request.count, context - known)
    stops = sorted(params.stop_ids)[:STOPS]
    return [
        request.tokens[-1], request.slot or 0, room if request.speculate else 1,
        *stops, *[-1] * (STOPS - len(stops)),
    ]  # fmt: skip


def _where(requests: Sequence[Request], more: Sequence[int]) -> list[tuple[int, int | None, int]]:
    """Where each request will be with `more` tokens."""
    return [
        (request.number, request.slot, len(request.tokens) + n)
        for request, n in zip(requests, more, strict=True)
    ]


def _mark(device: torch.device) -> Callable[[], object]:
    """What waits until the device has done all that it was given so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize
