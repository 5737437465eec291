"""DiagAttention of TransNormer: softmax attention inside blocks (arXiv:2210.10340)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difyops.engine.mixers.base import Carry, Inputs, within_length
from difyops.engine.mixers.heads import HeadMixer, HeadOptions
from difyops.engine.state import StateSpec, TensorSpec


class Diag(HeadMixer):
    """The token at position p sees the positions from ⌊p / block⌋ · block to p.

    The state is the current block's keys and values, each at its position modulo the block; what
    stands behind the sequence's length there is older and hidden. It is no sum, so it has the
    parameters' dtype.
    """

    class Options(HeadOptions):
        """`block`: in positions."""

        block: int = Field(64, gt=0)

    options: Options

    def state_spec(self) -> StateSpec:
        replay = self.replay_spec()
        block = self.options.block
        slot = {name: TensorSpec((block, *replay[name].shape), replay[name].dtype) for name in "kv"}
        return StateSpec(slot=slot, replay=replay | {"at": TensorSpec((), torch.int64)})

    #: A block's end is known by it.
    positional = True

    def project(self, x: Tensor, positions: Tensor) -> Inputs:
        """q, k and v, and `at`: the place in the block."""
        return super().project(x, positions) | {"at": positions % self.options.block}

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        """All blocks at once, in a layout where each begins at a block's border: the carry's
        tokens first, then ours."""
        block, count = self.options.block, inputs["at"].shape[1]
        before = inputs["at"][:, 0]
        blocks = -(-(block - 1 + count) // block)
        token = torch.arange(blocks * block, device=before.device) - before[:, None]
        ours = (token >= 0) & within_length(lengths, blocks * block).gather(1, token.clamp(min=0))
        token = token.clamp(0, count - 1)

        def laid_out(name: str, under: Tensor | None = None) -> Tensor:
            """[B, T, …] -> [B, blocks, block, …]; `under` is what is not ours."""
            rows = _pick(inputs[name], token)
            if under is not None:
                rows = torch.where(ours[..., None, None], rows, under.repeat(1, blocks, 1, 1))
            return rows.view(len(rows), blocks, block, *rows.shape[2:])

        q, k, v = laid_out("q"), laid_out("k", carry["k"]), laid_out("v", carry["v"])
        out = _causal(q, k, v).flatten(1, 2)
        place = before[:, None] + torch.arange(count, device=before.device)
        last = (before + lengths - 1).clamp(min=0) // block
        row = torch.arange(len(before), device=before.device)
        return _pick(out, place), {"k": k[row, last], "v": v[row, last]}

    def forward(self, x: Tensor) -> Tensor:
        """Every sequence begins with a block, so that the blocks are a mere reshape."""
        batch, count = x.shape[:2]
        inputs = self.project(x, torch.arange(count, device=x.device))
        behind, blocks = -count % self.options.block, (batch, -1, self.options.block)
        padded = (F.pad(inputs[name], (0, 0, 0, 0, 0, behind)) for name in "qkv")
        q, k, v = (t.reshape(*blocks, *t.shape[2:]) for t in padded)
        return self.emit(_causal(q, k, v).flatten(1, 2)[:, :count], x)

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        at = inputs["at"][:, None]
        reach = torch.arange(self.options.block, device=at.device)
        here = (reach == at)[..., None, None]
        k, v = (torch.where(here, inputs[name][:, None], carry[name]) for name in "kv")
        qh, kh, vh = (t.transpose(1, 2) for t in (inputs["q"][:, None], k, v))
        allowed = (reach <= at)[:, None, None]
        out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=allowed, enable_gqa=True)
        return out[:, :, 0], {"k": k, "v": v}

    def reference(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[0], device=x.device)
        inputs, block = self.project(x, positions), positions // self.options.block
        k, v = self.per_query_head(inputs["k"]), self.per_query_head(inputs["v"])
        allowed = (block[:, None] == block) & (positions[:, None] >= positions)
        qh, kh, vh = (t.transpose(0, 1) for t in (inputs["q"], k, v))
        out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=allowed)
        return self.emit(out.transpose(0, 1), x)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within each block: q, k, v [B, blocks, block, H or Hkv, D] -> the same shape."""
    qh, kh, vh = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(*q.shape[:4], v.shape[-1])


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """x: [B, T, …], rows: [B, N] -> [B, N, …]."""
    return x[torch.arange(len(x), device=x.device)[:, None], rows]
