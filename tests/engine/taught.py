"""Tiny models that have learnt what to say: a model that calls tools, or reasons, by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from difyops.engine.models import native
from difyops.engine.models.decoder import Decoder
from difyops.engine.state import StatePool
from tests.engine import tiny


def checkpoint(folder: Path, lessons: Mapping[str, str], template: str, *, context: int) -> Path:
    """A checkpoint whose greedy answer to each prompt of `lessons` is its text, and then ends."""
    tiny.checkpoint(folder, context=context)
    words = tiny.tokenizer()
    model, config = tiny.model(vocabulary=words.get_vocab_size(), context=context)
    end = words.token_to_id(tiny.END)
    _teach(
        model,
        {tuple(words.encode(p).ids): [*words.encode(text).ids, end] for p, text in lessons.items()},
    )
    native.save(model, config, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def _teach(model: Decoder, lessons: Mapping[tuple[int, ...], list[int]]) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        logits, wanted = _answers(model, lessons)
        loss = F.cross_entropy(logits, wanted)
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss < 0.01
    model.requires_grad_(False)


def _answers(model: Decoder, lessons: Mapping[tuple[int, ...], list[int]]) -> tuple[Tensor, Tensor]:
    """Logits [N, V] at the lessons' answers, and their tokens [N]."""
    texts = [[*prompt, *answer] for prompt, answer in lessons.items()]
    longest = max(map(len, texts))
    pool = StatePool(model.state_specs(), slots=len(texts), context=longest)
    slots = []
    for _ in texts:
        slot = pool.table.acquire()
        assert slot is not None and pool.table.grow(slot, longest)
        slots.append(slot)
    pool.sync()
    lengths = torch.tensor([0, *(len(text) - 1 for text in texts)])
    given = torch.tensor([token for text in texts for token in text[:-1]])
    logits = model.logits(model.prefill(given, pool, torch.tensor(slots), lengths.cumsum(0)))
    answers = [
        part[len(prompt) - 1 :]
        for part, prompt in zip(logits.split(lengths[1:].tolist()), lessons, strict=True)
    ]
    wanted = torch.tensor([token for answer in lessons.values() for token in answer])
    return torch.cat(answers), wanted
