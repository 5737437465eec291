"""Drafters with weights: multi-token prediction, Medusa heads, a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from difyops.engine.models.decoder import Block, Decoder, Run
from difyops.engine.models.mtp import MedusaHead, MultiTokenPrediction, modules
from difyops.engine.speculate import Drafter, OnDevice, PromptLookup, Read
from difyops.engine.state import StatePool, StateSpec, TensorSpec, Track
from difyops.errors import UsageError

#: Most guesses of one pass; how many of them are made is measured (adapt.py).
MOST = 4


class Mtp(OnDevice):
    """Multi-token prediction: guess d comes from the module of depth d, and those beyond the last
    depth from the last module again (see MultiTokenPrediction).

    Place i of module d takes token i + d in, so that behind n tokens it has read n - d places: each
    module has a track of its own. h[d - 1] of place n - d, which waits for the token that is
    sampled next, is kept beside its layers. A sequence shorter than d lacks places, and a guess in
    it is worth little.
    """

    name = "mtp"

    def __init__(self, model: Decoder, modules: Sequence[MultiTokenPrediction]) -> None:
        self.most = max(MOST, len(modules))
        self.depth = len(modules)
        self._model = model
        self._modules = modules

    def tracks(self) -> list[list[StateSpec]]:
        return [
            [*(block.mixer.state_spec() for block in module.blocks), _hidden_spec(self._model)]
            for module in self._modules
        ]

    def blocks(self) -> list[Block]:
        return [block for module in self._modules for block in module.blocks]

    def read(self, read: Read, pool: StatePool) -> None:
        first, last = read.cu_seqlens[:-1], read.cu_seqlens[1:] - 1
        lengths, total = read.cu_seqlens.diff(), pool.lengths[read.slots]
        rows = torch.arange(len(read.tokens), device=first.device)
        position = rows + (total - last - 1).repeat_interleave(lengths)
        # Of each token, what the module before this one made when it took that token in.
        hidden = read.hidden
        for depth, track in enumerate(pool.drafting, 1):
            kept = _kept(track)
            before = hidden.roll(1, 0)
            before[first] = kept[read.slots]
            kept[read.slots] = hidden[last]
            # The first `depth` tokens of a sequence have none that far before them.
            paired = (position >= depth).nonzero()[:, 0]
            if not len(paired):
                return
            counts = (total - depth).clamp(min=0).minimum(lengths)
            slots, counts = read.slots[counts > 0], counts[counts > 0]
            made = self._run(
                depth, track, read.tokens[paired], before[paired], _folding(slots, counts)
            )
            track.advance(slots, counts)
            hidden = torch.zeros_like(before)
            hidden[paired] = made

    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        before = pool.lengths[slots] - accepted
        for depth, track in enumerate(pool.drafting, 1):
            kept = _kept(track)
            earlier = torch.cat((kept[slots][:, None], hidden[:, :-1]), dim=1)
            kept[slots] = _last(hidden, accepted)
            hidden = self._run(
                depth, track, window, earlier, lambda mixer, x, state: mixer.verify(x, state, slots)
            )
            counts = accepted * (before >= depth)
            for block, state in zip(self._modules[depth - 1].blocks, track.layers, strict=False):
                block.mixer.commit(state, slots, counts)
            track.advance(slots, counts)

    def guess(self, last: Tensor, slots: Tensor, pool: StatePool, k: int) -> Tensor:
        kept = [_kept(track)[slots][:, None] for track in pool.drafting]
        hidden = kept[0]

        def guess(tokens: Tensor) -> Tensor:
            nonlocal hidden
            ahead = tokens.shape[1]
            depth = min(ahead, len(kept))
            made = self._run(
                depth, pool.drafting[depth - 1], tokens, hidden,
                lambda mixer, x, state: mixer.verify(x, state, slots),
            )  # fmt: skip
            # The next module's places begin one earlier, and the last one's go on by themselves.
            one_earlier = ahead < len(kept)
            parts = (kept[ahead], made) if one_earlier else (hidden, made[:, -1:])
            hidden = torch.cat(parts, dim=1)
            return self._model.logits(made[:, -1])

        return _chained(last, k, guess)

    def _run(self, depth: int, track: Track, tokens: Tensor, hidden: Tensor, run: Run) -> Tensor:
        made: Tensor = self._modules[depth - 1](
            self._model.embed(tokens), hidden, run, track.layers[:-1]
        )
        return made


class Medusa(OnDevice):
    """A head for each place ahead, all from the last hidden state alone."""

    name = "medusa"

    def __init__(self, model: Decoder, heads: Sequence[MedusaHead]) -> None:
        self.most = len(heads)
        self._model = model
        self._heads = heads

    def tracks(self) -> list[list[StateSpec]]:
        return [[_hidden_spec(self._model)]]

    def read(self, read: Read, pool: StatePool) -> None:
        (track,) = pool.drafting
        _kept(track)[read.slots] = read.hidden[read.cu_seqlens[1:] - 1]
        track.advance(read.slots, read.cu_seqlens.diff())

    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        (track,) = pool.drafting
        _kept(track)[slots] = _last(hidden, accepted)
        track.advance(slots, accepted)

    def guess(self, last: Tensor, slots: Tensor, pool: StatePool, k: int) -> Tensor:
        # The hidden state is that before the last token: head i looks i + 1 tokens past it.
        (track,) = pool.drafting
        hidden = _kept(track)[slots]
        return torch.stack([head(hidden).argmax(-1) for head in self._heads[:k]], dim=1)


class DraftModel(OnDevice):
    """A smaller model with the same tokens. Its state is as far as the model's."""

    name = "draft"

    def __init__(self, model: Decoder, small: Decoder, most: int = MOST) -> None:
        """Raises UsageError when the two do not have the same vocabulary."""
        if small.shape.vocabulary != model.shape.vocabulary:
            raise UsageError(
                f"speculate: the draft model has {small.shape.vocabulary} tokens, "
                f"the model {model.shape.vocabulary}",
                "choose a smaller model of the same family",
            )
        self.most = most
        self._small = small

    def tracks(self) -> list[list[StateSpec]]:
        return [self._small.state_specs()]

    def blocks(self) -> list[Block]:
        return list(self._small.blocks)

    def read(self, read: Read, pool: StatePool) -> None:
        (track,) = pool.drafting
        self._small.prefill(read.tokens, track, read.slots, read.cu_seqlens)

    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        (track,) = pool.drafting
        self._small.verify(window, track, slots)
        self._small.commit(track, slots, accepted)

    def guess(self, last: Tensor, slots: Tensor, pool: StatePool, k: int) -> Tensor:
        (track,) = pool.drafting

        def guess(tokens: Tensor) -> Tensor:
            return self._small.logits(self._small.verify(tokens, track, slots)[:, -1])

        return _chained(last, k, guess)


