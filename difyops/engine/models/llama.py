"""Llama (arXiv:2302.13971, 2407.21783) and what has its shape: SmolLM2, TinyLlama and others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from difyops.engine.layers import GatedMLP, RMSNorm, inverse_frequencies
from difyops.engine.mixers.softmax import Frequencies, Softmax
from difyops.engine.models import Family
from difyops.engine.models.config import read
from difyops.engine.models.decoder import Block, Decoder, Shape


class Rope(BaseModel):
    """`rope_parameters` (transformers 5) or `rope_scaling` (before) of config.json."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rope_type: Literal["default"] = "default"
    rope_theta: float | None = Field(None, gt=0)
    partial_rotary_factor: float = Field(1.0, ge=1, le=1)

    def scaled(self, inverse: Tensor) -> Tensor:
        """The inverse frequencies ([D / 2]) after this scaling."""
        return inverse


class Linear(Rope):
    """Positions are divided (arXiv:2306.15595)."""

    rope_type: Literal["linear"]  # type: ignore[assignment]
    factor: float = Field(gt=0)

    def scaled(self, inverse: Tensor) -> Tensor:
        return inverse / self.factor


class Llama3(Rope):
    """Long waves are stretched by `factor`, short ones kept, those between interpolated
    (arXiv:2407.21783; the formula is that of Meta's model code)."""

    rope_type: Literal["llama3"]  # type: ignore[assignment]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    def scaled(self, inverse: Tensor) -> Tensor:
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * (kept + (1 - kept) / self.factor)


class Factors(Rope):
    """A divisor for each frequency: how a GGUF file says it."""

    rope_type: Literal["factors"]  # type: ignore[assignment]
    factors: tuple[float, ...]

    def scaled(self, inverse: Tensor) -> Tensor:
        return inverse / torch.tensor(self.factors, dtype=inverse.dtype, device=inverse.device)


def _typed(raw: object) -> object:
    """Old configs say `type`, and the plain kind may be left out."""
    return {"rope_type": raw.get("type", "default"), **raw} if isinstance(raw, dict) else raw


AnyRope = Annotated[
    Rope | Linear | Llama3 | Factors, Field(discriminator="rope_type"), BeforeValidator(_typed)
]


class Config(BaseModel):
    """config.json of a Llama; keys that change nothing here are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0, multiple_of=2)
    max_position_embeddings: int = Field(2048, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_parameters: AnyRope | None = None
    rope_scaling: AnyRope | None = None
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: None = None
    quantization_config: None = None

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        heads = self.num_attention_heads
        if heads % (self.num_key_value_heads or heads):
            raise ValueError(f"num_key_value_heads does not divide num_attention_heads, {heads}")
        if self.head_dim is None and self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size is not an even multiple of num_attention_heads, {heads}")
        rope = self.rope
        if isinstance(rope, Factors) and len(rope.factors) * 2 != self.head_width:
            raise ValueError(f"rope factors: {len(rope.factors)} for {self.head_width} dimensions")
        return self

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> Rope:
        return self.rope_parameters or self.rope_scaling or Rope()


def build(raw: Mapping[str, Any]) -> Decoder:
    """The module of a config. Raises UsageError naming the key that cannot be honoured."""
    config = read(Config, raw)
    shape = Shape(config.hidden_size, config.vocab_size, config.max_position_embeddings)
    blocks = [_block(config) for _ in range(config.num_hidden_layers)]
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    return Decoder(shape, blocks, norm, tied=config.tie_word_embeddings)


def _block(config: Config) -> Block:
    theta = config.rope.rope_theta or config.rope_theta
    width = config.hidden_size
    mixer = Softmax(
        width,
        Softmax.Options(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_width,
            rotary_dim=config.head_width,
            rope_theta=theta,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
        ),
    )
    mixer.frequencies = Frequencies(
        config.rope.scaled(inverse_frequencies(config.head_width, theta))
    )
    return Block(
        RMSNorm(width, config.rms_norm_eps),
        mixer,
        RMSNorm(width, config.rms_norm_eps),
        GatedMLP(width, config.intermediate_size, bias=config.mlp_bias),
    )


_OUTSIDE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_PARTS = {
    "input_layernorm": "mixer_norm",
    "self_attn": "mixer",
    "post_attention_layernorm": "mlp_norm",
    "mlp": "mlp",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(.+)\Z")


def rename(name: str) -> str | None:
    """See models.Family."""
    if found := _LAYER.match(name):
        layer, part, rest = found.groups()
        if rest == "rotary_emb.inv_freq":  # old checkpoints carry what the config says
            return None
        return f"blocks.{layer}.{_PARTS[part]}.{rest}"
    return _OUTSIDE[name]


FAMILY = Family("llama", build, rename)
