"""Qwen3.5's text model: transformers' logits, the released checkpoints' names, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from difyops.engine.load import load
from difyops.engine.mixers import GatedDelta, Softmax
from difyops.engine.models import family
from difyops.engine.request import SamplingDefaults
from difyops.errors import UsageError
from tests.engine import tiny
from tests.engine.oracle import IsTransformers, Oracle, ours

TINY: dict[str, Any] = {
    "model_type": "qwen3_5_text", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
}  # fmt: skip
#: A norm of nearly nothing multiplies rounding errors by 1 / √eps, in any implementation.
CONFIGS: dict[str, dict[str, Any]] = {
    "value heads in groups, Dk != Dv": {**TINY, "rms_norm_eps": 1e-2},
    "tied, mostly softmax, other rotary part": {
        **TINY, "tie_word_embeddings": True, "num_hidden_layers": 3, "linear_num_value_heads": 2,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "num_key_value_heads": 1, "rms_norm_eps": 1e-3, "linear_conv_kernel_dim": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_interleaved": True,
                            "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    },
    "attention bias, every second layer": {
        **TINY, "rms_norm_eps": 1e-3, "attention_bias": True, "num_hidden_layers": 2,
        "linear_num_value_heads": 6, "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**CONFIGS[request.param])
    return Oracle.of(Qwen3_5ForCausalLM(config), config.to_dict())


class TestTransformers(IsTransformers):
    """Their whole sequences in one pass."""


def test_at_the_released_eps_rounding_is_all_that_differs() -> None:
    """With an eps of 1e-6 float32 itself is further than 1e-5 from float64. Then we may be no
    further from it than transformers is."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**TINY)
    assert config.rms_norm_eps == 1e-6
    theirs = Qwen3_5ForCausalLM(config)
    oracle = Oracle.of(theirs, config.to_dict())
    exact = Oracle(ours(theirs, config.to_dict(), torch.float64), oracle.sequences, [])
    got, true = (o.prefill(dict(zip(o.start(), o.sequences, strict=True))) for o in (oracle, exact))
    for slot, wanted in zip(got, oracle.wanted, strict=True):
        far = [float((x - true[slot]).abs().max()) for x in (got[slot], wanted)]
        assert far[0] < 2 * far[1] + 1e-5 < 1e-2


@pytest.mark.parametrize("mtp", [True, False])
def test_a_released_checkpoint_is_loaded_from_its_files(
    mtp: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nested config, vision's tensors beside the text's, MTP weights kept; transformers saves a
    model without them, although its config still names them."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    folder = tiny.checkpoint(tmp_path / "model")
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 10
    config = json.loads(json.dumps(NESTED))
    config["text_config"] |= {"vocab_size": words, "eos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config["text_config"]))
    tensors = {"model.visual.patch_embed.proj.weight": torch.zeros(3)}
    tensors |= {name: torch.randn(shape) for name, shape in MTP.items()} if mtp else {}
    for name, tensor in theirs.model.state_dict().items():
        tensors[f"model.language_model.{name}"] = tensor.clone()
    save_file(tensors, str(folder / "model.safetensors"))
    loaded = load(folder)
    query = loaded.model.state_dict()["blocks.3.mixer.q_proj.weight"]
    assert torch.equal(query, tensors["model.language_model.layers.3.self_attn.q_proj.weight"])
    assert ("mtp" in loaded.model.extra) is mtp
    assert ("no weights for mtp" in caplog.text) is not mtp
    if mtp:
        assert torch.equal(loaded.model.extra["mtp"].fc.weight, tensors["mtp.fc.weight"])
    assert 5 in loaded.tokenizer.stop_ids
    assert loaded.sampling == SamplingDefaults(temperature=0.6, top_k=20)


def test_bf16_stays_near_float32() -> None:
    torch.manual_seed(0)
    decoder = family(TINY).build(TINY).requires_grad_(False)
    oracle = Oracle(decoder, [torch.arange(40) % 61], [])
    slot = oracle.start()[0]
    wanted = oracle.prefill({slot: oracle.sequences[0]})[slot]
    decoder.to(torch.bfloat16)
    slot = oracle.start()[0]
    oracle.prefill({slot: oracle.sequences[0][:39]})
    got = oracle.step({slot: oracle.sequences[0][39]})[slot]
    assert got.dtype == torch.bfloat16
    assert {t.dtype for t in oracle.pool.layers[0].slot.values()} == {torch.float32, torch.bfloat16}
    assert (got.float() - wanted[-1]).abs().max() < 0.05 * wanted.abs().max()


#: A released checkpoint's config.json, made small; it nests the text model and has MTP.
NESTED: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
    "tie_word_embeddings": True, "image_token_id": 60, "vision_config": {"depth": 2},
    "text_config": {
        **TINY, "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "dtype": "bfloat16", "full_attention_interval": 4, "hidden_act": "silu",
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 512, "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "partial_rotary_factor": 0.25,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [1, 1, 0],
                            "rope_type": "default", "rope_theta": 10000000,
                            "partial_rotary_factor": 0.25},
    },
}  # fmt: skip
HEADS, HEAD, KV, WIDTH, HIDDEN = 4, 16, 2, 24, 40
MTP = {
    "mtp.fc.weight": (WIDTH, 2 * WIDTH),
    "mtp.norm.weight": (WIDTH,),
    "mtp.pre_fc_norm_embedding.weight": (WIDTH,),
    "mtp.pre_fc_norm_hidden.weight": (WIDTH,),
    "mtp.layers.0.input_layernorm.weight": (WIDTH,),
    "mtp.layers.0.post_attention_layernorm.weight": (WIDTH,),
    "mtp.layers.0.self_attn.q_proj.weight": (2 * HEADS * HEAD, WIDTH),
    "mtp.layers.0.self_attn.k_proj.weight": (KV * HEAD, WIDTH),
    "mtp.layers.0.self_attn.v_proj.weight": (KV * HEAD, WIDTH),
    "mtp.layers.0.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
    "mtp.layers.0.self_attn.q_norm.weight": (HEAD,),
    "mtp.layers.0.self_attn.k_norm.weight": (HEAD,),
    "mtp.layers.0.mlp.gate_proj.weight": (HIDDEN, WIDTH),
    "mtp.layers.0.mlp.up_proj.weight": (HIDDEN, WIDTH),
    "mtp.layers.0.mlp.down_proj.weight": (WIDTH, HIDDEN),
}


