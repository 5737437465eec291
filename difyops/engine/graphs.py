"""A decoding step of a GPU as CUDA graphs: the host sends two rows of numbers and waits for one.

There is a graph for each size of batch. All it reads and writes is found by slot, so requests come
and go without another capture; the null slot pads a batch up to the next size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from difyops.engine.models.decoder import Decoder
from difyops.engine.speculate import OnDevice
from difyops.engine.state import StatePool

#: What `Stepped.best` says of scores that are no numbers.
BROKEN = -1


@dataclass(frozen=True)
class Stepped:
    """One step of B sequences. The tensors are overwritten by the next step.

    tokens and slots: [B]; hidden: [B, width]; logits: [B, V]; best: the largest logit's token of
    each, or BROKEN; None: nobody has looked.
    """

    tokens: Tensor
    slots: Tensor
    hidden: Tensor
    logits: Tensor
    best: list[int] | None

    @property
    def bounds(self) -> Tensor:
        """cu_seqlens of one token each."""
        return torch.arange(len(self.slots) + 1, device=self.slots.device)


class Steps(Protocol):
    """What runs a model's plain step."""

    #: Whether what drafts has read along.
    drafted: bool

    def run(self, tokens: Sequence[int], slots: Sequence[int]) -> Stepped:
        """One token each: the states of `slots` move on, and their lengths."""
        ...


class Eager:
    """Kernel by kernel, on any device."""

    drafted = False

    def __init__(self, model: Decoder, pool: StatePool) -> None:
        self._model = model
        self._pool = pool

    def run(self, tokens: Sequence[int], slots: Sequence[int]) -> Stepped:
        device = self._model.embed.weight.device
        now, where = torch.tensor([list(tokens), list(slots)], device=device)
        hidden = self._model.step(now, self._pool, where)
        return Stepped(now, where, hidden, self._model.logits(hidden), None)


def sizes(most: int) -> list[int]:
    """Batches that graphs are made for: powers of two, and the largest batch."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def possible(model: Decoder) -> bool:
    """Whether the model's step can be captured at all."""
    on_gpu = model.embed.weight.device.type == "cuda"
    return on_gpu and all(block.mixer.graphable for block in model.blocks)


def best(logits: Tensor, out: Tensor) -> None:
    """The largest logit's token of each row, or BROKEN: [R, V] -> out, R numbers in rows of any
    stride."""
    if in_triton(logits):
        from difyops.engine.kernels import draft as kernel

        kernel.best(logits, out.view(-1, 1) if out.dim() == 1 else out)
        return
    found = logits.argmax(-1)
    # argmax finds the first nan, where there is one.
    broken = logits.gather(-1, found[:, None])[:, 0].isnan()
    out.copy_(found.masked_fill(broken, BROKEN).view(out.shape))


def in_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and find_spec("triton") is not None


class Captured:
    """By graphs, one for each of `sizes`, which are made here."""

    def __init__(self, model: Decoder, pool: StatePool, drafter: OnDevice | None = None) -> None:
        """`drafter` reads along."""
        self._model = model
        self._pool = pool
        self._drafter = drafter
        self.drafted = drafter is not None
        most, shape = pool.table.slots, model.shape
        weight = model.head.weight
        self._sent = torch.zeros(2, most, dtype=torch.int64, pin_memory=True)
        self._inputs = torch.zeros(2, most, dtype=torch.int64, device=weight.device)
        self._hidden = weight.new_zeros(most, shape.width)
        self._logits = weight.new_zeros(most, shape.vocabulary)
        self._best = self._inputs.new_zeros(most)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture(sizes(most))

    def _capture(self, sizes: Sequence[int]) -> None:
        """Only the null slot is stepped."""
        memory = None
        for size in reversed(sizes):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._step(size)  # compiles, and lets libraries allocate what they keep
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._step(size)
            memory = graph.pool()
            self._graphs[size] = graph

    def run(self, tokens: Sequence[int], slots: Sequence[int]) -> Stepped:
        count = len(slots)
        size = next(size for size in sorted(self._graphs) if size >= count)
        self._sent[:, :size] = torch.tensor(
            [[*tokens, *[0] * (size - count)], [*slots, *[0] * (size - count)]]
        )
        self._inputs.copy_(self._sent, non_blocking=True)
        self._graphs[size].replay()
        # The one wait of a step. After it, what was sent may be overwritten.
        best = self._best[:count].tolist()
        return Stepped(
            self._inputs[0, :count],
            self._inputs[1, :count],
            self._hidden[:count],
            self._logits[:count],
            best,
        )

    def _step(self, size: int) -> None:
        tokens, slots = self._inputs[:, :size]
        hidden = self._model.step(tokens, self._pool, slots)
        self._hidden[:size] = hidden
        logits = torch.mm(hidden, self._model.head.weight.T, out=self._logits[:size])
        best(logits, self._best[:size])
        if self._drafter is not None:
            there = (slots > 0).to(slots.dtype)
            self._drafter.follow(tokens[:, None], hidden[:, None], there, slots, self._pool)
