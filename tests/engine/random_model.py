"""A small real tokenizer, and a model with random weights: random logits through the masks."""

from __future__ import annotations

import random

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from difyops.engine.request import Constraint

_TEXT = (
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3, "ok": true, "x": null}}',
    '[[1, 2], {"a": []}]\n\n  the quick brown fox -1.5e10 </parameter>\n</function> <thinking>\n\n',
)
STOPS = ("<|end|>", "<|im_end|>")


def tokenizer(*, special_tags: bool | None = False) -> Tokenizer:
    """Byte-level BPE with every byte, so that any text can be written.

    `special_tags`: whether the tags of calls are special tokens; None: they are no tokens at all.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_TEXT * 20, trainer)
    made.add_special_tokens([AddedToken(stop, special=True) for stop in STOPS])
    # Pieces that end a tag and go on: real vocabularies have them.
    made.add_tokens([AddedToken(piece, special=False) for piece in (">\n\n", ">x", ">az")])
    tags = ("<tool_call>", "</tool_call>")
    if special_tags:
        made.add_special_tokens([AddedToken(tag, special=True) for tag in tags])
    elif special_tags is not None:
        made.add_tokens([AddedToken(tag, special=False) for tag in tags])
    return made


def allowed(mask: np.ndarray, size: int) -> np.ndarray:
    """The ids that a packed mask allows; bits past `size` are a failure."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return np.flatnonzero(bits)


class RandomModel:
    """Greedy over random logits.

    After `patience` tokens it would like to end, as a model would: the logits of the stop ids are
    raised, and of what closes strings, objects and lists, and of the @ that an address needs.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, stops: set[int], seed: int) -> None:
        self._random = random.Random(seed)
        self._size = size
        self._stops = stops
        self._tokenizer = tokenizer
        self._end: list[set[int]] = []
        self._written = 0
        self._closing: list[set[int]] = []

    def write(
        self,
        constraint: Constraint,
        *,
        patience: int = 40,
        limit: int = 2000,
        end: str = "",
        closing: str = '"}]@',
    ) -> str | None:
        """The text up to the stop id, or to where all is allowed; None if the limit came first.
        `end` is written when tired."""
        tokens: list[int] = []
        self._closing = [{self._tokenizer.token_to_id(c)} for c in closing]
        self._end = [{self._tokenizer.token_to_id("Ċ" if c == "\n" else c)} for c in end]
        self._written = 0
        for step in range(limit):
            mask = constraint.mask()
            if mask is None:
                return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
            token = self._choose(allowed(mask, self._size).tolist(), step > patience)
            constraint.advance(token)
            if token in self._stops:
                return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
            tokens.append(token)
        return None

    def _choose(self, ids: list[int], tired: bool) -> int:
        ending = self._end[self._written : self._written + 1] if tired else []
        if ending and ending[0] & set(ids) and not self._stops & set(ids):
            self._written = (self._written + 1) % len(self._end)
            return min(ending[0])
        self._written = 0
        for group in (self._stops, *self._closing) if tired else ():
            if (found := group.intersection(ids)) and self._random.random() < 0.9:
                return min(found)
        return self._random.choice(ids)
