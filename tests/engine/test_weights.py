"""Safetensors into a module: every tensor accounted for, every fault named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from difyops.engine.load import load
from difyops.engine.weights import Checkpoint, fill
from difyops.errors import PrerequisiteError, UsageError

from . import tiny
from .runs import Run
from .test_llama import make


class Small(nn.Module):
    """A tied head, a persistent buffer and one that is not."""

    kept: Tensor

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.inner = nn.Sequential(nn.Linear(3, 2))
        self.register_buffer("kept", torch.zeros(4, dtype=torch.int64))


def small(**options: Any) -> Small:
    with torch.device("meta"):
        return Small(**options)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(5, 3),
        "inner.0.weight": torch.randn(2, 3, dtype=torch.float64),
        "inner.0.bias": torch.randn(2).to(torch.bfloat16),
        "kept": torch.arange(4),
    }


def same(name: str) -> str | None:
    if name.startswith("odd"):
        raise KeyError(name)
    return None if name.startswith("known.") else name


def saved(folder: Path, content: dict[str, Tensor]) -> Checkpoint:
    save_file(content, folder / "model.safetensors")
    return Checkpoint(folder)


def sharded(folder: Path, parts: dict[str, dict[str, Tensor]], **index: str) -> None:
    weight_map = {name: file for file, part in parts.items() for name in part} | index
    for file, part in parts.items():
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_module_gets_what_the_file_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    content = tensors() | {"known.unwanted": torch.zeros(9)}
    model = small()
    fill(model, saved(tmp_path, content), same, dtype)
    for name in ("embed.weight", "inner.0.weight", "inner.0.bias"):
        got = model.get_parameter(name)
        assert got.dtype == dtype
        assert not got.requires_grad
        assert torch.equal(got, content[name].to(dtype))
    assert torch.equal(model.kept, torch.arange(4))
    assert model.head.weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) == 15 + 6 + 2


def test_shards(tmp_path: Path) -> None:
    content = tensors()
    first = {"embed.weight": content.pop("embed.weight")}
    sharded(tmp_path, {"a.safetensors": first, "b.safetensors": content})
    model = small()
    fill(model, Checkpoint(tmp_path), same, torch.float32)
    assert torch.equal(model.embed.weight, first["embed.weight"])


def test_a_tied_head_may_be_stored_if_it_is_equal(tmp_path: Path) -> None:
    content = tensors()
    model = small()
    fill(
        model,
        saved(tmp_path, content | {"head.weight": content["embed.weight"].clone()}),
        same,
        torch.float32,
    )
    assert model.head.weight is model.embed.weight
    other = saved(tmp_path, content | {"head.weight": torch.zeros(5, 3)})
    with pytest.raises(PrerequisiteError, match=r"head\.weight differs from embed\.weight"):
        fill(small(), other, same, torch.float32)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda content: content.__delitem__(name)


def with_(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda content: content.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("inner.0.bias"), r"no tensor for inner\.0\.bias"),
        (without("kept"), "no tensor for kept"),
        (with_("odd.one", torch.zeros(1)), r"odd\.one: no such tensor"),
        (with_("stray", torch.zeros(1)), "stray: no such tensor"),
        (with_("embed.weight", torch.zeros(3, 5)), r"embed\.weight has shape \[3, 5\].*\[5, 3\]"),
        (with_("embed.weight", torch.zeros(5, 3, dtype=torch.int8)), r"embed\.weight holds int8"),
        (with_("kept", torch.zeros(4)), "kept holds float32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], None], named: str, tmp_path: Path
) -> None:
    content = tensors()
    change(content)
    with pytest.raises(PrerequisiteError, match=named):
        fill(small(), saved(tmp_path, content), same, torch.float32)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"no tensor for head\.weight"):
        fill(small(tied=False), saved(tmp_path, tensors()), same, torch.float32)


def test_two_names_for_one_place(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, tensors() | {"twin": torch.zeros(5, 3)})
    with pytest.raises(PrerequisiteError, match="the same"):
        fill(
            small(),
            checkpoint,
            lambda name: "embed.weight" if name == "twin" else name,
            torch.float32,
        )


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(size: int, tmp_path: Path) -> None:
    saved(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors: cannot be read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0[]"]
)
def test_a_corrupt_header_is_named(header: bytes, tmp_path: Path) -> None:
    saved(tmp_path, tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors: cannot be read"):
        Checkpoint(tmp_path)


def test_faults_of_an_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    sharded(tmp_path, {"a.safetensors": tensors()}, ghost="a.safetensors")
    with pytest.raises(PrerequisiteError, match=r"ghost is not in a\.safetensors"):
        Checkpoint(tmp_path)
    sharded(tmp_path, {"a.safetensors": tensors()}, ghost="b.safetensors")
    with pytest.raises(PrerequisiteError, match=r"names b\.safetensors: no such file"):
        Checkpoint(tmp_path)
    sharded(tmp_path, {"a.safetensors": tensors()}, ghost="../a.safetensors")
    with pytest.raises(PrerequisiteError, match=r"ghost: '\.\./a\.safetensors'"):
        Checkpoint(tmp_path)
    twice = {"embed.weight": "a.safetensors"}
    sharded(tmp_path, {"a.safetensors": tensors(), "b.safetensors": tensors()}, **twice)
    with pytest.raises(PrerequisiteError, match=r"b\.safetensors: .* is in a\.safetensors, too"):
        Checkpoint(tmp_path)
    for content in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(PrerequisiteError, match=r"index\.json"):
            Checkpoint(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="holds neither"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(PrerequisiteError, match="pickled") as caught:
        Checkpoint(tmp_path)
    assert "safetensors" in (caught.value.hint or "")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, smol_tokenizer: Any) -> Path:
    """A whole model in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder, vocab_size=49152, num_hidden_layers=1, tie_word_embeddings=True)
    smol_tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return folder


