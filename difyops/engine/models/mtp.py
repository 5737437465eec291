"""Multi-token prediction: small modules that guess the tokens behind the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from difyops.engine.layers import RMSNorm, product
from difyops.engine.models.decoder import Block, Decoder, Run
from difyops.engine.state import LayerState


class MultiTokenPrediction(nn.Module):
    """One module (arXiv:2412.19437, section 2.2; the idea: arXiv:2404.19737).

    The module of depth d, from 1 on, turns h[d - 1] at place i and the embedding e of token i + d
    into h[d] at i: fc(concat(pre_fc_norm_embedding(e), pre_fc_norm_hidden(h[d - 1]))) goes through
    `blocks` and `norm`, and the model's own head makes logits of token i + d + 1 of it. h[0] is the
    model's final-normed hidden state. e comes first, as in every released checkpoint and the
    reverse of the paper. For guesses beyond the last depth a module's output stands in for its h.
    """

    blocks: Sequence[Block]

    def __init__(self, width: int, blocks: Sequence[Block], norm: Callable[[], RMSNorm]) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = norm()
        self.pre_fc_norm_hidden = norm()
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = norm()

    def forward(
        self, embedded: Tensor, hidden: Tensor, run: Run, layers: Sequence[LayerState | None]
    ) -> Tensor:
        """embedded, hidden: [..., width], e and h[d - 1] of each place -> h[d], [..., width]."""
        return self.through(self.paired(embedded, hidden), run, layers)

    def paired(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What fc reads: [..., 2 width]."""
        both = (self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden))
        return torch.cat(both, dim=-1)

    def through(self, x: Tensor, run: Run, layers: Sequence[LayerState | None]) -> Tensor:
        """What follows `paired`: [..., 2 width] -> h[d]."""
        x = self._joined(x)
        for block, state in zip(self.blocks, layers, strict=True):
            x = block(x, run, state)
        normed: Tensor = self.norm(x)
        return normed

    def note(self, x: Tensor, run: Run, note: Run, layers: Sequence[LayerState | None]) -> None:
        """`through` for its blocks' states alone; `note` is the run of the last one's mixer."""
        x = self._joined(x)
        *before, (last, kept) = zip(self.blocks, layers, strict=True)
        for block, state in before:
            x = block(x, run, state)
        last.note(x, note, kept)

    def _joined(self, x: Tensor) -> Tensor:
        """[..., 2 width] -> [..., width]."""
        joined: Tensor = product(x, self.fc.weight) if self.norm.fused else self.fc(x)
        return joined


def modules(model: Decoder) -> list[MultiTokenPrediction]:
    """A model's modules by depth; empty when it has none."""
    found = dict(model.extra.items()).get("mtp", ())
    return [found] if isinstance(found, MultiTokenPrediction) else list(found)  # type: ignore[arg-type]


class MedusaHead(nn.Module):
    """x + silu(linear(x)), then a head of its own over the vocabulary (arXiv:2401.10774)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> logits [..., V]."""
        logits: Tensor = self.head(hidden + nn.functional.silu(self.linear(hidden)))
        return logits
