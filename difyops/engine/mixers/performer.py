"""Performer: softmax attention by positive random features, FAVOR+ (arXiv:2009.14794)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from difyops.engine.mixers import sums
from difyops.engine.mixers.base import Carry, Inputs
from difyops.engine.mixers.heads import HeadMixer, HeadOptions
from difyops.engine.state import StateSpec


class Performer(HeadMixer):
    """Linear attention with φ(x) = M^(-1/2) exp(-|x|²/2) [exp(ω_f · x)] for f < M, x scaled by
    Dk^(-1/4): E φ(q)ᵀφ(k) = exp(qᵀk / √Dk) (lemma 1).

    The features stay logarithms, and each is summed relative to its largest key so far (sums.py).
    That changes nothing, whatever the norms, so there is no ε. ω is drawn once and belongs to the
    checkpoint: a model is never served with other features than it was trained with.
    """

    class Options(HeadOptions):
        """`features`: M; `seed`: that of ω, for a model that is not loaded. `rotary_dim`: queries
        and keys are turned first, so it is rotary softmax attention that is approximated."""

        features: int = Field(gt=0)
        seed: int = 0

    options: Options
    projection: Tensor  # ω: [M, Dk]

    def __init__(self, width: int, options: Options) -> None:
        super().__init__(width, options)
        drawn = projection(options.features, options.head_dim, options.seed)
        self.register_buffer("projection", drawn.to(torch.get_default_dtype()))

    def state_spec(self) -> StateSpec:
        slot = sums.log_spec(self.kv_heads, self.options.features, self.value_dim, self.state_dtype)
        return StateSpec(slot=slot, replay=self.replay_spec())

    def scan(self, inputs: Inputs, carry: Carry, lengths: Tensor) -> tuple[Tensor, Carry]:
        return sums.log_scan(*self._logs(inputs), inputs["v"], carry, lengths)

    def recur(self, inputs: Inputs, carry: Carry) -> tuple[Tensor, Carry]:
        return sums.log_recur(*self._logs(inputs), inputs["v"], carry)

    def reference(self, x: Tensor) -> Tensor:
        inputs = self.project(x, torch.arange(x.shape[0], device=x.device))
        k, v = self.per_query_head(inputs["k"]), self.per_query_head(inputs["v"])
        q, k = (log_features(t, self.projection).exp() for t in (inputs["q"], k))
        weights = torch.einsum("thm,shm->hts", q, k).tril()
        out = torch.einsum("hts,shd->thd", weights / weights.sum(-1, keepdim=True), v)
        return self.emit(out, x)

    def _logs(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        # In the weights' dtype an exponent of 100 would be off by a factor.
        q, k, rows = (t.to(self.state_dtype) for t in (inputs["q"], inputs["k"], self.projection))
        return log_features(q, rows), log_features(k, rows)


def log_features(x: Tensor, projection: Tensor) -> Tensor:
    """log φ(x): x [..., Dk] and ω [M, Dk] -> [..., M]."""
    features, dim = projection.shape
    x = x * dim**-0.25
    return x @ projection.T - x.square().sum(-1, keepdim=True) / 2 - math.log(features) / 2


def projection(features: int, dim: int, seed: int) -> Tensor:
    """ω: [features, dim], float64. The rows of each block of `dim` are orthogonal, each by itself
    is a standard normal vector: its direction is uniform, its length χ-distributed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    directions, triangle = torch.linalg.qr(normal(-(-features // dim), dim, dim))
    # QR by itself prefers some directions; with a positive diagonal it has none.
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = normal(features, dim).norm(dim=-1, keepdim=True)
    rows: Tensor = directions.mT.flatten(0, 1)[:features] * lengths
    return rows
