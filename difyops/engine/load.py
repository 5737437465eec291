"""A model directory or GGUF file -> a module with its weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from difyops.engine import models
from difyops.engine.config import SamplingConfig
from difyops.engine.layout import DAMAGED, located, read_json
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import SamplingDefaults
from difyops.engine.tokens import Tokenizer, end_ids
from difyops.engine.weights import Checkpoint, Tensors, fill
from difyops.errors import PrerequisiteError, UsageError
from difyops.serving.config import first_error

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """A model that can run. `context` is in tokens; tied weights count once."""

    model: Decoder
    tokenizer: Tokenizer
    context: int
    family: str
    parameters: int
    sampling: SamplingDefaults


def load(path: Path, *, dtype: str | None = None, device: str = "cpu") -> Loaded:
    """Load a directory in Hugging Face's layout, or a .gguf file.

    `dtype` is one of DTYPES or "auto" (None is the same): float32 on a CPU; elsewhere float32 for
    a checkpoint in float32 and bfloat16 for any other. Raises UsageError for a dtype, device or
    config that cannot be honoured, PrerequisiteError naming a file or tensor that is wrong.
    """
    place = _device(device)
    checkpoint, config, tokenizer = _read(path)
    try:
        family = models.family(config)
        with torch.device("meta"):
            model = family.build(config)
    except UsageError as error:
        if path.is_dir():
            raise located(path, error) from error
        raise
    if tokenizer.vocabulary > model.shape.vocabulary:
        raise PrerequisiteError(
            f"{path}: the tokenizer has {tokenizer.vocabulary} tokens, "
            f"the model {model.shape.vocabulary}",
            "they belong to different models",
        )
    fill(model, checkpoint, family.rename, _dtype(dtype, config, place), place)
    model.eval()
    return Loaded(
        model,
        tokenizer,
        model.shape.context,
        family.name,
        sum(parameter.numel() for parameter in model.parameters()),
        sampling_defaults(path),
    )


def _read(path: Path) -> tuple[Tensors, Mapping[str, Any], Tokenizer]:
    if path.is_dir():
        config = read_json(path / "config.json")
        tokenizer = Tokenizer.from_file(path / "tokenizer.json", tokenizer_config(path, config))
        return Checkpoint(path), config, tokenizer
    if path.suffix != ".gguf":
        raise PrerequisiteError(
            f"{path}: neither a directory nor a .gguf file",
            "give a directory in Hugging Face's layout, or a .gguf file",
        )
    # Imported here: reading safetensors does without gguf.
    from difyops.engine.gguf_file import GgufFile
    from difyops.engine.gguf_model import GgufCheckpoint

    gguf = GgufCheckpoint(GgufFile(path))
    return gguf, gguf.config, gguf.tokenizer()


def tokenizer_config(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the directory's files say about special tokens and the chat template, in one dict.

    `eos_token_id` is all that config.json and generation_config.json name; chat_template.jinja
    comes before a template in tokenizer_config.json. Raises PrerequisiteError naming a file that
    cannot be read, or says no token.
    """
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            merged |= read_json(directory / name)
    ends: list[int] = []
    sources = {"config.json": (_text(config), config), _GENERATION: (_generation(directory),)}
    for name, objects in sources.items():
        try:
            ends += [end for one in objects for end in end_ids(one.get("eos_token_id"))]
        except PrerequisiteError as error:
            raise PrerequisiteError(f"{directory / name}: {error.message}", error.hint) from None
    merged["eos_token_id"] = ends
    template = directory / "chat_template.jinja"
    if template.is_file():
        try:
            merged["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PrerequisiteError(f"{template}: {error}", DAMAGED) from error
    return merged


def sampling_defaults(path: Path) -> SamplingDefaults:
    """What generation_config.json recommends. Raises PrerequisiteError for a value that is none."""
    given = {k: v for k, v in _generation(path).items() if k in SamplingConfig.model_fields}
    try:
        return SamplingDefaults(**SamplingConfig.model_validate(given).given())
    except ValidationError as error:
        raise PrerequisiteError(
            f"{path / _GENERATION}: {first_error(error)}", "correct it, or remove the key"
        ) from None


def _generation(directory: Path) -> Mapping[str, Any]:
    file = directory / _GENERATION
    return read_json(file) if file.is_file() else {}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's keys: a config of a model with vision nests them."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else {}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not one", "use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", "use cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PrerequisiteError(
            f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs",
            "check the driver (nvidia-smi) and that PyTorch is not its CPU build",
        )
    return device


def _dtype(name: str | None, config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    if name not in (None, "auto"):
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is not supported", f"use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    keys = {**_text(config), **config}
    stored = keys.get("dtype", keys.get("torch_dtype"))
    return torch.float32 if device.type == "cpu" or stored == "float32" else torch.bfloat16
