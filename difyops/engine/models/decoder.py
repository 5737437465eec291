"""The one language-model skeleton: embedding, blocks of mixer and MLP, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difyops.engine.layers import Fusible, Residual, RMSNorm, wide
from difyops.engine.mixers.base import Mixer
from difyops.engine.state import LayerState, StatePool, StateSpec, Track

#: Where a model's state lies: the pool's main track, or the one of what drafts.
States = StatePool | Track
#: How one layer's mixer is run: (mixer, its normed input, its state) -> its output. There is a
#: state in every form but `whole`.
Run = Callable[[Mixer, Tensor, Any], Tensor]


def whole(mixer: Mixer, x: Tensor, state: None) -> Tensor:
    """The run of whole sequences, x [B, T, width], that begin and end here."""
    mixed: Tensor = mixer(x)
    return mixed


@dataclass(frozen=True)
class Shape:
    """What the engine must know of a model. `context` is in tokens, as trained."""

    width: int
    vocabulary: int
    context: int


class Block(Fusible):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP. Fused, it may change x."""

    def __init__(
        self,
        mixer_norm: RMSNorm,
        mixer: Mixer,
        mlp_norm: RMSNorm | None = None,
        mlp: Residual | None = None,
    ) -> None:
        super().__init__()
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def fuse(self) -> None:
        super().fuse()
        if self.mixer.residual:
            self.mixer.take(self.mixer_norm)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp.take(self.mlp_norm)

    def note(self, x: Tensor, run: Run, state: LayerState | None) -> None:
        """`run` the mixer for its state, where nobody asks what the block makes of x."""
        run(self.mixer, x if self.mixer.taken else self.mixer_norm(x), state)

    def forward(self, x: Tensor, run: Run, state: LayerState | None) -> Tensor:
        if self.fused:
            if self.mixer.taken:
                x = run(self.mixer, x, state)
            else:
                x = x + run(self.mixer, self.mixer_norm(x), state)
            return x if self.mlp is None else self.mlp(x)
        mixed = run(self.mixer, self.mixer_norm(x), state)
        if self.mlp is None or self.mlp_norm is None:
            return x + mixed
        x, normed = self.mlp_norm.add(x, mixed)
        through: Tensor = x + self.mlp(normed)
        return through


class Decoder(nn.Module):
    """A causal language model over any layer pattern. Tokens go in, hidden states come out;
    `logits` makes them scores, so that only the rows that are sampled pay for the head.

    The state's lengths move in the model, after its last layer, in every form but verify.
    With `wide_residual` what the blocks add up stays in float32 whatever the weights are in.
    """

    blocks: Sequence[Block]
    fused = False

    def __init__(
        self,
        shape: Shape,
        blocks: Sequence[Block],
        norm: nn.Module,
        *,
        tied: bool,
        wide_residual: bool = False,
        extra: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = norm
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        #: Numbers of the blocks whose mixers commit together.
        self._alike = [[i] for i in range(len(blocks))]
        self.wide_residual = wide_residual
        #: What recurrent states lie in between two steps, where not in what they are computed in.
        self.states_in: torch.dtype | None = None
        self.tied = tied
        if tied:
            self.head.weight = self.embed.weight
        #: Modules that plain decoding does not run, such as multi-token prediction's.
        self.extra = extra if extra is not None else nn.ModuleDict()

    def fuse(self) -> None:
        """Use the kernels for a GPU (see layers.Fusible)."""
        if self.fused:
            return
        self.fused = True
        for module in self.modules():
            if isinstance(module, Fusible):
                module.fuse()
        self._alike = _alike([block.mixer for block in self.blocks])
        for group in self._alike:
            mixers = [self.blocks[i].mixer for i in group]
            type(mixers[0]).stack(mixers)

    def state_specs(self) -> list[StateSpec]:
        """One per layer."""
        specs = [block.mixer.state_spec() for block in self.blocks]
        if self.states_in is None:
            return specs
        return [spec.stored_in(self.states_in) for spec in specs]

    def forward(self, tokens: Tensor) -> Tensor:
        """Whole sequences, [B, T] -> hidden states [B, T, width], without any state: what training
        runs."""
        return self._through(tokens, [None] * len(self.blocks), whole)

    def prefill(self, tokens: Tensor, pool: States, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Packed tokens [N] of the sequences in `slots` [B] -> hidden states [N, width]."""
        hidden = self._through(
            tokens, pool.layers, lambda mixer, x, state: mixer.prefill(x, state, slots, cu_seqlens)
        )
        pool.advance(slots, cu_seqlens.diff())
        return hidden

    def step(self, tokens: Tensor, pool: States, slots: Tensor) -> Tensor:
        """One token each, [B] -> hidden states [B, width]."""
        hidden = self._through(
            tokens, pool.layers, lambda mixer, x, state: mixer.step(x, state, slots)
        )
        # The null slot stays empty, however often it pads a batch.
        pool.advance(slots, (slots > 0).to(slots.dtype))
        return hidden

    def verify(self, tokens: Tensor, pool: States, slots: Tensor) -> Tensor:
        """K tokens each, [B, K] -> hidden states [B, K, width]; the state stays as it is."""
        return self._through(
            tokens, pool.layers, lambda mixer, x, state: mixer.verify(x, state, slots)
        )

    def commit(self, pool: States, slots: Tensor, accepted: Tensor) -> None:
        """Keep the first `accepted` ([B], 0..K) tokens of the last verify."""
        for group in self._alike:
            mixers = [self.blocks[i].mixer for i in group]
            states = [pool.layers[i] for i in group]
            type(mixers[0]).commit_all(mixers, states, slots, accepted)
        pool.advance(slots, accepted)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., V]."""
        scores: Tensor = self.head(hidden)
        return scores

    def _through(self, tokens: Tensor, layers: Sequence[LayerState | None], run: Run) -> Tensor:
        x = self.embed(tokens)
        if self.wide_residual:
            x = x.to(wide(x.dtype))
        for block, state in zip(self.blocks, layers, strict=True):
            x = block(x, run, state)
        hidden: Tensor = self.norm(x)
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype


def _alike(mixers: Sequence[Mixer]) -> list[list[int]]:
    """The numbers of those of one kind with the same options, together."""
    groups: list[list[int]] = []
    for i, mixer in enumerate(mixers):
        for group in groups:
            first = mixers[group[0]]
            if type(first) is type(mixer) and first.options == mixer.options:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
