"""What mixers and families share: norms, the gated MLP, rotary positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and states: float32, or float64 where everything is."""
    return torch.promote_types(dtype, torch.float32)


class RowNorm(NamedTuple):
    """An RMS norm as a kernel takes it: x / rms(x) * (weight + offset), weight [K]."""

    weight: Tensor
    eps: float
    offset: float = 0.0


class Fusible(nn.Module):
    """A module that has kernels for a GPU (kernels/). It uses them once `fuse` was called: from
    then on its weights stay where they are, and nothing is differentiated."""

    fused = False

    def fuse(self) -> None:
        self.fused = True


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """F.linear(norm(x)) of a fused module. With `onto` it is added to that, which may change."""
    from difyops.engine.kernels import product as kernel
    from difyops.engine.kernels.norm import rms_norm

    lines, width = weight.shape
    rows = x.numel() // width
    if norm is not None and not kernel.norms(rows, width):
        x, norm = rms_norm(x, norm, weight.dtype), None
    if kernel.suits(rows, lines):
        return kernel.row(x, weight, bias, norm=norm, onto=onto)
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    if onto is None:
        return F.linear(x, weight, bias)
    if bias is not None:
        return onto + F.linear(x, weight, bias)
    flat = onto.flatten(0, -2)
    if onto.dtype == weight.dtype:
        flat.addmm_(x.flatten(0, -2), weight.mT)
    else:
        torch.addmm(flat, x.flatten(0, -2), weight.mT, out_dtype=onto.dtype, out=flat)
    return onto


class Joined:
    """Linear layers that read the same input, as one product: their weights become views of one
    matrix, in the same memory."""

    def __init__(self, *layers: nn.Linear) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._weight = torch.cat([layer.weight.data for layer in layers])
        self._bias = None
        if layers[0].bias is not None:
            self._bias = torch.cat([layer.bias.data for layer in layers])
        for layer, part in zip(layers, torch.split(self._weight, self._sizes), strict=True):
            layer.weight.data = part

    def whole(self, x: Tensor, norm: RowNorm | None = None) -> Tensor:
        """[..., width] -> what all layers answer of norm(x), side by side."""
        return product(x, self._weight, self._bias, norm=norm)

    def gated(self, x: Tensor, norm: RowNorm | None = None) -> Tensor:
        """silu of what the first of two layers answers, times what the second does."""
        from difyops.engine.kernels import product as kernel
        from difyops.engine.kernels.norm import rms_norm, silu_product

        width = x.shape[-1]
        rows = x.numel() // width
        if rows > kernel.PAIR:
            return silu_product(self.whole(x, norm))
        if norm is not None and not kernel.norms(rows, width):
            x, norm = rms_norm(x, norm, self._weight.dtype), None
        return kernel.row(x, self._weight, self._bias, norm=norm, silu=True)

    def __call__(self, x: Tensor, norm: RowNorm | None = None) -> tuple[Tensor, ...]:
        return torch.split(self.whole(x, norm), self._sizes, dim=-1)


class Residual(Fusible):
    """A branch of a block. Once it has `taken` the block's norm in, it answers x + branch(norm(x))
    where it answered branch(x): neither the norm nor the addition is then a launch of its own, and
    x may change."""

    taken: RowNorm | None = None

    def take(self, norm: RMSNorm) -> None:
        self.taken = norm.over_rows

    def onto(self, x: Tensor) -> Tensor | None:
        """What the branch is added to, given its input."""
        return None if self.taken is None else x


class RMSNorm(Fusible):
    """x / rms(x) * (weight + offset), over the last dimension (arXiv:1910.07467).

    Qwen3.5 stores weights around 0, so its `offset` is 1. Answers in the weight's dtype: a
    residual stream may be wider than the layers it feeds.
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm."""
        x = x + delta
        return x, self(x)

    @property
    def over_rows(self) -> RowNorm:
        """As a kernel takes it."""
        return RowNorm(self.weight, self.eps, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            from difyops.engine.kernels.norm import rms_norm

            return rms_norm(x, self.over_rows, self.weight.dtype)
        h = x.to(wide(x.dtype))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            # Qwen3.5 multiplies before it rounds to the weight's dtype, Llama after.
            return (h * (self.weight.to(h.dtype) + self.offset)).to(self.weight.dtype)
        return h.to(self.weight.dtype) * self.weight


class GatedRMSNorm(Fusible):
    """rms_norm(x) * weight * silu(gate), or with `gate_first` rms_norm(x * silu(gate)) * weight.

    The last dimension is normed in `groups` parts. Computes in float32 or wider and answers in the
    gate's dtype: x may be wider than it.
    """

    def __init__(
        self, width: int, eps: float = 1e-6, *, groups: int = 1, gate_first: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.groups = groups
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if self.fused:
            from difyops.engine.kernels.norm import gated_norm

            rows = (x.flatten(0, -2), gate.flatten(0, -2))
            out = gated_norm(*rows, self.weight, self.eps, self.groups, self.gate_first)
            return out.view(gate.shape)
        h, opened = x.to(wide(x.dtype)), F.silu(gate.to(wide(gate.dtype)))
        if self.gate_first:
            h = h * opened
        h = h.reshape(*h.shape[:-1], self.groups, -1)
        h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        h = h * self.weight
        return (h if self.gate_first else h * opened).to(gate.dtype)


class GatedMLP(Residual):
    """down(silu(gate(x)) * up(x)): SwiGLU (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def fuse(self) -> None:
        if not self.fused:
            self._inward = Joined(self.gate_proj, self.up_proj)
        super().fuse()

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor
        if self.fused:
            gated = self._inward.gated(x, self.taken)
            return product(gated, self.down_proj.weight, self.down_proj.bias, onto=self.onto(x))
        down = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def rotary(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """Rotate the first 2 * len(inverse_frequencies) of each head's dimensions (arXiv:2104.09864).

    x: [..., H, D]; positions: [...]; the pairs are (i, i + half), as Hugging Face stores them.
    `scale` multiplies cosine and sine (YaRN's attention factor).
    """
    angles = positions.to(inverse_frequencies.dtype)[..., None] * inverse_frequencies
    cos = (angles.cos() * scale).to(x.dtype)[..., None, :]
    sin = (angles.sin() * scale).to(x.dtype)[..., None, :]
    half = inverse_frequencies.numel()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def inverse_frequencies(dims: int, theta: float) -> Tensor:
    """theta^(-2i / dims) for each of the dims / 2 pairs, float32 as checkpoints were trained."""
    steps = torch.arange(0, dims, 2, dtype=torch.int64, device="cpu").float() / dims
    return 1.0 / theta**steps
