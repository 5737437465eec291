"""Qwen3.5's language model: three layers of Gated DeltaNet to one of gated softmax attention.

Checkpoints with vision nest the text model's keys in `text_config` and hold its tensors under
`model.language_model.`; of those, the text model alone is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from difyops.engine.layers import GatedMLP, RMSNorm
from difyops.engine.mixers import GatedDelta, Mixer, Softmax
from difyops.engine.models import Family
from difyops.engine.models.config import read
from difyops.engine.models.decoder import Block, Decoder, Shape
from difyops.engine.models.mtp import MultiTokenPrediction
from difyops.engine.models.names import renamer

LayerType = Literal["linear_attention", "full_attention"]


class Rope(BaseModel):
    """`rope_parameters`. `mrope_section` says which dimensions turn with a picture's height and
    width; a text's tokens have one position, so there it changes nothing."""

    model_config = ConfigDict(extra="allow", frozen=True)

    rope_type: Literal["default", "mrope"] = "default"
    type: Literal["default", "mrope"] = "default"  # what rope_type was called before
    rope_theta: float = Field(10000.0, gt=0)
    partial_rotary_factor: float = Field(0.25, ge=0, le=1)


class Config(BaseModel):
    """The keys that change what is computed, with transformers' defaults."""

    model_config = ConfigDict(extra="allow", frozen=True)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(32768, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_parameters: Rope = Rope()
    linear_conv_kernel_dim: int = Field(4, gt=1)
    linear_key_head_dim: int = Field(gt=0)
    linear_value_head_dim: int = Field(gt=0)
    linear_num_key_heads: int = Field(gt=0)
    linear_num_value_heads: int = Field(gt=0)
    full_attention_interval: int = Field(4, gt=0)
    layer_types: list[LayerType] = Field(default_factory=list)
    mtp_num_hidden_layers: int = Field(0, ge=0)

    # What is served with one value only.
    hidden_act: Literal["silu"] = "silu"
    attn_output_gate: Literal[True] = True
    output_gate_type: Literal["swish", "silu"] = "swish"
    num_experts: Literal[0] | None = None
    sliding_window: None = None
    mtp_use_dedicated_embeddings: Literal[False] = False
    quantization_config: None = None

    @model_validator(mode="before")
    @classmethod
    def _older_keys(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """rope_theta and partial_rotary_factor once stood by themselves."""
        present = {key: value for key, value in raw.items() if value is not None}
        rope = present.get("rope_parameters", present.get("rope_scaling", {}))
        if isinstance(rope, Mapping):
            older = ("rope_theta", "partial_rotary_factor")
            rope = {**{key: present[key] for key in older if key in present}, **rope}
        return {**present, "rope_parameters": rope}

    @model_validator(mode="after")
    def _layers_agree(self) -> Self:
        given = len(self.layer_types)
        if given and given != self.num_hidden_layers:
            raise ValueError(f"layer_types: {given} of num_hidden_layers, {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads does not divide num_attention_heads")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError("linear_num_key_heads does not divide linear_num_value_heads")
        if self.rotary_dim % 2:
            raise ValueError(
                f"rope_parameters.partial_rotary_factor: {self.rotary_dim} of head_dim is odd"
            )
        return self

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def layers(self) -> list[LayerType]:
        every = self.full_attention_interval
        return self.layer_types or [
            "linear_attention" if i % every else "full_attention"
            for i in range(1, self.num_hidden_layers + 1)
        ]


class Outside(BaseModel):
    """What the config of a model with vision says beside its `text_config`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    text_config: dict[str, Any]
    tie_word_embeddings: bool | None = None
    quantization_config: None = None


def build(raw: Mapping[str, Any]) -> Decoder:
    """The module of a config, with `extra["mtp"]` where it has multi-token prediction.

    Raises UsageError naming a key that cannot be honoured.
    """
    config = read_config(raw)
    extra = nn.ModuleDict()
    if config.mtp_num_hidden_layers:
        blocks = [_block(config, "full_attention") for _ in range(config.mtp_num_hidden_layers)]
        extra["mtp"] = MultiTokenPrediction(config.hidden_size, blocks, lambda: _norm(config))
    return Decoder(
        Shape(config.hidden_size, config.vocab_size, config.max_position_embeddings),
        [_block(config, kind) for kind in config.layers],
        _norm(config),
        tied=config.tie_word_embeddings,
        extra=extra,
    )


def read_config(raw: Mapping[str, Any]) -> Config:
    """From a text model's config.json, or from that of one with vision. Raises UsageError."""
    if "text_config" not in raw:
        return read(Config, raw)
    outside = read(Outside, raw)
    text = dict(outside.text_config)
    if outside.tie_word_embeddings is not None:  # it counts for the whole model
        text["tie_word_embeddings"] = outside.tie_word_embeddings
    return read(Config, text, under="text_config.")


def _norm(config: Config) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)


def _block(config: Config, kind: LayerType) -> Block:
    mixer = _softmax(config) if kind == "full_attention" else _gated_delta(config)
    mlp = GatedMLP(config.hidden_size, config.intermediate_size)
    return Block(_norm(config), mixer, _norm(config), mlp)


def _softmax(config: Config) -> Mixer:
    options = Softmax.Options(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        rope_theta=config.rope_parameters.rope_theta,
        qk_norm=True,
        norm_eps=config.rms_norm_eps,
        norm_offset=1.0,
        gated=True,
        bias=config.attention_bias,
        output_bias=config.attention_bias,
    )
    return Softmax(config.hidden_size, options)


def _gated_delta(config: Config) -> Mixer:
    options = GatedDelta.Options(
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
    )
    return GatedDelta(config.hidden_size, options)


def _layer_names(there: str, here: str) -> dict[str, str | None]:
    layer, block = rf"{there}layers\.(\d+)\.", rf"{here}blocks.\1."
    return {
        rf"{layer}input_layernorm\.weight": rf"{block}mixer_norm.weight",
        rf"{layer}(?:linear_attn|self_attn)\.(.+)": rf"{block}mixer.\2",
        rf"{layer}post_attention_layernorm\.weight": rf"{block}mlp_norm.weight",
        rf"{layer}mlp\.(.+)": rf"{block}mlp.\2",
    }


_TEXT = r"model\.(?:language_model\.)?"

FAMILY = Family(
    "qwen3_5",
    build,
    renamer(
        {
            rf"{_TEXT}embed_tokens\.weight": "embed.weight",
            **_layer_names(_TEXT, ""),
            rf"{_TEXT}norm\.weight": "norm.weight",
            r"lm_head\.weight": "head.weight",
            r"model\.visual\..+": None,
            **_layer_names(r"mtp\.", "extra.mtp."),
            r"mtp\.((?:fc|norm|pre_fc_norm_embedding|pre_fc_norm_hidden)\.weight)": r"extra.mtp.\1",
        }
    ),
)
