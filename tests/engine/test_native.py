"""The native family: a pattern in, a model out, and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from difyops.engine import models
from difyops.engine.load import load
from difyops.engine.mixers import Diag, Norm
from difyops.engine.models import native
from difyops.engine.models.decoder import Decoder
from difyops.engine.models.mtp import modules
from difyops.engine.state import StatePool
from difyops.errors import UsageError
from tests.engine import tiny
from tests.engine.gates import error

EXACT = 1e-10


def reference(model: Decoder, tokens: Tensor) -> Tensor:
    """The hidden states of one whole sequence, by the mixers' references."""
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x, lambda mixer, x, state: mixer.reference(x), None)
    hidden: Tensor = model.norm(x)
    return hidden


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed))


MIXED = [
    {"mixer": "diag", **tiny.LAYERS["diag"], "block": 9},
    {"mixer": "linear", "repeat": 2, **tiny.LAYERS["linear"]},
    {"mixer": "softmax", **tiny.LAYERS["softmax"]},
    {"mixer": "performer", **tiny.LAYERS["performer"]},
    {"mixer": "retention", **tiny.LAYERS["retention"]},
    {"mixer": "linear", **tiny.LAYERS["linear"], "feature": "exp"},
    {"mixer": "softmax", **tiny.LAYERS["softmax"]},
    {"mixer": "norm", "repeat": 2, **tiny.LAYERS["norm"]},
]


@pytest.mark.parametrize(
    "pattern", [MIXED, tiny.PATTERNS["transnormer"]], ids=["mixed", "diag-norm"]
)
def test_every_way_through_the_layers_is_the_reference(pattern: list[dict[str, Any]]) -> None:
    """Prefill in chunks, steps beside another sequence, and drafts of which some are taken."""
    model, _ = tiny.model(dtype=torch.float64, pattern=pattern)
    pool = StatePool(model.state_specs(), slots=3, context=300, window=5, page_size=8)
    a, b = pool.table.acquire(), pool.table.acquire()
    assert a is not None and b is not None
    assert pool.table.grow(a, 300) and pool.table.grow(b, 300)
    pool.sync()
    x, y = random_tokens(150, 1), random_tokens(60, 2)
    slots, got = torch.tensor([a, b]), []
    out = model.prefill(torch.cat((x[:70], y[:3])), pool, slots, torch.tensor([0, 70, 73]))
    got.append(out[:70])
    got.append(model.prefill(x[70:99], pool, slots[:1], torch.tensor([0, 29])))
    for i in range(20):
        got.append(model.step(torch.stack((x[99 + i], y[3 + i])), pool, slots)[:1])
    at = 119
    for taken in (5, 1, 0, 3):
        draft = torch.cat((x[at : at + taken], random_tokens(5, 9)))[:5]
        out = model.verify(torch.stack((draft, draft.flip(0))), pool, slots)
        model.commit(pool, slots, torch.tensor([taken, 0]))
        got.append(out[0, :taken])
        at += taken
    got.append(model.prefill(x[at:], pool, slots[:1], torch.tensor([0, 150 - at])))
    assert error(torch.cat(got), reference(model, x)) < EXACT
    last = model.step(torch.stack((x[0], y[23])), pool, slots)[1]
    assert error(last, reference(model, y[:24])[-1]) < EXACT


def test_transnormer_is_a_pattern() -> None:
    model, config = tiny.model("transnormer")
    assert models.family(config).build is native.build
    assert [type(block.mixer) for block in model.blocks] == [Diag] * 6 + [Norm] * 6


