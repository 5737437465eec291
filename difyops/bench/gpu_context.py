"""What a token costs behind a long context: a recurrent model, a hybrid and a softmax one of the
same size."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import torch

from difyops.bench.gpu_model import (
    SHAPES,
    Limits,
    Row,
    Wanted,
    build,
    filled,
    step_limit,
)
from difyops.bench.gpu_step import median, step_of
from difyops.engine import graphs
from difyops.engine.models.decoder import Decoder

#: Of one size; the recurrent one first.
COMPARED = ("linear-1b", "hybrid-1b", "softmax-1b")
SEQUENCES = (1, 16)
#: The ratio that is told is between these.
SHORT, LONG = 1024, 65536


def context(wanted: Wanted, limits: Limits) -> Iterator[Row]:
    for name in COMPARED:
        model = build(SHAPES[name])
        model.fuse()
        for size in SEQUENCES:
            yield from _curve(name, model, size, wanted, limits)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _curve(name: str, model: Decoder, size: int, wanted: Wanted, limits: Limits) -> Iterator[Row]:
    """One pool for all contexts: what is measured depends on the lengths, not on what is there."""
    contexts = sorted(wanted.contexts)
    pool, slots = filled(model, size, contexts[-1])
    once = step_of(model, pool, slots, graphs.Captured)
    found: dict[int, float] = {}
    for length in contexts:
        pool.lengths[1:] = length
        seconds = found[length] = median(once)
        limit = step_limit(model, size, limits, length)
        row = Row(name, f"step at {size}", length, seconds, size / seconds, limit, unit="context",
                  facts={"sequences": size, "context": length})  # fmt: skip
        if length >= LONG and SHORT in found:
            ratio = seconds / found[SHORT]
            row = replace(row, note=f"{ratio:.2f} x that at {SHORT:,}",
                          facts={**row.facts, "ratio": ratio})  # fmt: skip
        yield row
