"""The memory of every sequence: recurrent state by slot, softmax keys and values by page.

One tensor per state kind, `[layers, slots + 1, …]`: a request is a slot's index, and slot 0 is a
null slot that pads a batch. What grows with the context lies in a pool of its own, in pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from difyops.engine.slots import Lease, SlotTable
from difyops.engine.transfer import sent

#: Tokens of one page.
PAGE_SIZE = 16


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer's state, without its leading slot or token dimension. `stored`: what it
    lies in, where that is not what it is computed in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0  # what an empty slot holds
    stored: torch.dtype | None = None

    @property
    def kept_in(self) -> torch.dtype:
        return self.stored or self.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.kept_in.itemsize


@dataclass(frozen=True)
class StateSpec:
    """What one layer keeps: `slot` per sequence, `token` per token, `replay` per drafted token.

    `replay` holds a mixer's raw inputs between verify and commit.
    """

    slot: Mapping[str, TensorSpec] = field(default_factory=dict)
    token: Mapping[str, TensorSpec] = field(default_factory=dict)
    replay: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def slot_bytes(self) -> int:
        return sum(spec.bytes for spec in self.slot.values())

    @property
    def token_bytes(self) -> int:
        return sum(spec.bytes for spec in self.token.values())

    @property
    def replay_bytes(self) -> int:
        return sum(spec.bytes for spec in self.replay.values())

    def stored_in(self, dtype: torch.dtype) -> StateSpec:
        """The same with what makes up the bytes, a matrix for each head, in `dtype`. Sums and
        maxima beside it keep theirs: they are few, and what is divided by."""
        slot = {
            name: replace(spec, stored=dtype) if len(spec.shape) > 2 else spec
            for name, spec in self.slot.items()
        }
        return replace(self, slot=slot)


class LayerState:
    """One layer's view of the pool. Mixers read and write it by slot, never by request.

    `lengths` ([slots + 1], int64) is how many tokens each slot's state holds; it is the same for
    all layers and moves when the model has run through all of them.
    """

    def __init__(
        self,
        slot: Mapping[str, Tensor],
        token: Mapping[str, Tensor],
        replay: Mapping[str, Tensor],
        lengths: Tensor,
        table: Tensor,
        page_size: int,
        spec: StateSpec,
    ) -> None:
        self.spec = spec
        self.slot = slot  # name -> [slots + 1, …]
        self.token = token  # name -> [(pages + 1) * page_size, …]
        self.replay = replay  # name -> [slots + 1, window, …]
        self.lengths = lengths
        self.table = table  # [slots + 1, pages of one sequence], page numbers
        self.page_size = page_size

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """A copy of the state of `slots` ([B]), each [B, …], in what it is computed in."""
        return {
            name: tensor.index_select(0, slots).to(self.spec.slot[name].dtype)
            for name, tensor in self.slot.items()
        }

    def write(self, slots: Tensor, carry: Mapping[str, Tensor]) -> None:
        """The state of `slots` ([B]) becomes `carry`."""
        for name, tensor in self.slot.items():
            tensor.index_copy_(0, slots, carry[name].to(tensor.dtype))

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where tokens lie in `token`: `slots` and `positions` (same shape) -> row numbers."""
        return self.table[slots, positions // self.page_size] * self.page_size + (
            positions % self.page_size
        )

    def keep(self, slots: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Keep what verify was given ([B, K, …] each) until commit."""
        for name, tensor in self.replay.items():
            tensor[slots, : inputs[name].shape[1]] = inputs[name].to(tensor.dtype)

    def kept(self, slots: Tensor, length: int) -> dict[str, Tensor]:
        """The first `length` inputs kept for `slots`, each [B, length, …]."""
        return {name: tensor[slots, :length] for name, tensor in self.replay.items()}


class Track:
    """Layers whose lengths move together: the model's own, or some of what drafts for it."""

    def __init__(self, layers: Sequence[LayerState], lengths: Tensor) -> None:
        self.layers = tuple(layers)
        self.lengths = lengths  # [slots + 1], int64

    def advance(self, slots: Tensor, tokens: Tensor) -> None:
        """Every layer has folded `tokens` ([B]) more tokens into `slots` ([B])."""
        self.lengths.index_add_(0, slots, tokens)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A sequence's state at one point: enough to go on from there, in any slot."""

    tensors: tuple[Tensor, ...]  # one per state kind, [layers, …]
    lease: Lease
    drafted: tuple[int, ...]  # the length of each of the tracks that draft

    @property
    def length(self) -> int:
        return self.lease.length

    @property
    def bytes(self) -> int:
        """Bytes of the copied state; the pages it holds are counted by the pool."""
        return sum(tensor.nbytes for tensor in self.tensors)


class StatePool:
    """The state of all layers for `slots` sequences of at most `context` tokens each.

    `drafting` are the layers of what drafts for the model, by track: they share its slots and
    pages, and each track has lengths of its own, never above the model's. `window` is the most
    tokens that one verify may be given. `pages` is shared by all sequences; without it there are
    enough for every slot to be full.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        *,
        slots: int,
        context: int,
        window: int = 1,
        drafting: Sequence[Sequence[StateSpec]] = (),
        page_size: int = PAGE_SIZE,
        pages: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.context = context
        self.window = window
        per_slot = -(-(context + window) // page_size)
        paged = any(spec.token for track in (specs, *drafting) for spec in track)
        if pages is None:
            pages = slots * per_slot
        self.table = SlotTable(slots, pages if paged else 0, page_size)
        self._page_rows = torch.zeros(slots + 1, per_slot, dtype=torch.int64, device=device)
        #: What the page rows hold, without the zeros behind.
        self._written: list[Sequence[int]] = [()] * (slots + 1)
        self._slot_tensors: list[tuple[TensorSpec, Tensor]] = []
        self._token_tensors: list[Tensor] = []
        self._replay_tensors: list[Tensor] = []
        self._leases: set[Lease] = set()
        self.main = self._allocate(specs, device)
        self.drafting = tuple(self._allocate(track, device) for track in drafting)

    def _allocate(self, specs: Sequence[StateSpec], device: torch.device | str) -> Track:
        slots, pages, size = self.table.slots, self.table.pages, self.table.page_size
        lengths = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        layers: list[LayerState | None] = [None] * len(specs)
        for kind in _distinct(specs):
            members = [i for i, spec in enumerate(specs) if spec == kind]

            def made(
                specs: Mapping[str, TensorSpec], *lead: int, count: int = len(members)
            ) -> dict[str, Tensor]:
                return {
                    name: _filled((count, *lead, *spec.shape), spec, device)
                    for name, spec in specs.items()
                }

            slot, token = made(kind.slot, slots + 1), made(kind.token, (pages + 1) * size)
            # A window of one token is a plain step: nothing is ever taken back.
            replay = made(kind.replay, slots + 1, self.window) if self.window > 1 else {}
            self._slot_tensors += [(kind.slot[name], tensor) for name, tensor in slot.items()]
            self._token_tensors += token.values()
            self._replay_tensors += replay.values()
            for place, layer in enumerate(members):
                layers[layer] = LayerState(
                    {name: tensor[place] for name, tensor in slot.items()},
                    {name: tensor[place] for name, tensor in token.items()},
                    {name: tensor[place] for name, tensor in replay.items()},
                    lengths,
                    self._page_rows,
                    size,
                    kind,
                )
        return Track([layer for layer in layers if layer is not None], lengths)

    @property
    def layers(self) -> Sequence[LayerState]:
        """The model's."""
        return self.main.layers

    @property
    def lengths(self) -> Tensor:
        """Tokens in each slot's state, int64 [slots + 1]."""
        return self.main.lengths

    @property
    def slot_bytes(self) -> int:
        """Bytes of constant state that one slot takes, as allocated."""
        return sum(t.nbytes for _, t in self._slot_tensors) // (self.table.slots + 1)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of context takes in pages, as allocated."""
        rows = (self.table.pages + 1) * self.table.page_size
        return sum(t.nbytes for t in self._token_tensors) // rows

    @property
    def bytes(self) -> int:
        """All that was allocated, the null slot and page included."""
        tensors = [t for _, t in self._slot_tensors] + self._token_tensors + self._replay_tensors
        return sum(t.nbytes for t in tensors)

    def sync(self) -> None:
        """Bring the tensors up to what the table says. Called before a model runs."""
        for slot in self.table.fresh:
            for spec, tensor in self._slot_tensors:
                tensor[:, slot] = spec.fill
            for track in (self.main, *self.drafting):
                track.lengths[slot] = 0
        changed = [place for slot in self.table.moved for place in self._rewritten(slot)]
        if changed:
            slots, places, pages = sent(changed, self._page_rows.device).T
            self._page_rows[slots, places] = pages
        self.table.fresh.clear()
        self.table.moved.clear()

    def _rewritten(self, slot: int) -> list[tuple[int, int, int]]:
        """(slot, place, page) of what its page row is to hold and does not yet."""
        before, now = self._written[slot], tuple(self.table.pages_of(slot))
        self._written[slot] = now
        same = len(before) if now[: len(before)] == before else 0
        pages = (*now[same:], *[0] * (len(before) - len(now)))
        return [(slot, place, page) for place, page in enumerate(pages, same)]

    def advance(self, slots: Tensor, tokens: Tensor) -> None:
        """The model's layers have folded `tokens` ([B]) more tokens into `slots` ([B])."""
        self.main.advance(slots, tokens)

    def snapshot(self, slot: int, length: int | None = None) -> Snapshot:
        """The state of `slot` now. It keeps pages until it is dropped. Whoever knows its `length`
        spares a wait for the GPU."""
        self.sync()
        if length is None:
            length = int(self.lengths[slot])
        drafted = tuple(int(track.lengths[slot]) for track in self.drafting)
        # What drafts has read less than the model, and writes its rows of the rest later.
        lease = self.table.lease(slot, length, min((length, *drafted)))
        self._leases.add(lease)
        tensors = tuple(tensor[:, slot].clone() for _, tensor in self._slot_tensors)
        return Snapshot(tensors, lease, drafted)

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """`slot` goes on from `snapshot`. Raises MemoryError when a page is needed and none is
        free, and KeyError when the snapshot was dropped; the slot is then unchanged."""
        if snapshot.lease not in self._leases:
            raise KeyError("the snapshot was dropped, and its pages may be another's")
        copies = self.table.adopt(slot, snapshot.lease)
        self.table.fresh.discard(slot)
        self.sync()
        for (_, tensor), saved in zip(self._slot_tensors, snapshot.tensors, strict=True):
            tensor[:, slot] = saved
        self.lengths[slot] = snapshot.length
        for track, drafted in zip(self.drafting, snapshot.drafted, strict=True):
            track.lengths[slot] = drafted
        size = self.table.page_size
        for copy in copies:
            source, target = (slice(page * size, (page + 1) * size) for page in copy)
            for tensor in self._token_tensors:
                tensor[:, target] = tensor[:, source]

    def snapshot_bytes(self, snapshot: Snapshot) -> int:
        """What keeping it costs: its copy, and its pages as if nobody shared them."""
        return snapshot.bytes + len(snapshot.lease.pages) * self.table.page_size * self.token_bytes

    def drop(self, snapshot: Snapshot) -> None:
        """Give the snapshot's pages back. Raises KeyError if that has happened before."""
        self._leases.remove(snapshot.lease)
        self.table.end(snapshot.lease)

    def release(self, slot: int) -> None:
        """The sequence in `slot` has ended."""
        self.table.release(slot)

    def check(self) -> None:
        """Raises IntegrityError when a slot or a page is lost or has two owners."""
        self.table.check(tuple(self._leases))


def _filled(shape: tuple[int, ...], spec: TensorSpec, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cpu" and not spec.fill:
        # Zeros that the system hands out when they are first touched: a pool for full contexts
        # costs memory, and time at the start, only as sequences fill it.
        raw = np.zeros(math.prod(shape) * spec.kept_in.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(spec.kept_in).view(shape)
    return torch.full(shape, spec.fill, dtype=spec.kept_in, device=device)


def _distinct(specs: Sequence[StateSpec]) -> list[StateSpec]:
    found: list[StateSpec] = []
    for spec in specs:
        if spec not in found:
            found.append(spec)
    return found
