"""Mamba-2 language models in Hugging Face's layout: mixers only, no MLP, no positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from difyops.engine.layers import RMSNorm
from difyops.engine.mixers import Mamba2
from difyops.engine.models import Family
from difyops.engine.models.config import read
from difyops.engine.models.decoder import Block, Decoder, Shape
from difyops.engine.models.names import renamer


class Config(BaseModel):
    """The keys that change what is computed, with transformers' defaults.

    `chunk_size` and the `time_step_*` other than the limit are for training. Released configs say
    `norm_before_gate: true` of models that gate first, and nobody reads it.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    expand: int = Field(2, gt=0)
    state_size: int = Field(gt=0)
    n_groups: int = Field(8, gt=0)
    conv_kernel: int = Field(4, gt=1)
    use_bias: bool = False
    use_conv_bias: bool = True
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False

    # What is served with one value only.
    hidden_act: Literal["silu"] = "silu"
    rms_norm: Literal[True] = True
    quantization_config: None = None

    @field_validator("time_step_limit", mode="before")
    @classmethod
    def _tagged_floats(cls, raw: object) -> object:
        """JSON has no infinity: transformers 5 writes {"__float__": "Infinity"}."""
        if not isinstance(raw, list | tuple):
            return raw
        return [limit.get("__float__") if isinstance(limit, dict) else limit for limit in raw]

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        inner = self.num_heads * self.head_dim
        if self.expand * self.hidden_size != inner:
            raise ValueError(f"expand * hidden_size is not num_heads * head_dim, {inner}")
        if self.num_heads % self.n_groups:
            raise ValueError(f"n_groups does not divide num_heads, {self.num_heads}")
        low, high = self.time_step_limit
        if not 0 <= low < high:
            raise ValueError(f"time_step_limit: {low} to {high} is no range of time steps")
        return self


#: In tokens. Such a config names none, and the state has no limit of its own; this is the longest
#: context that a released model was tested at.
CONTEXT = 1 << 18


def build(raw: Mapping[str, Any]) -> Decoder:
    """The module of a config. Raises UsageError naming a key that cannot be honoured."""
    config = read(Config, raw)
    return Decoder(
        Shape(config.hidden_size, config.vocab_size, CONTEXT),
        [Block(_norm(config), _mixer(config)) for _ in range(config.num_hidden_layers)],
        _norm(config),
        tied=config.tie_word_embeddings,
        wide_residual=config.residual_in_fp32,
    )


def _norm(config: Config) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.layer_norm_epsilon)


def _mixer(config: Config) -> Mamba2:
    low, high = config.time_step_limit
    options = Mamba2.Options(
        heads=config.num_heads,
        head_dim=config.head_dim,
        state_dim=config.state_size,
        groups=config.n_groups,
        conv_width=config.conv_kernel,
        conv_bias=config.use_conv_bias,
        bias=config.use_bias,
        dt_min=low,
        dt_max=high,
        norm_eps=config.layer_norm_epsilon,
    )
    return Mamba2(config.hidden_size, options)


FAMILY = Family(
    "mamba2",
    build,
    renamer(
        {
            r"backbone\.embeddings?\.weight": "embed.weight",
            r"backbone\.layers\.(\d+)\.norm\.weight": r"blocks.\1.mixer_norm.weight",
            r"backbone\.layers\.(\d+)\.mixer\.(.+)": r"blocks.\1.mixer.\2",
            r"backbone\.norm_f\.weight": "norm.weight",
            r"lm_head\.weight": "head.weight",
        }
    ),
)
