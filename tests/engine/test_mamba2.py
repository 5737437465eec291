"""Mamba-2: transformers' logits, Hugging Face's names, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from difyops.engine.models import family
from difyops.engine.models.decoder import Decoder
from difyops.errors import UsageError
from tests.engine.oracle import IsTransformers, Oracle, ours, randomise

TINY: dict[str, Any] = {
    "model_type": "mamba2", "vocab_size": 61, "hidden_size": 20, "num_hidden_layers": 3,
    "num_heads": 8, "head_dim": 5, "state_size": 6, "n_groups": 2, "expand": 2, "chunk_size": 32,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "two groups": TINY,
    "tied, one group, biases, another width": {
        **TINY, "n_groups": 1, "use_bias": True, "tie_word_embeddings": True, "conv_kernel": 3,
        "state_size": 7, "layer_norm_epsilon": 1e-6,
    },
    "limited steps, no convolution bias": {
        **TINY, "n_groups": 4, "use_conv_bias": False, "time_step_limit": [0.05, 0.4],
        "residual_in_fp32": False,
    },
}  # fmt: skip


def hugging_face(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' model and its config.json."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    made = Mamba2Config(**config)
    return Mamba2ForCausalLM(made), made.to_dict()


@pytest.fixture(scope="module", params=CONFIGS)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle.of(*hugging_face(CONFIGS[request.param]))


class TestTransformers(IsTransformers):
    """Its own steps forget time_step_limit; its one pass, which is compared with, does not."""


@pytest.mark.parametrize("kept", [True, False])
def test_bf16_stays_near_float32_and_the_residual_is_what_the_config_says(kept: bool) -> None:
    model, config = hugging_face({**TINY, "residual_in_fp32": kept})
    randomise(model)
    tokens = torch.arange(50) % 61

    def logits(decoder: Decoder) -> torch.Tensor:
        run = Oracle(decoder, [], [])
        slot = run.start()[0]
        run.prefill({slot: tokens[:49]})
        return run.step({slot: tokens[49]})[slot]

    decoder, seen = ours(model, config, torch.bfloat16), set()
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    got, wanted = logits(decoder), logits(ours(model, config))
    assert seen == {torch.float32 if kept else torch.bfloat16}
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_infinity_is_read_in_both_spellings() -> None:
    """JSON's dialects: Python's Infinity, and transformers 5's tag."""
    for infinity in (math.inf, {"__float__": "Infinity"}):
        config = {**TINY, "time_step_limit": [0.25, infinity]}
        options = family(config).build(config).blocks[0].mixer.options
        assert (options.dt_min, options.dt_max) == (0.25, math.inf)


def test_an_old_name_of_the_embedding() -> None:
    rename = family(TINY).rename
    assert rename("backbone.embedding.weight") == rename("backbone.embeddings.weight")
    for unknown in ("backbone.layers.0.norm.bias", "embeddings.weight", "backbone.layers.0.mlp"):
        with pytest.raises(KeyError):
            rename(unknown)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rms_norm", False),
        ("num_heads", 7),
        ("n_groups", 3),
        ("time_step_limit", [0.5, 0.5]),
        ("time_step_limit", [0.5]),
        ("time_step_limit", {"__float__": "NaN"}),
        ("conv_kernel", 1),
        ("state_size", "many"),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_key(key: str, value: Any) -> None:
    config = {**TINY, key: value}
    with pytest.raises(UsageError) as caught:
        family(config).build(config)
    assert caught.value.message.startswith("config.json: ")
    assert key in caught.value.message
    assert caught.value.hint
