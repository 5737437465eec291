"""The first look at a model: what its headers say, before anything waits for its weights.

Knows no torch. A model that passes may still be refused once it is read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difyops.engine.layout import DAMAGED, located, read_json, shards
from difyops.errors import PrerequisiteError, UsageError


def look(path: Path, name: str, context: int | None) -> None:
    """Look at config.json and the headers of the weights of a directory, or at a .gguf file's.

    `context` is how many tokens are asked for; None: whatever the model has. Raises UsageError or
    PrerequisiteError naming the file, the key and the remedy.
    """
    # Imported here: of a catalog's model alone no header is read.
    from difyops.engine.models import check_family

    if path.is_dir():
        config = read_json(path / "config.json")
        try:
            check_family(config)
        except UsageError as error:
            raise located(path, error) from error
        if not (path / "tokenizer.json").is_file():
            raise PrerequisiteError(
                f"{path} holds no tokenizer.json", "the download is not complete, or is no model"
            )
        for file in shards(path):
            _safetensors(file)
        text = config.get("text_config")
        has = {**config, **(text if isinstance(text, Mapping) else {})}
        check_context(context, name, has.get("max_position_embeddings", has.get("context")))
    else:
        check_context(context, name, _gguf(path))


def check_context(context: int | None, name: str, has: Any) -> None:
    """Raises UsageError when more tokens are asked for than the model has, as far as is known."""
    if context is not None and isinstance(has, int) and context > has:
        raise UsageError(
            f"context: {context} tokens were asked for, and {name} has {has}",
            f"ask for {has} or less, or leave it out",
        )


def _safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise PrerequisiteError(f"{file}: cannot be read: {error}", DAMAGED) from error


def _gguf(file: Path) -> Any:
    from difyops.engine.gguf_file import GgufFile, check_architecture

    found = GgufFile(file)
    check_architecture(found)
    return found.metadata.get("llama.context_length")
