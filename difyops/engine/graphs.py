"""Steps and short prompts of a GPU as CUDA graphs: the host sends a few numbers, and need not wait.

There is a graph for each size of batch, and one for each size of what is read of prompts. All that
they read and write is found by slot, so requests come and go without another capture; the null slot
pads a batch up to the next size. The token that is chosen for a slot stays on the GPU, too: the
next step can be launched before anybody has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from difyops.engine.models.decoder import Decoder
from difyops.engine.speculate import OnDevice
from difyops.engine.state import StatePool
from difyops.engine.transfer import Coming, sent

#: What is chosen where scores are no numbers.
BROKEN = -1
#: In place of a token: the one that was chosen for the slot last.
CHOSEN = -1
#: Prompt tokens that a graph reads, and sequences that it reads them of.
PROMPTS = (16, 32, 64, 128, 256, 512)
AT_ONCE = 8

Work = Callable[[], object]


@dataclass(frozen=True)
class Stepped:
    """One pass over B sequences, N tokens in all. The tensors are overwritten by the next one.

    tokens: [N]; slots: [B]; bounds: [B + 1], the cu_seqlens; hidden: [N, width]; logits: [R, V] of
    the rows that a token is chosen for; chosen: [R], the largest logit's token of each, or BROKEN;
    None: nobody has looked.
    """

    tokens: Tensor
    slots: Tensor
    bounds: Tensor
    hidden: Tensor
    logits: Tensor
    chosen: Tensor | None

    @property
    def best(self) -> list[int] | None:
        """`chosen`, waited for."""
        return None if self.chosen is None else list(Coming(self.chosen).list())


class Steps(Protocol):
    """What runs a model's plain passes."""

    #: Whether CHOSEN is understood, and no pass waits for the one before it.
    ahead: bool
    #: Whether what drafts reads along in `run`.
    drafted: bool

    def run(self, tokens: Sequence[int], slots: Sequence[int]) -> Stepped:
        """One token each: the states of `slots` move on, and their lengths."""
        ...

    def read(
        self, tokens: Sequence[int], bounds: Sequence[int], slots: Sequence[int],
        ends: Sequence[int],
    ) -> Stepped:  # fmt: skip
        """Packed tokens of prompts; sequences number `ends` are read to their end: their last
        tokens are the rows of the logits."""
        ...

    def choose(self, slots: Tensor, tokens: Tensor) -> None:
        """Other tokens than the best were chosen for some slots: [R] each."""
        ...


class Eager:
    """Kernel by kernel, on any device."""

    ahead = False
    drafted = False

    def __init__(self, model: Decoder, pool: StatePool) -> None:
        self._model = model
        self._pool = pool
        self._device = model.embed.weight.device

    def run(self, tokens: Sequence[int], slots: Sequence[int]) -> Stepped:
        now, where = sent([list(tokens), list(slots)], self._device)
        hidden = self._model.step(now, self._pool, where)
        bounds = torch.arange(len(slots) + 1, device=self._device)
        return Stepped(now, where, bounds, hidden, self._model.logits(hidden), None)

    def read(
        self, tokens: Sequence[int], bounds: Sequence[int], slots: Sequence[int],
        ends: Sequence[int],
    ) -> Stepped:  # fmt: skip
        now, cu, where = (sent(values, self._device) for values in (tokens, bounds, slots))
        hidden = self._model.prefill(now, self._pool, where, cu)
        last = hidden[sent([bounds[i + 1] - 1 for i in ends], self._device)]
        return Stepped(now, where, cu, hidden, self._model.logits(last), None)

    def choose(self, slots: Tensor, tokens: Tensor) -> None:
        raise NotImplementedError


def sizes(most: int) -> list[int]:
    """Batches that graphs are made for: powers of two, and the largest batch."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def possible(model: Decoder) -> bool:
    """Whether the model's step can be captured at all."""
    on_gpu = model.embed.weight.device.type == "cuda"
    return on_gpu and all(block.mixer.graphable for block in model.blocks)


def best(logits: Tensor) -> Tensor:
    """The largest logit's token of each row, or BROKEN: [R, V] -> [R]."""
    found = logits.argmax(-1)
    # argmax finds the first nan, where there is one.
    broken = logits.gather(-1, found[:, None])[:, 0].isnan()
    return found.masked_fill(broken, BROKEN)


def score(model: Decoder, hidden: Tensor, logits: Tensor, chosen: Tensor) -> None:
    """Logits [R, V] and their `best` [R] of hidden states [R, width], put where they are to lie."""
    torch.mm(hidden, model.head.weight.T, out=logits)
    if not model.fused:
        chosen.copy_(best(logits))
        return
    from difyops.engine.kernels import choice

    choice.best(logits, BROKEN, chosen)


class Recorder:
    """Makes graphs, which share their memory: no two run at the same time."""

    def __init__(self) -> None:
        self._memory: Any = None
        #: One for all: libraries keep room to work in for each stream.
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Work) -> Work:
        """What does `work` again, which is done once or twice here."""
        aside = self._aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()  # compiles, and lets libraries allocate what they keep
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            work()
        self._memory = graph.pool()
        return graph.replay


