"""Drafters with weights: multi-token prediction, Medusa heads, a smaller model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from difyops.engine import kernels
from difyops.engine.mixers.base import Mixer
from difyops.engine.models.decoder import Block, Decoder, Run
from difyops.engine.models.mtp import MedusaHead, MultiTokenPrediction, modules
from difyops.engine.speculate import Drafter, OnDevice, PromptLookup, Read
from difyops.engine.state import LayerState, StatePool, StateSpec, TensorSpec, Track
from difyops.errors import UsageError

#: Rows that a rough head is quicker for.
_ROUGH_ROWS = 64
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
        self._head = _Head(model)

    def tracks(self) -> list[list[StateSpec]]:
        return [
            [*(block.mixer.state_spec() for block in module.blocks), _hidden_spec(self._model)]
            for module in self._modules
        ]

    def blocks(self) -> list[Block]:
        return [block for module in self._modules for block in module.blocks]

    def held_bytes(self) -> int:
        return self._head.held_bytes()

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
            embedded = self._model.embed(read.tokens[paired])
            pairs = self._modules[depth - 1].paired(embedded, before[paired])
            made = self._run(depth, track, pairs, _folding(slots, counts))
            track.advance(slots, counts)
            hidden = torch.zeros_like(before)
            hidden[paired] = made

    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        # Of a window of more than one all have read enough before.
        short = pool.lengths[slots] - accepted if window.shape[1] == 1 else None
        for depth, track in enumerate(pool.drafting, 1):
            module = self._modules[depth - 1]
            read = self._paired(module, track, window, slots, hidden, accepted)
            if depth < len(pool.drafting):
                hidden = self._run(depth, track, read, _verifying(slots))
            else:  # what the last one makes of them is for guesses, which begin behind them
                module.note(read, _verifying(slots), _noting(slots), track.layers[:-1])
            counts = accepted if short is None else accepted * (short >= depth)
            for block, state in zip(module.blocks, track.layers, strict=False):
                block.mixer.commit(state, slots, counts)
            track.advance(slots, counts)

    def guess(self, window: Tensor, slots: Tensor, pool: StatePool) -> None:
        rest: Tensor | None = None
        for ahead in range(1, window.shape[1]):
            depth = min(ahead, len(pool.drafting))
            module, track = self._modules[depth - 1], pool.drafting[depth - 1]
            read = self._paired(module, track, window[:, :ahead], slots, rest)
            made = self._run(depth, track, read, _verifying(slots))
            self._head.likeliest(made[:, -1], window[:, ahead : ahead + 1])
            # The next module's places begin one earlier, and the last one's go on by themselves.
            on = made[:, -1:] if rest is None else torch.cat((rest, made[:, -1:]), dim=1)
            rest = made if ahead < len(pool.drafting) else on

    def _paired(
        self, module: MultiTokenPrediction, track: Track, tokens: Tensor, slots: Tensor,
        rest: Tensor | None, accepted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the module reads of `tokens` [B, J]: [B, J, 2 width]. The hidden state in front of
        them is kept, those behind it are the first of `rest` [B, …, width]. With `accepted` ([B])
        the last of so many of rest is kept from now on."""
        kept = _kept(track)
        if module.norm.fused:
            from difyops.engine.kernels import draft as kernel

            embedded, before = module.pre_fc_norm_embedding, module.pre_fc_norm_hidden
            return kernel.paired(
                tokens, self._model.embed.weight, kept, slots, rest, embedded.weight,
                before.weight, before.eps, before.offset, accepted,
            )  # fmt: skip
        hidden = kept[slots][:, None]
        if rest is not None:
            hidden = torch.cat((hidden, rest[:, : tokens.shape[1] - 1]), dim=1)
            if accepted is not None:
                kept[slots] = _last(rest, accepted)
        return module.paired(self._model.embed(tokens), hidden)

    def _run(self, depth: int, track: Track, pairs: Tensor, run: Run) -> Tensor:
        return self._modules[depth - 1].through(pairs, run, track.layers[:-1])


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

    def guess(self, window: Tensor, slots: Tensor, pool: StatePool) -> None:
        # The hidden state is that before the last token: head i looks i + 1 tokens past it.
        (track,) = pool.drafting
        hidden = _kept(track)[slots]
        for place in range(1, window.shape[1]):
            window[:, place] = self._heads[place - 1](hidden).argmax(-1)


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
        if kernels.usable(small.embed.weight.device, small.dtype):
            small.fuse()
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

    def guess(self, window: Tensor, slots: Tensor, pool: StatePool) -> None:
        # What is read grows and is read anew each time: that needs no state but the one there is.
        (track,) = pool.drafting
        for place in range(1, window.shape[1]):
            hidden = self._small.verify(window[:, :place], track, slots)
            window[:, place] = self._small.logits(hidden[:, -1]).argmax(-1)