def test_load_a_directory(directory: Path) -> None:
    loaded = load(directory)
    assert loaded.family == "llama"
    assert loaded.context == 256
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.stop_ids == {2}
    attention, mlp, norms = 48 * 48 * 2 + 48 * 24 * 2, 3 * 48 * 80, 3 * 48
    assert loaded.parameters == 49152 * 48 + attention + mlp + norms
    assert load(directory, dtype="float64").model.dtype == torch.float64


@pytest.mark.parametrize(
    "wrong", [{"top_k": -1}, {"top_p": 7}, {"repetition_penalty": 0}, {"temperature": "hot"}]
)
def test_wrong_recommendations_are_named(
    directory: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(PrerequisiteError, match=f"generation_config.json: {next(iter(wrong))}"):
        load(tmp_path / "model")


def test_load_refuses(directory: Path, tmp_path: Path) -> None:
    for options, error, named in (
        ({"dtype": "int4"}, UsageError, "dtype 'int4'"),
        ({"device": "gpu"}, UsageError, "device 'gpu'"),
        ({"device": "mps"}, UsageError, "device 'mps'"),
        ({"device": "cuda:99"}, PrerequisiteError, "device cuda:99"),
    ):
        with pytest.raises(error, match=named):
            load(directory, **options)
    with pytest.raises(PrerequisiteError, match="neither a directory nor"):
        load(directory / "config.json")
    with pytest.raises(PrerequisiteError, match=r"config\.json"):
        load(tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").symlink_to(directory / "tokenizer.json")
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(PrerequisiteError, match="the tokenizer has 49152 tokens, the model 100"):
        load(tmp_path)


def test_loading_takes_the_weights_memory_once(tmp_path: Path) -> None:
    """Eight tensors of 25 MB on disk, filled as float64: not two copies at once."""
    save_file(
        {f"{n}.weight": torch.zeros(2500, 2500) for n in range(8)}, tmp_path / "model.safetensors"
    )
    script = f"""if True:
        import re, torch
        from pathlib import Path
        from difyops.engine.weights import Checkpoint, fill
        def most():
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
        with torch.device("meta"):
            layers = [torch.nn.Linear(2500, 2500, bias=False) for _ in range(8)]
        model = torch.nn.Sequential(*layers)
        checkpoint = Checkpoint(Path({str(tmp_path)!r}))
        before = most()
        fill(model, checkpoint, str, torch.float64)
        print(most() - before)
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    grown = int(out.stdout) / 1000  # MB
    weights = 8 * 50  # float64
    mapped = 8 * 25  # the file's pages, which the kernel may take back
    assert grown < weights + mapped + 60


@pytest.mark.parametrize("kind", tiny.PATTERNS)
def test_every_native_pattern_comes_back_from_its_files(kind: str, tmp_path: Path) -> None:
    model, _ = tiny.model(kind, vocabulary=400)
    loaded = load(tiny.checkpoint(tmp_path, kind, vocabulary=400))
    assert loaded.family == "difyops_native"
    text = list(range(7, 40))
    first, second = Run.of(model), Run.of(loaded.model)
    assert torch.equal(first.prefill(first.slot(), text), second.prefill(second.slot(), text))
