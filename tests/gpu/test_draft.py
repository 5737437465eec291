"""Kernels beside the model in a pass with guesses, against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difyops.engine import windows
from difyops.engine.layers import RMSNorm
from tests.gpu.test_kernels import DEVICE, close, random

draft = pytest.importorskip("difyops.engine.kernels.draft")
product = pytest.importorskip("difyops.engine.kernels.product")


@pytest.mark.parametrize("k", [1, 3])
def test_places_that_count_are_those_of_the_plain_form(k: int) -> None:
    dice, rows = torch.Generator().manual_seed(k), 40
    best = torch.randint(3, (rows, 1 + k), generator=dice)
    guesses, room = best[:, :k].clone(), torch.randint(5, (rows,), generator=dice)
    spoiled = torch.rand(guesses.shape, generator=dice) < 0.3
    guesses[spoiled] = torch.randint(-1, 3, (int(spoiled.sum()),), generator=dice)
    stops = torch.randint(-1, 12, (4, rows), generator=dice).T
    answers, last = torch.zeros(rows, 3 + 2 * k, dtype=torch.int64)[:, : 2 + 2 * k], room.clone()
    asked = [t.to(DEVICE) for t in (guesses, best, room, stops)]
    got, ends = torch.zeros(3 + 2 * k, rows, dtype=torch.int64, device=DEVICE).T, last.to(DEVICE)
    windows.judge(guesses, best, room, stops, answers, last)
    windows.judge(*asked, got[:, : 2 + 2 * k], ends, fused=True)
    assert got[:, : 2 + 2 * k].tolist() == answers.tolist()
    assert not got[:, -1].any()
    assert ends.tolist() == last.tolist()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("moved", [False, True])
def test_what_a_module_reads(offset: float, moved: bool) -> None:
    width, slots = 40, torch.tensor([3, 1, 0], device=DEVICE)
    norms = [
        RMSNorm(width, offset=offset).double().to(DEVICE).requires_grad_(False) for _ in range(2)
    ]
    for number, norm in enumerate(norms):
        norm.weight.data.add_(0.1 * random(width, seed=number))
    window = torch.randint(11, (3, 7), device=DEVICE)[:, 1:4]
    embedding, kept, rest = random(11, width), random(5, width, seed=1), random(3, 3, width, seed=2)
    accepted = torch.tensor([3, 1, 0], device=DEVICE)
    hidden = torch.cat((kept[slots][:, None], rest[:, :2]), dim=1)
    wanted = torch.cat((norms[0](embedding[window]), norms[1](hidden)), dim=-1)
    now = kept.float().clone()
    got = draft.paired(
        window, embedding.float(), now, slots, rest.float(), norms[0].weight.float(),
        norms[1].weight.float(), 1e-6, offset, accepted if moved else None,
    )  # fmt: skip
    close(got, wanted)
    if moved:
        kept[3], kept[1] = rest[0, 2], rest[1, 0]
    close(now, kept)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_rough_head_guesses_as_its_weights_do(count: int) -> None:
    # Triton's interpreter does not get from eight bits to bfloat16.
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    weight, x = random(1000, 160).to(kind), random(count, 160, seed=1).to(kind)
    rough, scales = product.quantised(weight)
    out = torch.zeros(count, 3, dtype=torch.int64, device=DEVICE)
    draft.likeliest(x, rough, scales, out[:, 1:2])
    logits: Tensor = x.double() @ (rough.double() * scales[:, None].double()).T
    chosen = logits.gather(1, out[:, 1:2])[:, 0]
    assert bool((logits.max(-1).values - chosen < 1e-3 * logits.abs().max()).all())
    close(rough.double() * scales[:, None], weight.double(), 0.07)
