"""The forms that training runs: whole sequences without a state, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.engine.gates import EXACT, KINDS, LENGTHS, Bench, error, tokens
from tests.engine.runs import Run


@pytest.mark.parametrize("length", LENGTHS)
def test_forward_is_the_reference(kind: tuple[str, dict[str, Any]], length: int) -> None:
    mixer = Bench.of(*kind).mixer
    both = torch.stack((tokens(length), tokens(length, seed=2)))
    wanted = torch.stack([mixer.reference(x) for x in both])
    assert error(mixer(both), wanted) < EXACT


@pytest.mark.parametrize("length", [3, 66])
def test_gradients_are_those_of_the_function(kind: tuple[str, dict[str, Any]], length: int) -> None:
    """Against differences, in a random direction; and every parameter has one."""
    mixer = Bench.of(*kind).mixer
    x = tokens(length)[None].requires_grad_()
    for parameter in mixer.parameters():
        parameter.requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    into = torch.randn_like(x)

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))
        return (out * into).sum()

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    gradients = torch.autograd.grad(function(x, *parameters), parameters)
    assert [n for n, g in zip(names, gradients, strict=True) if not g.abs().max() > 0] == []


def test_a_large_key_to_come_leaves_gradients_finite() -> None:
    mixer = Bench.of(*KINDS["linear-exp"], dtype=torch.float32).mixer
    x = tokens(20, dtype=torch.float32)[None].clone()
    x[0, 12] *= 400
    x.requires_grad_()
    mixer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", tiny.PATTERNS)
def test_a_model_reads_whole_sequences_as_it_reads_prompts(kind: str) -> None:
    model, _ = tiny.model(kind, dtype=torch.float64)
    words = torch.randint(0, 96, (2, 70), generator=torch.Generator().manual_seed(1))
    run = Run.of(model)
    wanted = torch.stack([run.prefill(run.slot(), row.tolist()) for row in words])
    assert error(model.logits(model(words)), wanted) < EXACT
