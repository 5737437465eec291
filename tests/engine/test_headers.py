"""The first look at a model: cheap, without torch, and with the whole path and a remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from difyops.engine import headers, load
from difyops.errors import DifyopsError, UsageError
from tests.engine import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.checkpoint(tmp_path / "m", context=512)


def _config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "file", "said"),
    [
        (_config(lambda c: c.update(model_type="bert")), "config.json", "'bert' is not served"),
        (_config(lambda c: c.update(model_type=["llama"])), "config.json", "is not served"),
        (_config(lambda c: c.pop("model_type")), "config.json", "model_type is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json", "is not valid JSON: "),
        (lambda f: (f / "config.json").write_text("[]"), "config.json", "no object"),
        (lambda f: (f / "tokenizer.json").unlink(), "", "tokenizer.json"),
        (lambda f: (f / "model.safetensors").unlink(), "", "model.safetensors"),
        (_cut, "model.safetensors", "cannot be read"),
    ],
)
def test_a_broken_folder(damage: Callable[[Path], None], file: str, said: str, model: Path) -> None:
    headers.look(model, "m", 512)
    damage(model)
    with pytest.raises(DifyopsError) as caught:
        headers.look(model, "m", None)
    assert str(model / file) in caught.value.message and said in caught.value.message
    assert caught.value.hint


def test_weights_of_another_model(model: Path) -> None:
    _config(lambda c: c.update(mlp_hidden=41))(model)
    headers.look(model, "m", None)  # what only the weights show
    with pytest.raises(DifyopsError, match="has shape") as caught:
        load.load(model)
    assert caught.value.hint == "config.json and the weights are of different models"
    _config(lambda c: c.update(mlp_hidden="x"))(model)
    with pytest.raises(UsageError) as wrong:
        load.load(model)
    assert wrong.value.message.startswith(f"{model}/config.json: mlp_hidden")


def test_a_gguf_file(smol: Path, tmp_path: Path) -> None:
    headers.look(smol, "smol", 8192)
    with pytest.raises(UsageError, match="8193 tokens were asked for, and smol has 8192"):
        headers.look(smol, "smol", 8193)
    junk = tmp_path / "junk.gguf"
    shutil.copyfile(smol, junk)
    with junk.open("r+b") as file:
        file.write(b"junk")
    with pytest.raises(DifyopsError, match=f"{junk}: not a GGUF file"):
        headers.look(junk, "smol", None)


def test_it_needs_no_torch(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from difyops.engine import headers; "
        "headers.look(Path(sys.argv[1]), 'm', 512); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, timeout=60)
