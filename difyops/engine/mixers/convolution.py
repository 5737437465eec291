"""The short causal convolution in front of Gated DeltaNet's and Mamba-2's recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difyops.engine.kernels.spans import Spans


class ShortConvolution(nn.Conv1d):
    """silu(convolution over the last `width` tokens), each of the C channels by itself.

    What a sequence keeps is its tail, the last width - 1 raw inputs: [C, width - 1]. The weight is
    [C, 1, width], as checkpoints store it.
    """

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    @property
    def tail_shape(self) -> tuple[int, int]:
        return self.in_channels, self.kernel_size[0] - 1

    def scan(self, x: Tensor, tail: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, C], tail: [B, C, width - 1], lengths: [B] -> [B, T, C] and the tail after
        each sequence's length."""
        seen = torch.cat((tail, x.transpose(1, 2)), dim=-1)
        out = F.silu(self(seen)).transpose(1, 2)
        last = lengths[:, None] + torch.arange(tail.shape[-1], device=x.device)
        return out, seen.gather(-1, last[:, None].expand_as(tail))

    def recur(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, C], tail: [B, C, width - 1] -> [B, C] and the new tail."""
        seen = torch.cat((tail, x[..., None]), dim=-1)
        return F.silu(self(seen))[..., 0], seen[..., 1:]

    def advance(self, x: Tensor, tails: Tensor, slots: Tensor, spans: Spans) -> Tensor:
        """recur for each token of each span, the tails of `slots` ([B]) changed where they lie:
        x [N, C], tails [slots + 1, C, width - 1] -> [N, C]."""
        from difyops.engine.kernels import convolution as kernel

        return kernel.run(x, self.weight, self.bias, tails, slots, spans)

    def reference(self, x: Tensor) -> Tensor:
        """A whole sequence, [T, C] -> [T, C], one token and tap after the other."""
        taps = self.weight[:, 0].unbind(-1)
        out = torch.zeros_like(x) if self.bias is None else self.bias.expand_as(x).clone()
        for t in range(len(x)):
            for back, tap in enumerate(reversed(taps)):
                if back <= t:
                    out[t] += tap * x[t - back]
        return F.silu(out)
