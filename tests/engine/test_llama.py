"""Llama against transformers' own, from files that transformers wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from difyops.engine.layout import read_json
from difyops.engine.models import family
from difyops.engine.weights import Checkpoint, fill
from difyops.errors import UsageError

from .runs import Run

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
#: What each one is there for is in its name.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "wide heads, tied": {"head_dim": 22, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 32},
}


SMALL = {
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(folder: Path, **change: Any) -> LlamaForCausalLM:
    """A random Llama, saved in several shards."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**(options | change))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin as ones and zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="40kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Run:
    config = read_json(folder / "config.json")
    kind = family(config)
    with torch.device("meta"):
        model = kind.build(config)
    fill(model, Checkpoint(folder), kind.rename, dtype)
    return Run.of(model)


@pytest.fixture(params=CONFIGS, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Run, LlamaForCausalLM]]:
    folder = tmp_path_factory.mktemp("llama")
    model = make(folder, **CONFIGS[request.param])
    yield ours(folder), model


def expected(model: LlamaForCausalLM, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(131, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [1, 15, 64, 65])
def test_prefill(pair: tuple[Run, LlamaForCausalLM], length: int) -> None:
    run, model = pair
    slot = run.slot()
    close(run.prefill(slot, tokens(length)), expected(model, tokens(length)))
    run.pool.release(slot)


def test_step_and_verify_go_on_from_a_prefill(pair: tuple[Run, LlamaForCausalLM]) -> None:
    run, model = pair
    text = tokens(40)
    want = expected(model, text)
    slot, other = run.slot(), run.slot()
    run.prefill(slot, text[:17])
    close(run.prefill(slot, text[17:20]), want[17:20])
    run.prefill(other, text[:5])
    both = run.step({slot: text[20], other: text[5]})
    close(both, torch.stack((want[20], want[5])))
    # A draft of which the last three tokens are wrong and rejected, then the right ones.
    draft = [*text[21:25], *tokens(3, seed=2)]
    close(run.verify(slot, draft, accepted=4)[:4], want[21:25])
    close(run.verify(slot, text[25:31], accepted=6), want[25:31])
    close(run.step({slot: text[31]})[0], want[31])
    run.pool.release(slot)
    run.pool.release(other)
    run.pool.check()


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max().item() <= 1e-5


@pytest.mark.parametrize("name", ["llama3", "linear"])
def test_scaled_positions_are_not_those_of_plain_ones(name: str, tmp_path: Path) -> None:
    """Or the tests above could pass without any scaling."""
    model = make(tmp_path, **CONFIGS[name])
    config = read_json(tmp_path / "config.json")
    plain = dict(config["rope_parameters"], rope_type="default")
    scaled, unscaled = (
        family(c).build(c).blocks[0].mixer.frequencies.on(torch.zeros(1))[0]  # type: ignore[attr-defined]
        for c in (config, config | {"rope_parameters": plain})
    )
    torch.testing.assert_close(scaled, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert (scaled - unscaled).abs().max() > 1e-3


def test_the_config_of_older_releases_means_the_same(tmp_path: Path) -> None:
    make(tmp_path, **CONFIGS["llama3"])
    config = read_json(tmp_path / "config.json")
    rope = config.pop("rope_parameters")
    old = config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    new = config | {"rope_parameters": LLAMA3}
    first, second = (
        family(c).build(c).blocks[0].mixer.frequencies.on(torch.zeros(1))[0]  # type: ignore[attr-defined]
        for c in (old, new)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.*yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.linear.factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": None, "hidden_size": 44}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_a_config_that_cannot_be_honoured_names_the_key(change: dict[str, Any], named: str) -> None:
    config = {"model_type": "llama"} | SMALL
    with torch.device("meta"):
        family(config).build(config)
        with pytest.raises(UsageError, match=f"config.json: .*{named}"):
            family(config).build(config | change)


def test_a_refused_config_shows_the_value_and_what_to_do() -> None:
    with pytest.raises(UsageError, match="sliding_window: 4096: ") as caught:
        family({"model_type": "llama"}).build({"sliding_window": 4096} | SMALL)
    assert "another checkpoint" in (caught.value.hint or "")


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'mamba9'") as caught:
        family({"model_type": "mamba9"})
    assert "llama" in (caught.value.hint or "")