@pytest.mark.parametrize("kind", tiny.PATTERNS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = tiny.checkpoint(tmp_path / "m", kind, dtype=torch.bfloat16, tied=tied)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    model, _ = tiny.model(kind, dtype=torch.bfloat16, tied=tied, vocabulary=config["vocabulary"])
    stored = load_file(folder / "model.safetensors")
    assert ("head.weight" in stored) is not tied
    found = models.family(config)
    assert found.name == "difyops_native"
    renamed = {found.rename(name): tensor for name, tensor in stored.items()}
    for name, tensor in model.state_dict().items():
        if name != "head.weight" or not tied:
            assert torch.equal(renamed.pop(name), tensor)
    assert not renamed
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "prefix"), [(1, ""), (2, "0."), (3, "2.")])
def test_prediction_modules_are_saved_and_loaded(tmp_path: Path, count: int, prefix: str) -> None:
    """An only module is named as ever."""
    keys: dict[str, Any] = {"mtp": tiny.PATTERNS["linear"], "mtp_modules": count}
    folder = tiny.checkpoint(tmp_path / "m", **keys)
    stored = load_file(folder / "model.safetensors")
    assert f"extra.mtp.{prefix}fc.weight" in stored
    model = load(folder).model
    made = modules(model)
    assert len(made) == count
    assert len({module.fc.weight.data_ptr() for module in made}) == count
    drawn = tiny.model(vocabulary=model.shape.vocabulary, **keys)[0].state_dict()
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in model.state_dict().items())


def test_a_save_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.checkpoint(tmp_path, "linear")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save_file", half)
    model, config = tiny.model("linear", seed=1)
    with pytest.raises(OSError, match="No space left"):
        native.save(model, config, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


LINEAR = {"mixer": "linear", "heads": 4, "head_dim": 6}


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        ({"pattern": [{**LINEAR, "mixer": "liner"}]}, "pattern/0/mixer: 'liner' is not a mixer",
         "diag, "),
        ({"pattern": [{**LINEAR, "mixer": ["linear"]}]}, "pattern/0/mixer: ['linear'] is not", ""),
        ({"pattern": [{"heads": 4}]}, "pattern/0/mixer: None is not a mixer", "performer"),
        ({"pattern": [LINEAR, {**LINEAR, "headz": 4}]},
         "pattern/1/headz: not an option of linear", "feature, head_dim, heads"),
        ({"pattern": [{"mixer": "linear", "heads": 4}]}, "pattern/0/head_dim: missing", ""),
        ({"pattern": [{**LINEAR, "repeat": 0}]}, "pattern/0/repeat: 0 is not a number of", ""),
        ({"pattern": [{**LINEAR, "repeat": True}]}, "pattern/0/repeat: True is not a", ""),
        ({"pattern": [{**LINEAR, "feature": "relu"}]}, "pattern/0/feature: Input should be", ""),
        ({"pattern": [{**LINEAR, "kv_heads": 3}]},
         "pattern/0: Value error, kv_heads: 3 does not divide heads, 4", ""),
        ({"pattern": []}, "pattern: ", ""),
        ({"pattern": "diag"}, "pattern: ", ""),
        ({"mtp_modules": 2}, "mtp_modules: needs mtp, the pattern of", ""),
        ({"mtp": [LINEAR], "mtp_modules": 0}, "mtp_modules: Input should be greater", ""),
        ({"mtp": [LINEAR], "mtp_modules": True}, "mtp_modules: Input should be a valid", ""),
        ({"width": "24"}, "width: Input should be a valid integer, not '24'", ""),
        ({"widht": 24}, "widht: not an option of a native config", "vocabulary, width"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_named_by_its_key(change: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        native.build(tiny.config() | change)
    assert caught.value.message.startswith("config.json: " + said.replace("Value error, ", ""))
    assert hint in (caught.value.hint or "")


def test_a_config_that_cannot_be_built_is_not_saved(tmp_path: Path) -> None:
    model, config = tiny.model("linear")
    with pytest.raises(UsageError, match="not an option"):
        native.save(model, config | {"pattern": [{**LINEAR, "headz": 4}]}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_tiny_tokenizer_keeps_every_text() -> None:
    words = tiny.tokenizer()
    text = 'Zwölf {"a": [1, 2]} 你好 \x00\t🙂 def step():\n'
    assert words.decode(words.encode(text).ids) == text
    assert 300 <= words.get_vocab_size() <= 500
    assert words.get_vocab() == tiny.tokenizer().get_vocab()
    marked = f"{tiny.START}user\nhi{tiny.END}"
    ids = words.encode(marked).ids
    assert ids.count(words.token_to_id(tiny.START)) == ids.count(words.token_to_id(tiny.END)) == 1
