"""What scans with a decay per token and head have in common: heads, chunks, decays within them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens that are mixed at once; between chunks only the state is carried.
CHUNK = 64


def by_head(x: Tensor, heads: int, repeat: int = 1) -> Tensor:
    """[..., heads * D] -> [..., heads * repeat, D], each head `repeat` times in a row."""
    x = x.reshape(*x.shape[:-1], heads, -1)
    return x.repeat_interleave(repeat, dim=-2) if repeat > 1 else x


def split(x: Tensor) -> Tensor:
    """[B, T, H, …] -> [chunks, B, H, C, …], zeros behind T; C is CHUNK, or T where it is less."""
    length = x.shape[1]
    size = min(CHUNK, length)
    x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, -length % size))
    x = x.reshape(len(x), -1, size, *x.shape[2:])
    return x.transpose(0, 1).transpose(2, 3).contiguous()


def join(chunks: list[Tensor], length: int) -> Tensor:
    """The other way: each [B, H, C, D] -> [B, T, H, D]."""
    return torch.cat(chunks, dim=2)[:, :, :length].transpose(1, 2)


def decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """log_decay: [..., C], ≤ 0 -> its running sum, and the decay from token j to token i,
    [..., i, j], which is 0 for j > i."""
    total = log_decay.cumsum(-1)
    size = log_decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    between = total[..., :, None] - total[..., None, :]
    return total, between.masked_fill(later, float("-inf")).exp()


def initial_decay(heads: int) -> tuple[Tensor, Tensor]:
    """A_log and dt_bias ([heads] each) of an untrained model: rates from 1 to 16, and time steps
    softplus(dt_bias) from 0.001 to 0.1 (arXiv:2405.21060, as its authors' code begins)."""
    rate = torch.empty(heads).uniform_(1, 16)
    step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
    return rate.log(), step + (-torch.expm1(-step)).log()
