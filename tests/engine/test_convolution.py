"""The convolution's tail is state: the gates must notice when it is dropped or misplaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from difyops.engine.mixers.convolution import ShortConvolution
from tests.engine import test_mixers as gates

KINDS = [kind for kind in gates.KINDS.values() if kind[0] in ("gated_delta", "mamba2")]
Gate = Callable[[tuple[str, dict[str, object]]], None]


def goes_on(kind: tuple[str, dict[str, object]]) -> None:
    gates.test_prefill_goes_on_where_it_stopped(kind)


def steps(kind: tuple[str, dict[str, object]]) -> None:
    gates.test_steps_are_the_prefill(kind, 15, torch.float64, gates.EXACT)


def rejects(kind: tuple[str, dict[str, object]]) -> None:
    gates.test_a_rejected_draft_leaves_no_trace(kind, 5)


def dropped(seen: Tensor, tail: Tensor, lengths: Tensor) -> Tensor:
    return torch.zeros_like(tail)


def unmoved(seen: Tensor, tail: Tensor, lengths: Tensor) -> Tensor:
    return tail


def behind_the_draft(seen: Tensor, tail: Tensor, lengths: Tensor) -> Tensor:
    """As if all tokens had been accepted, and none were padding."""
    return seen[..., -tail.shape[-1] :]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
@pytest.mark.parametrize(
    ("form", "wrong", "gate"),
    [
        ("scan", dropped, goes_on),
        ("scan", dropped, rejects),
        ("scan", unmoved, goes_on),
        ("scan", behind_the_draft, goes_on),
        ("scan", behind_the_draft, rejects),
        ("recur", dropped, steps),
        ("recur", unmoved, steps),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_tail_does_not_pass(
    kind: tuple[str, dict[str, object]],
    form: str,
    wrong: Callable[[Tensor, Tensor, Tensor], Tensor],
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    right = getattr(ShortConvolution, form)

    def patched(
        self: ShortConvolution, x: Tensor, tail: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = x[..., None] if lengths is None else x.transpose(1, 2)
        counts = torch.ones(len(x)) if lengths is None else lengths
        out, _ = right(self, x, tail) if lengths is None else right(self, x, tail, lengths)
        return out, wrong(torch.cat((tail, rows), dim=-1), tail, counts)

    gate(kind)
    monkeypatch.setattr(ShortConvolution, form, patched)
    with pytest.raises(AssertionError):
        gate(kind)