class Captured:
    """By graphs, which are made here: of steps for each of `sizes`, and of prompts, where the model
    allows, for each of PROMPTS. Longer prompts are read kernel by kernel."""

    ahead = True

    def __init__(
        self,
        model: Decoder,
        pool: StatePool,
        record: Callable[[Work], Work] | None = None,
        drafter: OnDevice | None = None,
    ) -> None:
        """`record` makes a graph of some work, as a Recorder does. `drafter` reads along."""
        self.drafted = drafter is not None
        self._drafter = drafter
        self._model = model
        self._pool = pool
        self._eager = Eager(model, pool)
        record = record or Recorder()
        most, shape = pool.table.slots, model.shape
        weight = self._weight = model.head.weight
        self._inputs = torch.zeros(2, most, dtype=torch.int64, device=weight.device)
        self._tokens, self._chosen = torch.zeros_like(self._inputs)
        self._bounds = torch.arange(most + 1, device=weight.device)
        self._hidden = weight.new_zeros(most, shape.width)
        self._logits = weight.new_zeros(most, shape.vocabulary)
        #: What was chosen last, by slot.
        self._last = self._inputs.new_zeros(most + 1)
        # Only the null slot is stepped, and reads.
        self._steps = {size: record(partial(self._step, size)) for size in reversed(sizes(most))}
        self._reads: dict[int, Work] = {}
        if all(block.mixer.graphable_prefill for block in model.blocks):
            self._at_once = min(AT_ONCE, most)
            self._prompts = self._inputs.new_zeros(2 * self._at_once + 1 + PROMPTS[-1])
            self._read_hidden = weight.new_zeros(PROMPTS[-1], shape.width)
            self._reads = {size: record(partial(self._read, size)) for size in reversed(PROMPTS)}

    def run(self, tokens: Sequence[int], slots: Sequence[int]) -> Stepped:
        count = len(slots)
        size = min(size for size in self._steps if size >= count)
        pad = [0] * (size - count)
        self._inputs[:, :size] = sent([[*tokens, *pad], [*slots, *pad]], self._weight.device)
        self._steps[size]()
        return Stepped(
            self._tokens[:count],
            self._inputs[1, :count],
            self._bounds[: count + 1],
            self._hidden[:count],
            self._logits[:count],
            self._chosen[:count],
        )

    def read(
        self, tokens: Sequence[int], bounds: Sequence[int], slots: Sequence[int],
        ends: Sequence[int],
    ) -> Stepped:  # fmt: skip
        count, total = len(slots), len(tokens)
        size = min((size for size in self._reads if size >= total), default=None)
        if size is None or count > self._at_once:
            return self._read_long(tokens, bounds, slots, ends)
        pad, width = [0] * (self._at_once - count), self._at_once
        values = [*slots, *pad, *bounds, *[total] * len(pad), *tokens, *[0] * (size - total)]
        self._prompts[: len(values)] = sent(values, self._weight.device)
        self._reads[size]()
        logits, chosen = self._logits[:count], self._chosen[:count]
        if len(ends) < count:
            rows = sent(ends, self._weight.device)
            logits, chosen = logits[rows], chosen[rows]
        return Stepped(
            self._prompts[2 * width + 1 :][:total],
            self._prompts[:count],
            self._prompts[width : width + count + 1],
            self._read_hidden[:total],
            logits,
            chosen,
        )

    def choose(self, slots: Tensor, tokens: Tensor) -> None:
        # A row that holds no numbers is stepped once more, before the host knows.
        self._last[slots] = tokens.clamp_min(0)

    def _read_long(
        self, tokens: Sequence[int], bounds: Sequence[int], slots: Sequence[int],
        ends: Sequence[int],
    ) -> Stepped:  # fmt: skip
        read = self._eager.read(tokens, bounds, slots, ends)
        chosen = best(read.logits)
        self.choose(sent([slots[i] for i in ends], self._weight.device), chosen)
        return Stepped(read.tokens, read.slots, read.bounds, read.hidden, read.logits, chosen)

    def _step(self, size: int) -> None:
        tokens, slots = self._inputs[:, :size]
        tokens = torch.where(tokens == CHOSEN, self._last[slots], tokens)
        self._tokens[:size] = tokens
        hidden = self._model.step(tokens, self._pool, slots)
        self._hidden[:size] = hidden
        self._choose_best(hidden, slots)
        if self._drafter is not None:
            there = (slots > 0).to(slots.dtype)
            self._drafter.follow(tokens[:, None], hidden[:, None], there, slots, self._pool)

    def _read(self, size: int) -> None:
        width = self._at_once
        slots, bounds, tokens = torch.split(self._prompts, [width, width + 1, PROMPTS[-1]])
        tokens = tokens[:size]
        hidden = self._model.prefill(tokens, self._pool, slots, bounds)
        self._read_hidden[:size] = hidden
        # Of a prompt that goes on, what is chosen is never looked at.
        self._choose_best(hidden[(bounds[1:] - 1).clamp_min(0)], slots)

    def _choose_best(self, hidden: Tensor, slots: Tensor) -> None:
        logits, chosen = self._logits[: len(slots)], self._chosen[: len(slots)]
        score(self._model, hidden, logits, chosen)
        self.choose(slots, chosen)