class SyntheticAcceptance(OnDevice):
    """For measuring only: `drafter` at its full cost, but each guess is taken for right with
    probability `rate`. The tokens are then the model's own, read behind wrong ones: the answer is
    nonsense, and takes as long as one whose guesses come true so often.
    """

    #: Draws that are made beforehand, for each place; a pass takes the next ones.
    _DRAWS = 1 << 16

    def __init__(self, drafter: OnDevice, rate: float, seed: int, device: torch.device) -> None:
        self.name, self.most, self.depth = "synthetic", drafter.most, drafter.depth
        self._drafter, self._seed = drafter, seed
        self._draws = torch.zeros(self._DRAWS, drafter.most, dtype=torch.bool, device=device)
        self._next = torch.zeros((), dtype=torch.int64, device=device)
        self.draw(rate)

    def draw(self, rate: float) -> None:
        """From now on guesses are right at this rate, in graphs that were captured, too."""
        dice = torch.Generator().manual_seed(self._seed)
        self._draws.copy_(torch.rand(self._draws.shape, generator=dice) < rate)

    def tracks(self) -> list[list[StateSpec]]:
        return self._drafter.tracks()

    def blocks(self) -> Sequence[Block]:
        return self._drafter.blocks()

    def read(self, read: Read, pool: StatePool) -> None:
        self._drafter.read(read, pool)

    def guess(self, window: Tensor, slots: Tensor, pool: StatePool) -> None:
        self._drafter.guess(window, slots, pool)

    def follow(
        self, window: Tensor, hidden: Tensor, accepted: Tensor, slots: Tensor, pool: StatePool
    ) -> None:
        self._drafter.follow(window, hidden, accepted, slots, pool)

    def judged(self, guesses: Tensor, best: Tensor) -> Tensor:
        rows = torch.arange(len(best), device=best.device) + self._next
        self._next += len(best)
        return torch.where(self._draws[rows % self._DRAWS, : best.shape[1]], best, best ^ 1)


class _Head:
    """The model's head for guesses, which may be rough: on a GPU in eight bits, because reading it
    costs more than all else in a guess."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._rough: tuple[Tensor, Tensor] | None = None

    def held_bytes(self) -> int:
        """Of the rough one, which is made where the weights are bf16."""
        weight = self._model.head.weight
        return len(weight) * (weight.shape[1] + 4) if weight.dtype == torch.bfloat16 else 0

    def likeliest(self, hidden: Tensor, out: Tensor) -> None:
        """[B, width] -> the likeliest tokens, out [B, 1]."""
        weight = self._model.head.weight
        if not weight.is_cuda or weight.dtype != torch.bfloat16 or len(hidden) > _ROUGH_ROWS:
            out.copy_(self._model.logits(hidden).argmax(-1, keepdim=True))
            return
        from difyops.engine.kernels import choice, product
        from difyops.engine.kernels import draft as kernel

        self._rough = self._rough or product.quantised(weight)
        if len(hidden) == 1:
            scores = product.row(hidden, self._rough[0], scales=self._rough[1])
            choice.best(scores, 0, out[:, 0])
        else:
            kernel.likeliest(hidden, *self._rough, out)


def _verifying(slots: Tensor) -> Run:
    return lambda mixer, x, state: mixer.verify(x, state, slots)


def _noting(slots: Tensor) -> Run:
    def run(mixer: Mixer, x: Tensor, state: LayerState) -> Tensor:
        mixer.note(x, state, slots)
        return x

    return run


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
