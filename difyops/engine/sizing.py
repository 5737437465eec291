"""What memory a model takes while it is served, and how many sequences fit into it.

Everything is known from the shapes: weights, each sequence's constant state, each page of keys and
values, and what one step works with. Knows no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difyops.engine import drafters, models
from difyops.engine.headers import check_context
from difyops.engine.models.decoder import Decoder
from difyops.engine.speculate import Drafter, state_specs
from difyops.engine.state import PAGE_SIZE
from difyops.errors import PrerequisiteError

#: Slots of a GPU, if nobody says how many: beyond it a step costs nearly what its sequences cost
#: by themselves.
MOST_SLOTS = 256
#: Of what weights and work leave free, kept for prompts that begin alike.
PREFIX_SHARE = 1 / 8
#: Where there are pages, the share of the rest that slots may take.
SLOTS_SHARE = 1 / 2
#: Bytes for each score of a row that is sampled: float64 shares, their order and their sum.
SAMPLED = 24
#: What graphs and products keep for themselves (measured on an H200, 0.8B shape: 2 to 67 MiB).
GRAPHS = 64 << 20
#: What a GPU's driver, its libraries and their kernels take before there is a model (measured).
OVERHEAD = 700 << 20


@dataclass(frozen=True)
class Needs:
    """Bytes, by what they grow with. `work`: a step's numbers, graphs and libraries. `full`: pages
    of one sequence that fills the context; 0 where nothing grows with it."""

    weights: int
    slot: int
    page: int
    work: int
    full: int

    def kept(self, slots: int, pages: int) -> int:
        """All that stays allocated, the null slot and page included."""
        return self.weights + (slots + 1) * self.slot + (pages + 1) * self.page


@dataclass(frozen=True)
class Plan:
    """What was chosen. `total` is what it comes to with everything in use."""

    slots: int
    pages: int
    prefix_bytes: int
    total: int


@dataclass(frozen=True)
class Sized:
    """A model as its config describes it, served with what drafts for it."""

    family: str
    parameters: int
    dtype: str
    context: int
    vocabulary: int
    drafter: str
    needs: Needs


def of_config(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    states_in: torch.dtype | None = None,
    context: int | None = None,
    prefill_tokens: int = 8192,
) -> Sized:
    """Raises UsageError for a config, or a context, that the engine does not serve."""
    family = models.family(config)
    with torch.device("meta"):
        model = family.build(config).to(dtype)
    model.states_in = states_in
    check_context(context, "the model", model.shape.context)
    context = context or model.shape.context
    drafter = drafters.choose("auto", model)
    return Sized(
        family.name,
        sum(weight.numel() for weight in model.parameters()),
        str(dtype).removeprefix("torch."),
        context,
        model.shape.vocabulary,
        drafter.name if drafter is not None else "off",
        needs(model, drafter, context=context, prefill_tokens=prefill_tokens),
    )


def needs(
    model: Decoder, drafter: Drafter | None = None, *, context: int, prefill_tokens: int
) -> Needs:
    """Of a model whose parameters have their dtype; they may be on the meta device."""
    specs, window = state_specs(model, drafter), 1 + (drafter.most if drafter is not None else 0)
    item, shape = model.dtype.itemsize, model.shape
    paged = any(spec.token for spec in specs)
    full = -(-(context + window) // PAGE_SIZE) if paged else 0
    slot = sum(spec.slot_bytes for spec in specs) + 8 * full
    if window > 1:
        slot += window * sum(spec.replay_bytes for spec in specs)
    slot += window * (shape.vocabulary + shape.width) * item  # where a step's scores lie
    return Needs(
        sum(weight.nbytes for weight in model.parameters())
        + (drafter.held_bytes() if drafter is not None else 0),
        slot,
        PAGE_SIZE * sum(spec.token_bytes for spec in specs),
        GRAPHS + prefill_tokens * item * (4 * shape.width + 3 * _widest(model)),
        full,
    )


def _widest(model: Decoder) -> int:
    """Numbers that the widest layer makes of a token: all its products' outputs."""
    return max(
        sum(part.out_features for part in block.modules() if isinstance(part, nn.Linear))
        for block in model.blocks
    )


def plan(
    needs: Needs,
    budget: int,
    *,
    slots: int | None = None,
    pages: int | None = None,
    prefix: int | None = None,
    vocabulary: int = 0,
) -> Plan:
    """Slots, pages and the prefix cache of `budget` bytes; what is given is kept as it is.

    Raises PrerequisiteError saying what does not fit, and what would.
    """
    free = budget - needs.weights - needs.work - needs.slot - needs.page
    if free <= 0:
        raise PrerequisiteError(
            f"{gib(needs.weights)} of weights and {gib(needs.work + needs.slot + needs.page)} to "
            f"work with do not fit into {gib(budget)}",
            "take a smaller model or another --device, or lower --prefill-tokens",
        )
    kept = prefix if prefix is not None else int(free * PREFIX_SHARE)
    left, each = free - kept, needs.slot + SAMPLED * vocabulary
    if slots is None:
        for_pages = pages * needs.page if pages is not None else 0
        for_slots = left - for_pages if not needs.full or pages else int(left * SLOTS_SHARE)
        slots = max(1, min(MOST_SLOTS, for_slots // each))
    left -= slots * each
    if pages is None:
        pages = min(slots * needs.full, max(left, 0) // needs.page) if needs.full else 0
    left -= pages * needs.page
    if left < 0 or pages < needs.full:
        raise PrerequisiteError(
            f"{slots} slots of {mib(each)} and {gib(max(pages, needs.full) * needs.page)} of keys "
            f"and values do not fit into the {gib(free - kept)} that the weights leave",
            _would_fit(needs, free - kept, each),
        )
    return Plan(slots, pages, kept, budget - left)


def _would_fit(needs: Needs, left: int, each: int) -> str:
    """What to ask for instead."""
    slots = (left - needs.full * needs.page) // each
    if slots >= 1:
        return f"{slots} slots would fit (--slots {slots}), or lower --context"
    pages = (left - each) // needs.page if needs.page else 0
    if pages > 1:
        return f"a context of {(pages - 1) * PAGE_SIZE} would fit (--context), with --slots 1"
    return "take a smaller model, --prefix-cache off, or raise --gpu-memory-utilization"


def gib(size: int) -> str:
    """In GiB, or in MiB where it is less than one."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else mib(size)


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"
