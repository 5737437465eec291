"""Hugging Face's layout of a model directory: JSON files, and which files hold the weights.

Knows no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from difyops.errors import PrerequisiteError, UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DAMAGED = "download it again; a file that was cut short looks so"


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises PrerequisiteError when one is absent."""
    if (directory / INDEX).is_file():
        paths = sorted(set(indexed(directory).values()))
        if absent := [path.name for path in paths if not path.is_file()]:
            raise PrerequisiteError(
                f"{directory / INDEX} names {', '.join(absent)}: no such file in {directory}",
                "the download is not complete",
            )
        return paths
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise PrerequisiteError(
            f"{directory} holds PyTorch's pickled weights only, and reading those can run code",
            "convert them to safetensors (transformers: save_pretrained writes it)",
        )
    raise PrerequisiteError(
        f"{directory} holds neither {SINGLE} nor {INDEX}",
        "give a directory in Hugging Face's layout",
    )


def indexed(directory: Path) -> dict[str, Path]:
    """Tensor -> file as the index says; empty without one."""
    path = directory / INDEX
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PrerequisiteError(f"{path}: weight_map is missing", DAMAGED)
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise PrerequisiteError(f"{path}: {name}: {file!r} is not the name of a file beside it")
    return {name: directory / file for name, file in weight_map.items()}


def located(directory: Path, error: UsageError) -> UsageError:
    """An error about `config.json`, with the whole path of that file."""
    return UsageError(f"{directory}/{error.message}", error.hint)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises PrerequisiteError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PrerequisiteError(
            f"{path}: {error.strerror}", "the download is incomplete"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PrerequisiteError(f"{path}: is not valid JSON: {error}", DAMAGED) from error
    if not isinstance(content, dict):
        raise PrerequisiteError(f"{path}: is JSON, and no object", DAMAGED)
    return content