class SyntheticAcceptance(OnDevice):
    """For measuring only: `drafter` at its full cost, but each guess is taken for right with
    probability `rate`. The tokens are then the model's own, read behind wrong ones: the answer is
    nonsense, and takes as long as one whose guesses come true so often.
    """

    #: Draws that are made beforehand, for each place; a pass takes the next ones.
    _DRAWS = 1 << 16

    def __init__(self, drafter: OnDevice, rate: float, seed: int, device: torch.device) -> None:
        self.name, self.most, self.depth = f"synthetic {rate}", drafter.most, drafter.depth
        self._drafter = drafter
        dice = torch.Generator().manual_seed(seed)
        draws = torch.rand(self._DRAWS, drafter.most, generator=dice) < rate
        self._draws, self._next = draws.to(device), torch.zeros((), dtype=torch.int64).to(device)

    def tracks(self) -> list[list[StateSpec]]:
        return self._drafter.tracks()

    def blocks(self) -> Sequence[Block]:
        return self._drafter.blocks()

    def read(self, read: Read, pool: StatePool) -> None:
        self._drafter.read(read, pool)

    def guess(self, last: Tensor, slots: Tensor, pool: StatePool, k: int) -> Tensor:
        return self._drafter.guess(last, slots, pool, k)

    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        self._drafter.follow(window, hidden, accepted, slots, pool)

    def judged(self, guesses: Tensor, best: Tensor) -> Tensor:
        rows = torch.arange(len(best), device=best.device) + self._next
        self._next += len(best)
        return torch.where(self._draws[rows % self._DRAWS, : best.shape[1]], best, -1)


def _chained(last: Tensor, k: int, guess: Callable[[Tensor], Tensor]) -> Tensor:
    """The likeliest continuation of `last` [B], a token at a time: `guess` makes logits [B, V] of
    the tokens from the last known one on, [B, j]. The window grows and is read anew each time: what
    drafts then needs no state but the one that is there."""
    tokens = last[:, None]
    for _ in range(k):
        tokens = torch.cat((tokens, guess(tokens).argmax(-1, keepdim=True)), dim=1)
    return tokens[:, 1:]


def _last(hidden: Tensor, accepted: Tensor) -> Tensor:
    """The last accepted place of each row: [B, K, width] -> [B, width]."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, (accepted - 1).clamp_min(0)]


def _folding(slots: Tensor, counts: Tensor) -> Run:
    """Prefill of `counts` ([B]) packed places each."""
    bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return lambda mixer, x, state: mixer.prefill(x, state, slots, bounds)


def _hidden_spec(model: Decoder) -> StateSpec:
    return StateSpec(slot={"hidden": TensorSpec((model.shape.width,), model.dtype)})


def _kept(track: Track) -> Tensor:
    """What a track's last layer, of `_hidden_spec`, keeps: [slots + 1, width]."""
    return track.layers[-1].slot["hidden"]


def kinds(model: Decoder) -> list[str]:
    """What can guess for a model without another one, the best first."""
    return [name for name in ("mtp", "medusa") if name in model.extra] + ["ngram"]


def choose(kind: str, model: Decoder, small: Decoder | None = None) -> Drafter | None:
    """The drafter that `--speculate` names: auto, off, mtp, medusa, ngram or draft.

    auto is the best that the checkpoint brings. Raises UsageError when it lacks what is named.
    """
    mtp, heads = modules(model), dict(model.extra.items()).get("medusa")
    if kind == "auto":
        kind = kinds(model)[0]
    if kind == "mtp" and mtp:
        return Mtp(model, mtp)
    if kind == "medusa" and isinstance(heads, nn.ModuleList):
        return Medusa(model, [head for head in heads if isinstance(head, MedusaHead)])
    if kind in ("mtp", "medusa"):
        raise UsageError(
            f"speculate: the checkpoint has no {kind} weights", "use auto, ngram or off"
        )
    if kind == "draft" and small is not None:
        return DraftModel(model, small)
    return PromptLookup() if kind == "ngram" else None