def test_mtp_is_built_and_named_as_released() -> None:
    found = family(NESTED)
    decoder = found.build(NESTED)
    places = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert {found.rename(name): shape for name, shape in MTP.items()} == {
        name: shape for name, shape in places.items() if name.startswith("extra.")
    }
    assert isinstance(decoder.extra["mtp"].blocks[0].mixer, Softmax)
    without = {**NESTED["text_config"], "mtp_num_hidden_layers": 0}
    assert not found.build(without).extra


def test_a_nested_config_is_the_text_model() -> None:
    decoder = family(NESTED).build(NESTED)
    assert decoder.tied
    assert decoder.shape.context == 512
    kinds = [type(block.mixer) for block in decoder.blocks]
    assert kinds == [GatedDelta, GatedDelta, GatedDelta, Softmax]
    assert decoder.blocks[3].mixer.options.rope_theta == 10000000
    assert decoder.blocks[3].mixer.options.rotary_dim == 4


def test_names_of_checkpoints_with_and_without_vision() -> None:
    rename = family(NESTED).rename
    for prefix in ("model.", "model.language_model."):
        assert rename(f"{prefix}embed_tokens.weight") == "embed.weight"
        assert rename(f"{prefix}norm.weight") == "norm.weight"
        assert rename(f"{prefix}layers.12.linear_attn.A_log") == "blocks.12.mixer.A_log"
    assert rename("lm_head.weight") == "head.weight"
    assert rename("model.visual.blocks.0.attn.qkv.weight") is None
    for unknown in ("model.layers.0.mlp", "model.layers.x.mlp.up_proj.weight", "mtp.fc.bias", ""):
        with pytest.raises(KeyError):
            rename(unknown)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attn_output_gate", False),
        ("output_gate_type", "sigmoid"),
        ("num_experts", 8),
        ("sliding_window", 4096),
        ("mtp_use_dedicated_embeddings", True),
        ("hidden_size", 0),
        ("linear_conv_kernel_dim", 1),
        ("linear_num_value_heads", 3),
        ("num_key_value_heads", 3),
        ("rope_parameters.rope_type", "yarn"),
        ("rope_parameters", 3),
        ("rope_parameters.partial_rotary_factor", 0.2),
        ("layer_types.1", "chunked_attention"),
        ("layer_types", ["full_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_cannot_be_honoured_is_refused_by_key(
    key: str, value: Any, nested: bool
) -> None:
    config: dict[str, Any] = {**TINY, "layer_types": ["full_attention"] * 4}
    place, _, leaf = key.rpartition(".")
    if place == "layer_types":
        config[place][int(leaf)] = value
    elif place:
        config[place] = {leaf: value}
    else:
        config[key] = value
    if nested:
        config = {"model_type": "qwen3_5", "text_config": config}
    with pytest.raises(UsageError) as caught:
        family(config).build(config)
    where = "text_config." if nested else ""
    assert caught.value.message.startswith("config.json: ")
    assert f"{where}" in caught.value.message
    assert key.removesuffix(".1") in caught.value.message
    assert caught.value.hint


def test_a_missing_key_is_named() -> None:
    without = {key: value for key, value in TINY.items() if key != "head_dim"}
    with pytest.raises(UsageError, match=r"config\.json: head_dim: Field required"):
        family(without).build(without)
    with pytest.raises(UsageError, match=r"config\.json: text_config: 5: "):
        family(NESTED).build({**NESTED, "text_config": 5})
    with pytest.raises(UsageError, match=r"config\.json: quantization_config: "):
        family(NESTED).build({**NESTED, "quantization_config": {"quant_method": "fp8"}})
