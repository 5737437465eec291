"""Drafters with weights: multi-token prediction, Medusa heads, a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from difyops.engine.models.decoder import Decoder
from difyops.engine.models.mtp import MedusaHead, MultiTokenPrediction
from difyops.engine.request import Request
from difyops.engine.speculate import Drafter, PromptLookup, Read
from difyops.engine.state import LayerState, StatePool, StateSpec, TensorSpec
from difyops.errors import UsageError

#: Most guesses of one pass; how many of them are made is measured (adapt.py).
MOST = 4


class Mtp(Drafter):
    """Multi-token prediction. Its state is always one pair (token, next token) behind the model's:
    the pair that is missing waits for the token that is sampled next."""

    name = "mtp"

    def __init__(self, model: Decoder, module: MultiTokenPrediction, most: int = MOST) -> None:
        self.most = most
        self._model = model
        self._module = module

    def state_specs(self) -> list[StateSpec]:
        blocks = [block.mixer.state_spec() for block in self._module.blocks]  # type: ignore[operator, union-attr]
        return [*blocks, _hidden_spec(self._model)]

    def read(self, read: Read, pool: StatePool) -> None:
        lengths = read.cu_seqlens.diff()
        first, last = read.cu_seqlens[:-1], read.cu_seqlens[1:] - 1
        kept = pool.drafting.layers[-1].slot["hidden"]
        before = read.hidden.roll(1, 0)
        before[first] = kept[read.slots]
        kept[read.slots] = read.hidden[last]
        # A sequence's very first token has none before it, and so makes no pair.
        new = pool.lengths[read.slots] == lengths
        paired = torch.ones_like(read.tokens, dtype=torch.bool)
        paired[first[new]] = False
        counts = lengths - new.to(lengths.dtype)
        some = counts > 0
        if not some.any():
            return
        slots, counts = read.slots[some], counts[some]
        bounds = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        self._module(
            self._model.embed(read.tokens[paired]),
            before[paired],
            lambda mixer, x, state: mixer.prefill(x, state, slots, bounds),
            self._layers(pool),
        )
        pool.drafting.advance(slots, counts)

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        hidden = pool.drafting.layers[-1].slot["hidden"][slots][:, None]

        def guess(tokens: Tensor) -> Tensor:
            nonlocal hidden
            made = self._module(
                self._model.embed(tokens),
                hidden,
                lambda mixer, x, state: mixer.verify(x, state, slots),
                self._layers(pool),
            )
            hidden = torch.cat((hidden, made[:, -1:]), dim=1)
            return self._model.logits(made[:, -1])

        return _chained(requests, slots, k, guess)

    def _layers(self, pool: StatePool) -> Sequence[LayerState]:
        return pool.drafting.layers[:-1]


class Medusa(Drafter):
    """A head for each place ahead, all from the last hidden state alone."""

    name = "medusa"

    def __init__(self, model: Decoder, heads: Sequence[MedusaHead]) -> None:
        self.most = len(heads)
        self._model = model
        self._heads = heads

    def state_specs(self) -> list[StateSpec]:
        return [_hidden_spec(self._model)]

    def read(self, read: Read, pool: StatePool) -> None:
        kept = pool.drafting.layers[-1].slot["hidden"]
        kept[read.slots] = read.hidden[read.cu_seqlens[1:] - 1]
        pool.drafting.advance(read.slots, read.cu_seqlens.diff())

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        # The hidden state is that before the last token: head i looks i + 1 tokens past it.
        hidden = pool.drafting.layers[-1].slot["hidden"][slots]
        return torch.stack([head(hidden).argmax(-1) for head in self._heads[:k]], dim=1)


class DraftModel(Drafter):
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

    def state_specs(self) -> list[StateSpec]:
        return self._small.state_specs()

    def read(self, read: Read, pool: StatePool) -> None:
        self._small.prefill(read.tokens, pool.drafting, read.slots, read.cu_seqlens)

    def draft(self, requests: Sequence[Request], slots: Tensor, pool: StatePool, k: int) -> Tensor:
        def guess(tokens: Tensor) -> Tensor:
            return self._small.logits(self._small.verify(tokens, pool.drafting, slots)[:, -1])

        return _chained(requests, slots, k, guess)


def _chained(
    requests: Sequence[Request], slots: Tensor, k: int, guess: Callable[[Tensor], Tensor]
) -> Tensor:
    """The likeliest continuation, a token at a time: `guess` makes logits [B, V] of the tokens
    from the last known one on, [B, j]. The window grows and is read anew each time: what drafts
    then needs no state but the one that is there."""
    last = [request.tokens[-1] for request in requests]
    tokens = torch.tensor(last, dtype=torch.int64, device=slots.device)[:, None]
    for _ in range(k):
        tokens = torch.cat((tokens, guess(tokens).argmax(-1, keepdim=True)), dim=1)
    return tokens[:, 1:]


def _hidden_spec(model: Decoder) -> StateSpec:
    return StateSpec(slot={"hidden": TensorSpec((model.shape.width,), model.dtype)})


def kinds(model: Decoder) -> list[str]:
    """What can guess for a model without another one, the best first."""
    return [name for name in ("mtp", "medusa") if name in model.extra] + ["ngram"]


def choose(kind: str, model: Decoder, small: Decoder | None = None) -> Drafter | None:
    """The drafter that `--speculate` names: auto, off, mtp, medusa, ngram or draft.

    auto is the best that the checkpoint brings. Raises UsageError when it lacks what is named.
    """
    brought = dict(model.extra.items())
    mtp, heads = brought.get("mtp"), brought.get("medusa")
    if kind == "auto":
        kind = kinds(model)[0]
    if kind == "mtp" and isinstance(mtp, MultiTokenPrediction):
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
