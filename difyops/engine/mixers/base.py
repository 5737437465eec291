"""What a token mixer is: attention of any kind, with its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from difyops.engine.kernels.spans import Spans
from difyops.engine.layers import Residual, wide
from difyops.engine.state import LayerState, StateSpec

#: Tokens of each sequence that a kernel of its own takes from the projections to the norm.
FEW = 8
#: Per-token tensors by name, e.g. q: [B, T, H, Dk].
Inputs = dict[str, Tensor]
#: The state of some sequences by name, e.g. S: [B, H, Dk, Dv].
Carry = dict[str, Tensor]


class Options(BaseModel):
    """A mixer's shape. Unknown keys are refused: a config is never half understood."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Mixer(Residual, ABC):
    """One layer's mixing of tokens. Made as `Kind(width, Kind.Options(...))`.

    All forms compute the same function of a sequence. x is [..., width] and so is what they
    answer. `slots` ([B], int64) says which sequences; `state.lengths[slots]` is how many tokens
    came before.
    """

    @property
    def graphable(self) -> bool:
        """Whether `step` never waits for a GPU, and does the same work whatever lies there: it
        may be captured as a graph."""
        return True

    #: Whether, once fused, it can take its block's norm in (see layers.Residual).
    residual = False

    @property
    def graphable_prefill(self) -> bool:
        """The same of `prefill`, of a few hundred tokens."""
        return False

    @abstractmethod
    def state_spec(self) -> StateSpec:
        """What a sequence keeps. Called once the parameters have their dtype."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences of one length from an empty state, x [B, T, width], and no state kept:
        what training runs. Differentiable, and without a wait for the device."""

    @abstractmethod
    def prefill(self, x: Tensor, state: LayerState, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Many tokens of each sequence, packed: x [N, width]; those of slots[i] are
        x[cu_seqlens[i]:cu_seqlens[i + 1]] (cu_seqlens: [B + 1], int64). Carries the state."""

    @abstractmethod
    def step(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """One token of each sequence: x [B, width]. Carries the state."""

    @abstractmethod
    def verify(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """K tokens of each sequence, the last K - 1 of them drafted: x [B, K, width].

        What the next step would read is left as it is; raw inputs are kept for commit.
        """

    @abstractmethod
    def commit(self, state: LayerState, slots: Tensor, accepted: Tensor) -> None:
        """Fold the first `accepted` ([B], 0..K) tokens of the last verify into the state."""

    def note(self, x: Tensor, state: LayerState, slots: Tensor) -> None:
        """verify where nobody asks for the answer."""
        self.verify(x, state, slots)

    @staticmethod
    def stack(mixers: Sequence[Any]) -> None:
        """Prepare commit_all, once all of them are fused."""

    @staticmethod
    def commit_all(
        mixers: Sequence[Any], states: Sequence[LayerState], slots: Tensor, accepted: Tensor
    ) -> None:
        """commit of several layers of this kind that have the same options."""
        for mixer, state in zip(mixers, states, strict=True):
            mixer.commit(state, slots, accepted)

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """One whole sequence from an empty state, x [T, width], in the plainest form there is:
        what every other form is tested against."""


class RecurrentMixer(Mixer):
    """A mixer whose state does not grow with the context.

    A kind writes five things: `state_spec`, `project`, `scan`, `recur` and `emit` (and its
    `reference`). Everything that a draft could spoil happens in scan and recur, so that verify is
    a scan whose state is thrown away, and commit a scan over what was accepted. `state_spec` names
    in `replay` exactly what `project` returns.
    """

    @abstractmethod
    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        """Each token by itself: x [..., width], positions [...] -> tensors [..., *shape].

        Raw: a convolution, which looks at neighbours, belongs to scan and recur.
        """

    @abstractmethod
    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        """Chunkwise parallel: inputs [B, T, …], carry [B, …] -> out [B, T, …] and the new carry.

        `lengths` ([B], 0..T): tokens behind a sequence's length leave its carry as it is; what
        `out` holds for them does not matter. T is any number from 1 on.
        """

    @abstractmethod
    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        """One token: inputs [B, …], carry [B, …] -> out [B, …] and the new carry."""

    #: Whether project looks at positions.
    positional = True

    @property
    def in_place(self) -> bool:
        """Whether `advance` is there: kernels that read and write the state where it lies."""
        return False

    @property
    def graphable_prefill(self) -> bool:
        return self.in_place

    def advance(self, inputs: Inputs, state: LayerState, slots: Tensor, spans: Spans) -> Tensor:
        """recur for each token of each span: inputs [N, …], slots [B] -> out [N, …]."""
        raise NotImplementedError

    def finish_few(
        self, inputs: Inputs, x: Tensor, state: LayerState, slots: Tensor, count: int, *, kept: bool
    ) -> Tensor:
        """advance and finish for `count` tokens of each sequence; unless the state is `kept` it
        stays as it was, and what fold needs is noted."""
        if not kept:
            batch = (len(slots), count)
            noted = {name: x.reshape(*batch, *x.shape[1:]) for name, x in inputs.items()}
            state.keep(slots, noted)
        return self.finish(self.advance(inputs, state, slots, Spans(count, kept=kept)), inputs, x)

    def fold(self, state: LayerState, slots: Tensor, accepted: Tensor) -> None:
        """advance for the first `accepted` ([B]) of the tokens that were noted."""
        inputs = {name: tensor[slots].flatten(0, 1) for name, tensor in state.replay.items()}
        window = next(iter(state.replay.values())).shape[1]
        self.advance(inputs, state, slots, Spans.beginnings(accepted, window))

    def finish(self, out: Tensor, inputs: Inputs, x: Tensor) -> Tensor:
        """emit, for what advance answers."""
        return self.emit(out, x)

    @abstractmethod
    def emit(self, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output from what was mixed and the layer's input: [..., width]."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count = x.shape[:2]
        inputs = self.project(x, torch.arange(count, device=x.device).expand(batch, count))
        empty = {
            name: torch.full((batch, *spec.shape), spec.fill, dtype=spec.dtype, device=x.device)
            for name, spec in self.state_spec().slot.items()
        }
        lengths = torch.full((batch,), count, device=x.device)
        # Sums over a whole context keep their bits where the rest is trained in fewer.
        with torch.autocast(x.device.type, enabled=False):
            out = self.scan(inputs, empty, lengths)[0]
        return self.emit(out, x)

    def prefill(self, x: Tensor, state: LayerState, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.in_place:
            positions = slots
            if self.positional:
                within, owner = _within(cu_seqlens, len(x))
                positions = state.lengths[slots][owner] + within
            inputs = self.project(x, positions)
            out = self.advance(inputs, state, slots, Spans.packed(cu_seqlens))
            return self.finish(out, inputs, x)
        lengths = cu_seqlens.diff()
        within, owner = _within(cu_seqlens, len(x))
        inputs = self.project(x, state.lengths[slots][owner] + within)
        place = _places(lengths, within)
        padded = {name: _pad(tensor, place, lengths) for name, tensor in inputs.items()}
        out, carry = self.scan(padded, state.read(slots), lengths)
        state.write(slots, carry)
        return self.emit(out.flatten(0, 1)[place], x)

    def step(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        positions = state.lengths[slots] if self.positional else slots
        inputs = self.project(x, positions)
        if self.in_place:
            return self.finish_few(inputs, x, state, slots, 1, kept=True)
        out, carry = self.recur(inputs, state.read(slots))
        state.write(slots, carry)
        return self.emit(out, x)

    def verify(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        count = x.shape[1]
        positions = drafted_positions(state, slots, count) if self.positional else slots
        inputs = self.project(x, positions)
        if self.in_place:
            flat = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
            rows = x.flatten(0, 1)
            return self.finish_few(flat, rows, state, slots, count, kept=False).view_as(x)
        state.keep(slots, inputs)
        out, _ = self.scan(inputs, state.read(slots), torch.full_like(slots, count))
        return self.emit(out, x)

    def commit(self, state: LayerState, slots: Tensor, accepted: Tensor) -> None:
        if self.in_place:
            self.fold(state, slots, accepted)
            return
        inputs = state.kept(slots, int(accepted.max()))
        if next(iter(inputs.values())).shape[1]:
            state.write(slots, self.scan(inputs, state.read(slots), accepted)[1])

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return next(self.parameters()).dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Sums over a whole context need more bits than the weights have."""
        return wide(self.dtype)


def drafted_positions(state: LayerState, slots: Tensor, count: int) -> Tensor:
    """Positions of `count` tokens that follow each sequence: [B, count]."""
    return state.lengths[slots][:, None] + torch.arange(count, device=slots.device)


def within_length(lengths: Tensor, count: int) -> Tensor:
    """Which of `count` positions lie within each length: [B] -> bool [B, count]."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]


def _within(cu_seqlens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each of `count` packed tokens' index in its own sequence, and which one that is: [N] each.
    Tokens behind the last bound, which are nobody's, count as the last sequence's."""
    total = torch.arange(count, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), total, right=True)
    owner = owner.clamp_max(len(cu_seqlens) - 2)
    return total - cu_seqlens[owner], owner


def _places(lengths: Tensor, within: Tensor) -> Tensor:
    """Each packed token's row in [B * longest]: [N]."""
    rows = torch.arange(lengths.numel(), device=lengths.device) * lengths.max()
    return rows.repeat_interleave(lengths) + within


def _pad(packed: Tensor, place: Tensor, lengths: Tensor) -> Tensor:
    """[N, …] -> [B, longest, …], zeros behind each length."""
    batch, longest = lengths.numel(), int(lengths.max())
    padded = packed.new_zeros(batch * longest, *packed.shape[1:])
    padded[place] = packed
    return padded.view(batch, longest, *packed.shape[1:])


def options_from(kind: type[Mixer], values: Mapping[str, Any]) -> Options:
    """The options of a kind, validated; raises pydantic's ValidationError."""
    options: type[Options] = kind.Options  # type: ignore[attr-defined]
    return options.model_validate(dict(values))
