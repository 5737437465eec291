"""One vocabulary, its grammars, and what is asked of a constraint."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np

from difyops.engine.grammar import GrammarConstraint, Grammars
from tests.engine.random_model import STOPS, RandomModel, allowed, tokenizer

TOKENIZER = tokenizer()
KNOWN = TOKENIZER.get_vocab_size()
SIZE = KNOWN + 45  # a model's vocabulary is often padded
STOP_IDS = {TOKENIZER.token_to_id(stop) for stop in STOPS}
GRAMMARS = Grammars(TOKENIZER, SIZE, STOP_IDS)
BYTES = [GRAMMARS._vocabulary.bytes_of(i) for i in range(KNOWN)]
ORDINARY = [i for i in range(KNOWN) if i not in STOP_IDS and BYTES[i]]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def write(constraint: GrammarConstraint, seed: int = 0, **options: Any) -> str | None:
    return RandomModel(TOKENIZER, SIZE, STOP_IDS, seed).write(constraint, **options)


def ids(constraint: GrammarConstraint) -> set[int]:
    mask = constraint.mask()
    assert mask is not None and mask.dtype == np.int32 and mask.shape == ((SIZE + 31) // 32,)
    return set(allowed(mask, SIZE).tolist())


def accepts(constraint: GrammarConstraint, text: str) -> bool:
    try:
        for token in ids_of(text):
            constraint.advance(token)
    except ValueError:
        return False
    return ids(constraint) >= STOP_IDS


def taken(constraint: GrammarConstraint, tokens: list[int]) -> bool:
    for n, token in enumerate(tokens):
        try:
            constraint.advance(token)
        except ValueError:
            constraint.rollback(n)
            return False
    constraint.rollback(len(tokens))
    return True


def validates(text: str | None, schema: Any) -> bool:
    if text is None:
        return False
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(cls(schema, format_checker=cls.FORMAT_CHECKER).is_valid(json.loads(text)))


def walk_back_and_forth(
    constraint: GrammarConstraint,
    tokens: list[int],
    *,
    seed: int,
    steps: int,
    back: float,
    most: int,
) -> None:
    """Along `tokens`, with a chance of `back` to go at most `most` of them back: each place has the
    same mask whenever it is come to. Every place is."""
    rng = random.Random(seed)
    masks: list[Any] = []
    at = 0
    for _ in range(steps):
        mask = constraint.mask()
        if at == len(masks):
            masks.append(None if mask is None else mask.copy())
        assert np.array_equal(masks[at], mask) if mask is not None else masks[at] is None
        if at == len(tokens) or (at and rng.random() < back):
            n = rng.randint(1, min(at, most))
            constraint.rollback(n)
            at -= n
        else:
            constraint.advance(tokens[at])
            at += 1
    assert len(masks) == len(tokens) + 1
